"""The exception that users meet: what is wrong, where, and what to do, in one sentence."""


class UserError(Exception):
    """Something outside the program is wrong; the command prints the message and exits with code 1.

    `shared` says that every rank raises the same, so that only rank 0 needs to print it.
    """

    def __init__(self, message: str, *, shared: bool = False):
        super().__init__(message)
        self.shared = shared
