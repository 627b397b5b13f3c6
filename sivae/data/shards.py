"""Bytes out of shards: byte ranges of any fsspec URL, retried where a network is between, always checked.

Sequential tar reading loses samples without a word when a shard is cut or a header damaged. Here every
sample is a byte range of the index, and its length and crc32 are checked on every read.
"""

import os
import random
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import fsspec

from sivae.errors import UserError, shown

MAX_OPEN_SHARDS = 64  # file descriptors that one local reader keeps
MAX_GAP_BYTES = 128 * 1024  # reading over a gap this long is cheaper than another request
MAX_MERGED_BYTES = 8 * 1024 * 1024  # bounds what one merged request holds in memory

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


class Storage:
    """The files of one folder, named by any fsspec URL or local path.

    timeout_sec: how long one attempt may take, on transports that are asynchronous (s3, gs, http, abfs).
    retries: further attempts after the first, waiting backoff_sec, then twice that, and so on, each up to
    doubled at random so that many ranks do not come back at once. Local files are read once.
    """

    def __init__(
        self,
        url,
        storage_options: dict | None = None,
        *,
        timeout_sec: float = 30,
        retries: int = 4,
        backoff_sec: float = 0.5,
    ):
        self.url = os.fspath(url)
        self.options = dict(storage_options or {})
        self.timeout_sec, self.retries, self.backoff_sec = timeout_sec, retries, backoff_sec
        self.is_local = fsspec.utils.get_protocol(self.url) in ("file", "local")
        self._opened, self._pid = None, None
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    @property
    def attempts(self) -> int:
        return 1 if self.is_local else self.retries + 1

    @property
    def patience_sec(self) -> float:
        """The longest that one `read` can take before it gives up."""
        return self.attempts * self.timeout_sec + 2 * self.backoff_sec * (2 ** (self.attempts - 1) - 1)

    def read(self, ranges: list, check: Callable) -> tuple[list[bytes], list]:
        """Read the ranges (name, start, stop); start and stop None means the whole file.

        check(i, data) returns what is wrong with the bytes of range i, or None. Returns the bytes of every
        range, and as second the problems that are left: pairs (i, exception or what check said). Wrong
        bytes are asked for again like a failed request, for a proxy or a dying disk can answer anything.
        """
        done: dict[int, bytes] = {}
        problems: dict = dict.fromkeys(range(len(ranges)))
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.backoff_sec * 2 ** (attempt - 1) * (1 + random.random()))
            waiting = list(problems)
            for i, data in zip(waiting, self._fetch([ranges[i] for i in waiting])):
                problems[i] = data if isinstance(data, Exception) else check(i, data)
                if problems[i] is None:
                    done[i] = data
                    del problems[i]
            if not problems or any(isinstance(problem, PERMANENT) for problem in problems.values()):
                break
        return [done.get(i, b"") for i in range(len(ranges))], sorted(problems.items())

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._open()[0]

    def path(self, name: str) -> str:
        """Where a file lies on `fs`."""
        return f"{self._open()[1].rstrip('/')}/{name}"

    def _open(self) -> tuple:
        """The filesystem and the folder's path on it, opened by the process that uses them.

        One opened before a fork shares its sockets and an event loop whose thread is gone: a child opens
        its own, outside fsspec's cache of instances.
        """
        if self._opened is None or self._pid != os.getpid():
            try:
                options = self.options | {"skip_instance_cache": True}
                self._opened, self._pid = fsspec.core.url_to_fs(self.url, **options), os.getpid()
            except (ImportError, ValueError, TypeError) as error:
                raise UserError(
                    f"{shown(self.url)} cannot be opened: {shown(error)}; check the URL and "
                    "data.storage_options, and install what fsspec asks for"
                ) from None
        return self._opened

    def _fetch(self, ranges: list) -> list:
        """Bytes or the exception of each range, from one attempt."""
        if self.is_local:
            return [self._fetch_local(*r) for r in ranges]
        try:
            # One call for all, so that an asynchronous filesystem has them in flight together. `timeout`
            # is fsspec's own argument for waiting on its event loop; the others know none.
            extra = {"timeout": self.timeout_sec} if self.fs.async_impl else {}
            paths, starts, stops = map(list, zip(*((self.path(name), *rest) for name, *rest in ranges)))
            return self.fs.cat_ranges(paths, starts, stops, on_error="return", **extra)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - each transport has its own, and most come and go
            return [error] * len(ranges)

    def _fetch_local(self, name: str, start: int | None, stop: int | None):
        try:
            descriptor = self._descriptor(name)
            if start is None:
                start, stop = 0, os.fstat(descriptor).st_size
            parts = []
            while start < stop and (part := os.pread(descriptor, stop - start, start)):
                parts.append(part)  # a network mount may hand out less than was asked
                start += len(part)
            return b"".join(parts)
        except OSError as error:
            return error

    def _descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            self._descriptors[name] = os.open(self.path(name), os.O_RDONLY)
            if len(self._descriptors) > MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(name)
        return self._descriptors[name]

    def __getstate__(self):  # a worker opens its own
        return self.__dict__ | {"_opened": None, "_descriptors": OrderedDict()}

    def __del__(self):
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


