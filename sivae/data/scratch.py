"""Temporary files beside their destination, of which none outlives its process for long."""

import contextlib
import errno
import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

SUFFIX = ".part"


class Scratch:
    """A folder of temporary files. Each is locked by the process that writes it, so that the ones of killed
    processes, and only those, can be told and swept: a number of a process means nothing on another machine."""

    def __init__(self, path: str):
        self.path = path

    @classmethod
    def for_uploads(cls) -> "Scratch":
        """In the system's folder for temporary files, for what goes to an object store."""
        return cls(os.path.join(tempfile.gettempdir(), f"sivae-pack-{os.getuid()}"))

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[tuple[BinaryIO, str]]:
        """(an empty file open for reading and writing, its path); gone afterwards unless it was renamed."""
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        made = os.path.join(self.path, f"{name}.{os.getpid()}-{secrets.token_hex(4)}")
        # A new name that must not exist is nobody else's link
        descriptor = os.open(made, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with os.fdopen(descriptor, "w+b") as file:
            with contextlib.suppress(OSError):  # a filesystem without locks: then nothing is swept there either
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = made + SUFFIX  # only locked files have this name
            try:
                os.rename(made, path)
                yield file, path
            finally:
                for left in (made, path):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(left)

    def sweep(self):
        """Delete what killed processes have left."""
        try:
            names = os.listdir(self.path)
        except OSError:  # whoever writes there will say what is wrong
            return
        for name in names:
            if not name.endswith(SUFFIX):
                continue
            path = os.path.join(self.path, name)
            with contextlib.suppress(FileNotFoundError, PermissionError):
                with open(path, "rb+") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError as error:
                        assert error.errno != errno.EBADF
                        continue  # its writer lives
                    os.unlink(path)
