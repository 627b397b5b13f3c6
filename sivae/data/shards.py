"""Bytes out of shards: byte ranges of any fsspec URL, retried where a network is between, always checked.

Sequential tar reading loses samples without a word when a shard is cut or a header damaged. Here every
sample is a byte range of the index, and its length and crc32 are checked on every read.

Large samples are read one by one, as they are needed. Where samples are small a request costs more than its
bytes, so neighbours are read together: near ones in one range, and where the bytes can be kept until the rest
of them is needed (in the cache of the node, or in memory when few shards are mixed at a time) whole blocks of
about a mebibyte.
"""

import hashlib
import json
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from sivae.data.cache import BlockCache
from sivae.errors import UserError, shown
from sivae.storage import Folder, lost, permanent, reason

BLOCK_BYTES = 2**20  # samples are kept together in blocks of about this size; a larger sample is a block by itself
MAX_GAP_BYTES = 128 * 1024  # reading over a gap this long is cheaper than another request
MAX_MERGED_BYTES = 8 * 1024 * 1024  # bounds what one merged request holds in memory
MEMORY_BYTES = 256 * 2**20  # of blocks that one reader keeps when there is no cache
SEAL_BYTES = 4  # after a block in the cache, a crc32 where the index has none
POLL_SEC = 0.02  # between looks at a block that another process of the node is fetching


class Corrupt(UserError):
    """What lies in storage is not the sample that was packed, and reading it again does not help."""


@dataclass
class Range:
    """Bytes [start, stop) of one shard, which hold these samples."""

    shard: int
    start: int
    stop: int
    samples: list[int]


@dataclass
class Damage:
    """What came for a range, and what is wrong with some of its samples."""

    data: bytes
    samples: dict[int, str]
    short: bool = False  # some of their bytes did not come


def too_much(what: str, num_bytes: int, asked: int) -> UserError | None:
    """What to say, when trying again has not helped, where more bytes came than were asked for; None where not."""
    if num_bytes <= asked:
        return None
    return UserError(
        f"{what} cannot be read: the server ignores ranges ({num_bytes} bytes came where {asked} were asked for); "
        "use one that answers them, or copy the set to a disk"
    )


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


def block_starts(index) -> np.ndarray:
    """The first sample of every block, int64: a block is a run of samples that begin in the same mebibyte of a shard."""
    place = index.offset // BLOCK_BYTES
    first = np.flatnonzero((np.diff(index.shard) != 0) | (np.diff(place) != 0)) + 1
    return np.concatenate([[0], first])


