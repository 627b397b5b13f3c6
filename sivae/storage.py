"""Files on any fsspec URL: local folders, s3://, gs://, http(s)://, memory://. One rule for all of it: a network is
tried again, nothing waits for ever, and what is left of a failure is one clear sentence."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import posixpath
import random
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from glob import has_magic
from typing import Any

import fsspec
import fsspec.asyn

from sivae.errors import UserError, shown

logger = logging.getLogger("sivae")
MAX_PAUSE_SEC = 15  # between attempts, before it is doubled at random
MAX_OPEN_FILES = 256  # descriptors that one reader of local ranges keeps
STUCK_SEC = 5  # beyond a time limit, until an event loop that does not even give up is left alone
SLOWEST_BYTES_PER_SEC = 1e6  # of a whole file up or down: what it may need at that pace is added to its time limit

# Another try cannot help these: the name is wrong, access is denied, or an option is.
PERMANENT = (
    FileNotFoundError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    ImportError,
    ValueError,
    TypeError,
)


class Folder:
    """A folder at a local path or any fsspec URL.

    storage_options: fsspec's (endpoint, credentials); None takes what the environment says. timeout_sec: how long one
    attempt may take, on transports that are asynchronous (s3, gs, http, abfs). retries: further attempts after the first,
    waiting backoff_sec, then twice that, up to MAX_PAUSE_SEC, each up to doubled at random so that many ranks do not come
    back at once. outage_sec: a store that does not answer is asked for at least so long, however soon each attempt fails,
    but only once: until it answers again, what follows has the retries alone. Local files are tried once.
    """

    def __init__(
        self,
        url: str | os.PathLike,
        storage_options: dict[str, Any] | None = None,
        *,
        timeout_sec: float = 60,
        retries: int = 4,
        backoff_sec: float = 0.5,
        outage_sec: float = 0,
    ):
        url = os.fspath(url)
        self.url = url.rstrip("/") or url[:1]
        self.options = dict(storage_options or {})
        self.timeout_sec, self.retries, self.backoff_sec = timeout_sec, retries, backoff_sec
        self.outage_sec, self._silent_since = outage_sec, None
        protocol = fsspec.utils.get_protocol(self.url)
        self.is_local, self.is_web = protocol in ("file", "local"), protocol in ("http", "https")
        self._opened, self._pid = None, None
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    @property
    def attempts(self) -> int:
        return 1 if self.is_local else self.retries + 1

    @property
    def patience_sec(self) -> float:
        """The longest that one `read_ranges` can take before it gives up."""
        pauses = sum(2 * self._pause_sec(attempt) for attempt in range(1, self.attempts))
        outage = self.outage_sec + 2 * MAX_PAUSE_SEC + self.timeout_sec if self.outage_sec else 0
        return max(self.attempts * self.timeout_sec + pauses, outage)

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._open()[0]

    @property
    def path(self) -> str:
        """Where the folder lies on `fs`."""
        return self._open()[1]

    def join(self, *names: str) -> str:
        return posixpath.join(self.path, *names)

    def folder(self, *names: str) -> Folder:
        return self.sibling(posixpath.join(self.url, *names))

    def sibling(self, url: str) -> Folder:
        """Another folder, with the same options and patience."""
        settings = {"timeout_sec": self.timeout_sec, "retries": self.retries, "backoff_sec": self.backoff_sec}
        return Folder(url, self.options, outage_sec=self.outage_sec, **settings)

    # Whole files; every failure is a UserError

    def exists(self, *names: str) -> bool:
        return self._guard("look at", lambda: self._exists(self.join(*names)), *names)

    def size(self, *names: str) -> int | None:
        """Bytes of a file; None when it is not there."""

        def look() -> int | None:
            path = self.join(*names)
            self.fs.invalidate_cache()
            try:
                size = self.fs.info(path, **self._limit())["size"]
            except FileNotFoundError:
                if not self.is_web or not self._exists(path):
                    return None
                size = None  # fsspec takes any failure of a web server for a file that is not there
            if size is None:
                raise OSError("the server does not say how large it is")
            return size

        return self._guard("look at", look, *names)

    def names(self, *names: str) -> list[str]:
        """Names of the entries of a subfolder; empty when it is not there."""

        def listing() -> list[str]:
            path = self.join(*names)
            self.fs.invalidate_cache()
            try:  # without `isdir`, which takes a failure for a folder that is not there
                entries = [entry.rstrip("/") for entry in self.fs.ls(path, detail=False, **self._limit())]
            except (FileNotFoundError, NotADirectoryError):
                return []
            # An object store lists the folder's own mark with what lies in it, and of a file itself.
            return sorted(posixpath.basename(entry) for entry in entries if entry != path.rstrip("/"))

        return [name for name in self._guard("list", listing, *names) if name]

    def read(self, *names: str, num_bytes: int = 0) -> bytes:
        """num_bytes: of a file that may be large, as far as is known: what comes slowly has longer."""
        return self._guard("read", lambda: self.fs.cat_file(self.join(*names), **self._limit(num_bytes)), *names)

    def write(self, data: bytes | list[memoryview], *names: str) -> None:
        """Write a file so that it appears whole or not at all: locally under another name first and then moved.

        data: all of it, or its parts of bytes in order, which a local file takes without another copy in memory.
        """
        parts = [data] if isinstance(data, bytes) else data

        def put() -> None:
            path = self.join(*names)
            if not self.is_local:  # object stores show an object only once it is complete
                # Part by part into bytes, which Python joins with its lock released: other threads go on meanwhile.
                whole = data if isinstance(data, bytes) else b"".join([bytes(part) for part in parts])
                self.fs.pipe_file(path, whole, **self._limit(len(whole)))
                return
            os.makedirs(os.path.dirname(path), exist_ok=True)
            part = f"{path}.part-{os.getpid()}"
            try:
                with open(part, "wb") as file:
                    file.writelines(parts)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                if os.path.exists(part):
                    os.unlink(part)
                raise

        self._guard("write", put, *names)

    def upload(self, local_path: str, *names: str) -> None:
        """Copy a local file to an object store; on a local folder move it into place, for which it must be on the same disk."""

        def put() -> None:
            if self.is_local:
                os.makedirs(os.path.dirname(self.join(*names)), exist_ok=True)
                os.replace(local_path, self.join(*names))
            else:
                self.fs.put_file(local_path, self.join(*names), **self._limit(os.path.getsize(local_path)))

        self._guard("write", put, *names)

    def try_writing(self) -> None:
        """Write a small file and delete it. Raises UserError when that cannot be done: before the work whose results go here."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.write(b"probe", probe)
        self.remove(probe)

    def remove(self, *names: str) -> None:
        """Delete a file or a whole subfolder; nothing happens when it is not there."""

        def delete() -> None:
            path = self.join(*names)
            if self._exists(path):
                # One by one where a name could be taken for a pattern, which would delete its neighbours too.
                if has_magic(path) and not self.is_local:
                    for file in self.fs.find(path) or [path]:
                        self.fs.rm_file(file)
                else:
                    self.fs.rm(path, recursive=True, **self._limit())

        self._guard("delete", delete, *names)

    def _exists(self, path: str) -> bool:
        self.fs.invalidate_cache()
        if self.is_web:  # without `strict` a server that fails is taken for one that has no such file
            return self.fs.exists(path, strict=True, **self._limit())
        try:  # without `exists`, which takes any failure of a local disk for a file that is not there
            self.fs.info(path, **self._limit())
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    # Byte ranges; failures are handed back

    def read_ranges(self, ranges: list[tuple], check: Callable) -> tuple[list[bytes], list[tuple]]:
        """Read the ranges (name, start, stop); start and stop None means the whole file.

        check(i, data) returns what is wrong with the bytes of range i, or None. Returns the bytes of every
        range, and as second the problems that are left: pairs (i, exception or what check said). Wrong
        bytes are asked for again like a failed request, for a proxy or a dying disk can answer anything.
        """
        done: dict[int, bytes] = {}
        problems: dict = dict.fromkeys(range(len(ranges)))
        waiting = list(problems)
        start = time.monotonic()
        for attempt in itertools.count(1):
            for i, data in zip(waiting, self._fetch([ranges[i] for i in waiting])):
                problems[i] = data if isinstance(data, Exception) else check(i, data)
                if problems[i] is None:
                    done[i] = data
                    del problems[i]
                    self._silent_since = None
            waiting = [i for i, problem in problems.items() if self._tries_again(problem, attempt, start)]
            if not waiting:
                break
            self._pause(attempt)
        return [done.get(i, b"") for i in range(len(ranges))], sorted(problems.items(), key=lambda pair: pair[0])

    def _fetch(self, ranges: list[tuple]) -> list:
        """Bytes or the exception of each range, from one attempt."""
        if self.is_local:
            return [self._fetch_local(*r) for r in ranges]
        requests = [(self.join(name), start, stop) for name, start, stop in ranges]
        try:
            if self.fs.async_impl:
                return fsspec.asyn.sync(self.fs.loop, self._all, requests, timeout=self.timeout_sec + STUCK_SEC)
            return self.fs.cat_ranges(*map(list, zip(*requests)), on_error="return")
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - each transport has its own, and most come and go
            return [error] * len(ranges)

    async def _all(self, requests: list[tuple]) -> list:
        """All in flight together, and each given up by itself: fsspec's cat_ranges would lose the good with the bad, and
        leave the requests that it gives up on their connections, of which there are few."""

        async def read(request: tuple) -> bytes:
            path, start, stop = request
            try:
                return await asyncio.wait_for(self.fs._cat_file(path, start=start, end=stop), self.timeout_sec)
            except TimeoutError:
                raise TimeoutError(f"no whole answer within {self.timeout_sec:g} s") from None

        return await asyncio.gather(*map(read, requests), return_exceptions=True)

    def _fetch_local(self, name: str, start: int | None, stop: int | None):
        kept = name in self._descriptors
        try:
            descriptor = self._descriptor(name)
            at, end = (0, os.fstat(descriptor).st_size) if start is None else (start, stop)
            parts = []
            while at < end and (part := os.pread(descriptor, end - at, at)):
                parts.append(part)  # a network mount may hand out less than was asked
                at += len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        except OSError as error:
            if error.errno == errno.ESTALE and kept:  # a network mount: the file was replaced, and is there by its name
                os.close(self._descriptors.pop(name))
                return self._fetch_local(name, start, stop)
            return error

    def _descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            self._descriptors[name] = os.open(self.join(name), os.O_RDONLY)
            if len(self._descriptors) > MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(name)
        return self._descriptors[name]

    # How

    def _open(self) -> tuple:
        """The filesystem and the folder's path on it, opened by the process that uses them.

        One opened before a fork shares its sockets and an event loop whose thread is gone: a child opens
        its own, outside fsspec's cache of instances.
        """
        if self._opened is None or self._pid != os.getpid():
            try:
                options = self.options | {"skip_instance_cache": True}
                self._opened, self._pid = fsspec.core.url_to_fs(self.url, **options), os.getpid()
            except (ImportError, ValueError, TypeError, OSError) as error:
                raise UserError(
                    f"{shown(self.url)}: cannot be opened ({self._private(shown(error))}); check the URL and the storage_options; "
                    "the extras sivae[s3], sivae[gcs] and sivae[http] hold the drivers"
                ) from None
        return self._opened

    def _limit(self, num_bytes: int = 0) -> dict[str, float]:
        """`timeout` is fsspec's own argument for waiting on its event loop; the other filesystems know none."""
        return {"timeout": self.timeout_sec + num_bytes / SLOWEST_BYTES_PER_SEC} if self.fs.async_impl else {}

    def _tries_again(self, problem, attempt: int, start: float) -> bool:
        """After so many attempts since `start`, the last of which ended with an exception or another problem."""
        if permanent(problem):  # an answer
            self._silent_since = None
            return False
        if attempt < self.attempts:
            return True
        answered = not isinstance(problem, Exception) or isinstance(problem, UserError) or lost(problem)
        if self.is_local or answered:
            return False
        self._silent_since = min(start, self._silent_since or start)
        left_sec = self._silent_since + self.outage_sec - time.monotonic()
        if left_sec > 0 and attempt == self.attempts:
            logger.warning(
                "%s: no answer (%s), asking for another %.0f s", shown(self.url), self.reason(problem), left_sec
            )
        return left_sec > 0

    def _pause_sec(self, attempt: int) -> float:
        """The least of the pause after an attempt."""
        return min(self.backoff_sec * 2 ** min(attempt - 1, 30), MAX_PAUSE_SEC)

    def _pause(self, attempt: int) -> None:
        time.sleep(self._pause_sec(attempt) * (1 + random.random()))

    def _guard(self, verb: str, work: Callable, *names: str):
        start = time.monotonic()
        for attempt in itertools.count(1):
            try:
                result = work()
                self._silent_since = None
                return result
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (drivers raise their own kinds; all become a sentence)
                if self._tries_again(error, attempt, start):
                    self._pause(attempt)
                    continue
                where = shown(posixpath.join(self.url, *names))
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise UserError(
                        f"{where}: cannot {verb}, the disk is full ({os.strerror(error.errno)}); free space and run the same command again"
                    ) from error
                if isinstance(error, FileNotFoundError):
                    raise UserError(f"{where}: cannot {verb}, there is no such file or folder") from error
                tried = f", tried {attempt} times" if attempt > 1 else ""
                raise UserError(f"{where}: cannot {verb} ({self.reason(error)}{tried})") from error

    def reason(self, error: BaseException) -> str:
        """What went wrong in few words, without credentials."""
        return self._private(reason(error))

    def _private(self, text: str) -> str:
        """A driver's text without the values of storage_options, some of which are keys and tokens."""
        for value in _secrets(self.options):
            text = text.replace(value, "...")
        return text

    def __getstate__(self):  # another process opens its own
        return self.__dict__ | {"_opened": None, "_descriptors": OrderedDict()}

    def __del__(self):
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