@dataclass
class Range:
    """Bytes [start, stop) of one shard, which hold these samples."""

    shard: int
    start: int
    stop: int
    samples: list[int]


def plan(index, samples: Iterable[int]) -> list[Range]:
    """The ranges to read for some samples, in (shard, offset) order, near neighbours merged."""
    ranges: list[Range] = []
    for sample in sorted({int(s) for s in samples}):  # sample numbers follow (shard, offset): see Index
        shard, start = int(index.shard[sample]), int(index.offset[sample])
        stop, last = start + int(index.size[sample]), ranges[-1] if ranges else None
        near = last and last.shard == shard and start - last.stop <= MAX_GAP_BYTES
        if near and stop - last.start <= MAX_MERGED_BYTES:
            last.stop = stop
            last.samples.append(sample)
        else:
            ranges.append(Range(shard, start, stop, [sample]))
    return ranges


class ShardReader:
    """The encoded bytes of samples, checked against the index."""

    def __init__(self, storage: Storage, index):
        self.storage, self.index = storage, index

    def read(self, samples: Iterable[int]) -> list[bytes]:
        """The encoded bytes of each sample, in the order asked.

        Raises UserError naming shard and sample when bytes stay missing, short or wrong.
        """
        samples = [int(s) for s in samples]
        ranges = plan(self.index, samples)
        requests = [(self.index.shards[r.shard].name, r.start, r.stop) for r in ranges]
        found, problems = self.storage.read(requests, lambda i, data: self._problem(ranges[i], data))
        for i, problem in problems:
            if isinstance(problem, Exception):
                problem = ranges[i].samples[0], self._named(problem)
            sample, what = problem
            tried = f" (tried {self.storage.attempts} times)" if self.storage.attempts > 1 else ""
            where = f"{self.index.name(sample)} at {shown(self.storage.url)}"
            raise UserError(
                f"cannot read {where}: {what}{tried}; copy this shard from its origin again, or pack the set again"
            )
        encoded = {s: self._cut(r, data, s) for r, data in zip(ranges, found) for s in r.samples}
        return [encoded[sample] for sample in samples]

    def _cut(self, r: Range, data: bytes, sample: int) -> bytes:
        start = int(self.index.offset[sample]) - r.start
        return data[start : start + int(self.index.size[sample])]

    def _problem(self, r: Range, data: bytes):
        """The first sample of a range whose bytes are not those packed, as (sample, what), or None."""
        for sample in r.samples:
            encoded, size = self._cut(r, data, sample), int(self.index.size[sample])
            if len(encoded) != size:
                return sample, f"the shard is cut short, {len(encoded)} of the sample's {size} bytes came"
            crc32, expected = zlib.crc32(encoded), int(self.index.crc32[sample])
            if crc32 != expected:
                return sample, f"its bytes are damaged, crc32 {crc32:08x} where {expected:08x} was packed"
        if len(data) != r.stop - r.start:  # a server that ignores ranges sends the whole file
            return r.samples[-1], f"{len(data)} bytes came where {r.stop - r.start} were asked for"
        return None

    @staticmethod
    def _named(error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return "the shard is missing"
        if isinstance(error, PermissionError):
            return "access is denied; check the credentials"
        return f"{type(error).__name__} {shown(error)}".strip()