class ShardReader:
    """The encoded bytes of samples, checked against the index.

    cache: shared by the processes of a node; None keeps nothing on disk. mixed_shards: how many shards the order of
    reading mixes at a time, which says whether blocks in memory are still there when they are needed again.
    """

    def __init__(self, folder: Folder, index, cache: BlockCache | None = None, mixed_shards: int = 8):
        self.folder, self.index, self.cache = folder, index, cache
        sizes = [shard.size_bytes for shard in index.shards]
        mixed_bytes = min(sum(sizes), mixed_shards * sum(sizes) / len(sizes))
        self.starts = block_starts(index)
        if cache is None:
            pays = mixed_bytes <= MEMORY_BYTES
        else:  # a block that is gone again when the next of its samples is wanted is read whole for one
            gone = 1 - min(1, cache.limit_bytes / mixed_bytes)
            pays = gone * index.count <= len(self.starts)
        self.in_blocks = not folder.is_local and pays
        self.memory: OrderedDict[int, bytes] = OrderedDict()
        self.memory_bytes = 0
        self.corrupt: dict[int, Corrupt] = {}  # once found, a sample is not tried again by this reader
        self.lock = threading.Lock()  # one thread reads ahead while another may want other samples

    @property
    def patience_sec(self) -> float:
        """The longest that storage can hold up one `read`: others of the node are waited for, then it is asked itself."""
        return self.folder.patience_sec + (self.folder.timeout_sec if self.cache is not None else 0)

    def read(self, samples: Iterable[int]) -> list[bytes | Corrupt]:
        """The encoded bytes of each sample, in the order asked; for those that are damaged in storage, what is wrong.

        Raises UserError naming shard and sample when storage does not answer as it should.
        """
        with self.lock:
            samples = [int(s) for s in samples]
            wanted = {s for s in samples if s not in self.corrupt}
            encoded = self._read_blocks(wanted) if self.in_blocks else self._fetch(plan(self.index, wanted))
            return [encoded[s] if s in encoded else self.corrupt[s] for s in samples]

    # Blocks

    def _read_blocks(self, wanted: set[int]) -> dict[int, bytes]:
        encoded: dict[int, bytes] = {}
        missing: dict[int, Range] = {}
        for block in sorted({int(np.searchsorted(self.starts, s, side="right")) - 1 for s in wanted}):
            r = self._block(block)
            data = self._kept(block, r, wanted)
            if data is None:
                missing[block] = r
            else:
                encoded |= {s: self._cut(r, data, s) for s in r.samples if s in wanted}
        deadline = time.monotonic() + self.folder.timeout_sec
        while missing:
            # Each block is fetched by one process of the node; the others find it in the cache soon. They do not wait for ever.
            impatient = time.monotonic() > deadline
            claimed = [b for b in missing if self.cache is None or self.cache.claim(self._key(missing[b])) or impatient]
            try:
                encoded |= self._fetch_blocks({b: missing.pop(b) for b in claimed}, wanted)
            finally:
                if self.cache is not None:
                    self.cache.release()
            if missing and not claimed:
                time.sleep(POLL_SEC)
        return encoded

    def _fetch_blocks(self, blocks: dict[int, Range], wanted: set[int]) -> dict[int, bytes]:
        encoded: dict[int, bytes] = {}
        if self.cache is not None:  # what another process has put there meanwhile
            for block, r in list(blocks.items()):
                if (data := self._kept(block, r, wanted)) is not None:
                    encoded |= {s: self._cut(r, data, s) for s in r.samples if s in wanted}
                    del blocks[block]
        found = self._fetch(list(blocks.values()))
        for block, r in blocks.items():
            self._keep(block, r, found)
        return encoded | {s: data for s, data in found.items() if s in wanted}

    def _block(self, block: int) -> Range:
        first = int(self.starts[block])
        last = (int(self.starts[block + 1]) if block + 1 < len(self.starts) else self.index.count) - 1
        stop = int(self.index.offset[last] + self.index.size[last])
        return Range(int(self.index.shard[first]), int(self.index.offset[first]), stop, list(range(first, last + 1)))

    def _kept(self, block: int, r: Range, wanted: set[int]) -> bytes | None:
        """A block that is here already, whose wanted samples are as they were packed."""
        if self.cache is None:
            if block in self.memory:
                self.memory.move_to_end(block)
            return self.memory.get(block)
        key = self._key(r)
        data = self.cache.get(key)
        if data is None:
            return None
        good = True
        if self.index.crc32 is None:
            data, seal = data[:-SEAL_BYTES], data[-SEAL_BYTES:]
            good = _seal(key, data) == seal
        asked = Range(r.shard, r.start, r.stop, [s for s in r.samples if s in wanted])
        if good and self._problem(asked, data) is None:
            return data
        self.cache.drop(key)  # a bad disk is no reason to stop
        return None

    def _keep(self, block: int, r: Range, found: dict[int, bytes]) -> None:
        data = bytearray(r.stop - r.start)  # what lies between samples (tar headers) is nobody's business
        for s in found.keys() & r.samples:  # a damaged one is on record, and not asked for again
            start = int(self.index.offset[s]) - r.start
            data[start : start + len(found[s])] = found[s]
        if self.cache is not None:
            key, sealed = self._key(r), self.index.crc32 is None
            if not sealed:
                self.cache.put(key, data)
            elif found.keys() >= set(r.samples):  # nothing would tell the next reader that one is damaged
                self.cache.put(key, data + _seal(key, data))
        elif len(r.samples) > 1:  # a block of one sample is not wanted again before the next epoch
            self.memory[block] = bytes(data)
            self.memory_bytes += len(data)
            while self.memory_bytes > MEMORY_BYTES:
                self.memory_bytes -= len(self.memory.popitem(last=False)[1])

    def _key(self, r: Range) -> str:
        """The name of a block in the cache: of where it comes from and of what must be in it."""
        shard, rows = self.index.shards[r.shard], slice(r.samples[0], r.samples[-1] + 1)
        checks = self.index.size if self.index.crc32 is None else self.index.crc32
        told = [self.folder.url, shard.name, shard.size_bytes, r.start, r.stop, checks[rows].tolist()]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()

    # Storage

    def _fetch(self, ranges: list[Range]) -> dict[int, bytes]:
        """The bytes of all samples of the ranges; the damaged ones are put on record instead.

        Raises UserError for what is no damage but a failure.
        """
        if not ranges:
            return {}
        requests = [(self.index.shards[r.shard].name, r.start, r.stop) for r in ranges]
        found, problems = self.folder.read_ranges(requests, lambda i, data: self._problem(ranges[i], data))
        encoded: dict[int, bytes] = {}
        problems = dict(problems)
        for i, (r, data) in enumerate(zip(ranges, found)):
            damage = problems.get(i)
            once = permanent(damage) or self.folder.attempts == 1
            tried = "" if once else f" (tried {self.folder.attempts} times)"
            if isinstance(damage, UserError):
                raise damage
            if isinstance(damage, Exception):
                if not lost(damage):
                    if not once and self.folder.outage_sec:
                        tried = f" (tried for {self.folder.outage_sec:g} s)"
                    raise self._error(UserError, r.samples[0], self.folder.reason(damage), tried)
                damage = Damage(b"", dict.fromkeys(r.samples, said(damage)))
            if damage is not None:
                if damage.short and self._is_whole(r.shard):
                    what = "the answers are cut short, though the shard is whole there"
                    raise self._error(UserError, min(damage.samples), what, tried)
                for sample, what in damage.samples.items():
                    self.corrupt[sample] = self._error(Corrupt, sample, what, tried)
                data = damage.data
            encoded |= {s: self._cut(r, data, s) for s in r.samples if s not in self.corrupt}
        return encoded

    def _cut(self, r: Range, data: bytes, sample: int) -> bytes:
        start = int(self.index.offset[sample]) - r.start
        return data[start : start + int(self.index.size[sample])]

    def _problem(self, r: Range, data: bytes) -> Damage | UserError | None:
        """What is wrong with the bytes of a range; None when each sample is as it was packed."""
        if error := too_much(self._where(r.samples[0]), len(data), r.stop - r.start):
            return error
        wrong: dict[int, str] = {}
        short = False
        for sample in r.samples:
            encoded, size = self._cut(r, data, sample), int(self.index.size[sample])
            if sample in self.corrupt:
                continue
            if len(encoded) != size:
                short = True
                wrong[sample] = f"the shard is cut short, {len(encoded)} of the sample's {size} bytes came"
            elif self.index.crc32 is not None:
                crc32, expected = crc32_function()(encoded), int(self.index.crc32[sample])
                if crc32 != expected:
                    wrong[sample] = f"its bytes are damaged, crc32 {crc32:08x} where {expected:08x} was packed"
        return Damage(data, wrong, short) if wrong else None

    def _is_whole(self, shard: int) -> bool:
        """Whether a remote shard has its full length, so that what is missing got lost on the way."""
        name, size_bytes = self.index.shards[shard].name, self.index.shards[shard].size_bytes
        return not self.folder.is_local and self.folder.size(name) == size_bytes

    def _error(self, kind: type[UserError], sample: int, what: str, tried: str) -> UserError:
        advice = "copy this shard from its origin again, or pack the set again"
        if kind is not Corrupt:
            advice = "check the network, the server and the credentials, and run again"
        return kind(f"cannot read {self._where(sample)}: {what}{tried}; {advice}")

    def _where(self, sample: int) -> str:
        return f"{self.index.name(sample)} at {shown(self.folder.url)}"

    def __getstate__(self):  # each process has its own
        return self.__dict__ | {"lock": None}

    def __setstate__(self, state):
        self.__dict__ = state
        self.lock = threading.Lock()


def said(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the shard is missing"
    return reason(error) if getattr(error, "errno", None) == 5 else "the shard is cut short"


def _seal(key: str, data: bytes) -> bytes:
    return zlib.crc32(data, zlib.crc32(key.encode())).to_bytes(SEAL_BYTES, "little")


@cache
def crc32_function() -> Callable[[bytes], int]:
    """libdeflate's crc32 where imagecodecs brings it, which takes a tenth of the time of zlib's."""
    try:
        from imagecodecs import DEFLATE, deflate_crc32
    except ImportError:
        return zlib.crc32
    return deflate_crc32 if DEFLATE.available else zlib.crc32
