"""The exception that users meet: what is wrong, where, and what to do, in one sentence."""

import importlib.util
import re
from typing import Any


class UserError(Exception):
    """Something outside the program is wrong; the command prints the message and exits with code 1.

    `shared` says that every rank raises the same, so that only rank 0 needs to print it.
    """

    def __init__(self, message: str, *, shared: bool = False):
        super().__init__(message)
        self.shared = shared


def shown(text) -> str:
    """The text of a URL or an error without passwords and signed queries, as errors and logs may show it."""
    return re.sub(r"\?[^\s'\")]*", "?...", re.sub(r"//[^/\s]+@", "//...@", str(text)))


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In words, what is not the same in two sets of settings."""
    keys = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    return "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys)


def require_matplotlib(whose: str) -> None:
    """Raises UserError where it is not installed, before the work that would end in a picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{whose} need matplotlib; pip install 'sivae[pictures]'")
