"""The exception that users meet: what is wrong, where, and what to do, in one sentence."""

import re


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