def permanent(problem) -> bool:
    """Whether another try cannot help: a kind of PERMANENT, a full disk, or an HTTP status that says so."""
    status = getattr(problem, "status", None)
    # 403 is worth another try: busy servers of files say it to who asks too often. 400 is also aiohttp's word for bytes
    # that are no HTTP.
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (400, 403, 408, 425, 429)
    full = getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return refused or full or isinstance(problem, PERMANENT)


def lost(error: Exception) -> bool:
    """Whether an exception says that the bytes are not there, or no longer readable, rather than not to be had now."""
    response = getattr(error.__cause__, "response", None)  # botocore's, which s3fs translates
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    past_end = 416 in (getattr(error, "status", None), getattr(error, "code", None)) or code in ("416", "InvalidRange")
    return past_end or isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == 5  # EIO: a bad sector


def reason(error: BaseException) -> str:
    """What went wrong in few words, without the credentials of URLs; `Folder.reason` hides those of its options too."""
    if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
        return f"access is denied, check the credentials: {type(error).__name__} {_one_line(error)}".strip()
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) and not str(error):
        return "no answer in time"
    return f"{type(error).__name__}: {_one_line(error)}".rstrip(": ")


def _one_line(error: BaseException) -> str:
    return shown(" ".join(str(error).split()))[:300]


def _secrets(options: Any) -> list[str]:
    """All texts in storage_options that are long enough to be one, but for addresses, which errors must name."""
    if isinstance(options, dict):
        return [text for key, value in options.items() for text in _secrets(value) if not str(key).endswith("url")]
    return [options] if isinstance(options, str) and len(options) >= 6 else []
