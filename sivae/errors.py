"""The exception that users meet: what is wrong, where, and what to do, in one sentence."""

import importlib.util
import re
from typing import Any

REMOTE = r"(?<!\bfile)(?<!\blocal)://"  # where `?` begins a query; in a local path it is a letter like any other


class UserError(Exception):
    """Something outside the program is wrong; the command prints the message and exits with code 1.

    `shared` says that every rank raises the same, so that only rank 0 needs to print it.
    """

    def __init__(self, message: str, *, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class Diverged(UserError):
    """A model's numbers are not finite any more, and would not be with another try."""


class RankFailed(UserError):
    """Another rank met what is no UserError; most often it lost a rank itself."""


def shown(text) -> str:
    """The text of a URL or an error without passwords and signed queries, as errors and logs may show it."""
    text = re.sub(r"//[^/\s]+@", "//...@", str(text))
    url = re.search(rf"{REMOTE}|\burl: /", text)  # the second is urllib3's, which leaves the host out
    start = url.end() if url else len(text)
    return text[:start] + re.sub(r"\?[^\s'\")]*", "?...", text[start:])


def query_start(url: str) -> int:
    """Where the query of a URL begins; its length where it has none, as local paths have none."""
    start = url.find("?") if re.search(REMOTE, url) else -1
    return len(url) if start < 0 else start


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In words, what is not the same in two sets of settings."""
    keys = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    return "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys)


def require_matplotlib(whose: str) -> None:
    """Raises UserError where it is not installed, before the work that would end in a picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{whose} need matplotlib; pip install 'sivae[pictures]'")
