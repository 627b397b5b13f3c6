"""Blocks of remote shards on the disk of a node, for all processes of all runs that name the same folder.

The least recently used blocks go when the limit is reached. A block is a file that appears whole; who reads checks its
bytes. Locks are the operating system's (POSIX record locks), which end with the process that holds them, so a killed
run leaves nothing that another must clean up. A cache that cannot be written is a warning, never an error.
"""

import errno
import fcntl
import logging
import os
import threading
import time
import uuid
from contextlib import contextmanager

logger = logging.getLogger(__name__)
EVICT_TO = 0.9  # of the limit: a tenth is freed at a time, so that the folder is not listed for every block
LOCK_SEC = 5  # a process that holds the count longer has stopped; the block is not kept then
REST_SEC = 60  # after a failure to write, until the next try: a full disk may have room again
ABANDONED_SEC = 3600  # a temporary file older than this was left by a kill
_threads = threading.Lock()  # record locks are a process's: its threads do not keep each other out


class BlockCache:
    """At most limit_bytes of blocks in a folder."""

    def __init__(self, folder: str, limit_bytes: int):
        self.folder, self.limit_bytes = os.path.abspath(os.path.expanduser(folder)), limit_bytes
        self._files, self._pid = None, None
        self._rests_until, self._warned = 0.0, False

    def get(self, key: str) -> bytes | None:
        """The bytes of a block, which is now the last used; None when it is not here."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:  # not here, just evicted, or unreadable: all the same to the caller
            return None
        try:
            os.utime(path)
        except OSError as error:  # just evicted, or another user's
            logger.debug("%s keeps its age: %s", path, error)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep a block, if it can be."""
        if time.monotonic() < self._rests_until or len(data) > self.limit_bytes:
            return
        path = self._path(key)
        part = f"{path}.{uuid.uuid4().hex}.part"  # not the process's number: containers share a folder, and count alike
        try:
            if self._reserve(part, len(data)):
                with open(part, "r+b") as file:
                    file.write(data)
                os.replace(part, path)
        except FileNotFoundError as error:  # somebody empties the folder
            logger.debug("a block is not kept: %s", error)
        except OSError as error:
            self._rest(error, part)

    def drop(self, key: str) -> None:
        try:
            os.unlink(self._path(key))
        except OSError as error:
            logger.debug("a bad block stays in the cache: %s", error)

    def claim(self, key: str) -> bool:
        """Whether this process is the one to fetch the block now. True as well when the cache cannot tell."""
        try:
            _, claims = self._open()
            fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:11], 16))
            return True
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN) or self._files is None

    def release(self) -> None:
        """Give back all that this process has claimed."""
        if self._files is not None:
            fcntl.lockf(self._files[1], fcntl.LOCK_UN)

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key[:2], key)

    def _open(self) -> tuple[int, int]:
        """Descriptors of the file that counts the bytes and of the one whose bytes stand for claims."""
        if self._files is None or self._pid != os.getpid() or not os.fstat(self._files[0]).st_nlink:
            self._files = None  # not closed: that would end the locks which other caches of this process hold there
            os.makedirs(self.folder, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            paths = (os.path.join(self.folder, name) for name in (".bytes", ".claims"))
            self._files, self._pid = tuple(os.open(path, flags, 0o666) for path in paths), os.getpid()
        return self._files

    def _reserve(self, part: str, num_bytes: int) -> bool:
        """Make the file of a block that is about to be written, at its full length, so that whoever counts finds it.

        Others are evicted when there is no room. False when that is not enough: what is being written stays.
        """
        counter, _ = self._open()
        with self._locked(counter):
            used = int.from_bytes(os.pread(counter, 8, 0), "little")
            if used + num_bytes > self.limit_bytes:
                used = self._evict(int(self.limit_bytes * EVICT_TO) - num_bytes)
            fits = used + num_bytes <= self.limit_bytes
            os.pwrite(counter, (used + num_bytes * fits).to_bytes(8, "little"), 0)
            if fits:
                os.makedirs(os.path.dirname(part), exist_ok=True)
                with open(part, "xb") as file:
                    file.truncate(num_bytes)
        return fits

    @contextmanager
    def _locked(self, descriptor: int):
        deadline = time.monotonic() + LOCK_SEC
        with _threads:
            while True:
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        raise
                    if time.monotonic() > deadline:
                        raise TimeoutError(errno.ETIMEDOUT, f"another process has held its lock for {LOCK_SEC} s")
                    time.sleep(0.005)
            try:
                yield
            finally:
                fcntl.lockf(descriptor, fcntl.LOCK_UN)

    def _evict(self, target_bytes: int) -> int:
        """Delete the longest unused blocks until at most target_bytes are left. Returns what is left, counted anew."""
        found, writing, now = [], 0, time.time()
        for root, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(root, name)
                try:
                    status = os.stat(path)
                    if name.endswith(".part"):
                        if now - status.st_mtime > ABANDONED_SEC:
                            os.unlink(path)
                        else:
                            writing += status.st_size
                    elif not name.startswith("."):
                        found.append((status.st_mtime, status.st_size, path))
                except FileNotFoundError:
                    continue
        used = writing + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= target_bytes:
                break
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            used -= size
        return used

    def _rest(self, error: OSError, part: str) -> None:
        self._rests_until = time.monotonic() + REST_SEC
        logger.log(
            logging.DEBUG if self._warned else logging.WARNING,
            "%s cannot be written (%s); going on, and keeping no more there until it can", self.folder, error.strerror or error,
        )  # fmt: skip
        self._warned = True
        try:
            os.unlink(part)
        except OSError:
            pass

    def __getstate__(self):  # descriptors and locks are a process's own
        return self.__dict__ | {"_files": None, "_pid": None}
