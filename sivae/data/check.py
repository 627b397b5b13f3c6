"""`sivae check`: every byte of a packed set against its index.

What is found in shards that `sivae pack` wrote: any byte that differs in an image (its crc32 and that it decodes
at the right size), in a label (compared with the index), in a header (tar's own checksum, and its name, place and
size against the index), in the padding after a member and in the end mark (they must be zeros). Of the .json
with attribution only that it is JSON, as the index has no checksum of it. Without checksums in the index (one made
by `sivae index` from headers) images are only decoded, which a damaged one may survive.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sivae.data.decode import DECODERS
from sivae.data.fit import SMALLEST_LEVEL
from sivae.data.index import Index, NoIndex
from sivae.data.pool import each, interruptible
from sivae.data.tar import BLOCK, Damaged, Member, Members, RangeFile
from sivae.errors import UserError, shown
from sivae.progress import progress_bar
from sivae.storage import Folder

SUFFIXES = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp", "qoi": "qoi"}  # of a member -> its format
MAX_FINDINGS = 100
AHEAD_BYTES = 8 * 2**20
TICK_BYTES = 2**20
DIED = "a process that checks was killed, as a rule because memory ran out; run it again with fewer --workers"


@dataclass
class Findings:
    """What is wrong, one line each: the first MAX_FINDINGS, and the number of all."""

    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: str):
        self.count += 1
        if len(self.lines) < MAX_FINDINGS:
            self.lines.append(" ".join(line.split()))

    def extend(self, other: "Findings"):
        self.lines = (self.lines + other.lines)[:MAX_FINDINGS]
        self.count += other.count


@dataclass(frozen=True)
class Level:
    """A set, or one resolution of a pyramid."""

    label: str  # "" or "64/", before the names of its shards
    folder: Folder  # of its shards
    index: Index


@dataclass
class Report:
    """The result: all is right when findings.count is 0."""

    findings: Findings
    num_images: int
    num_bytes: int
    digest: str  # of the index, of a pyramid that of the full resolution
    has_checksums: bool


def check(
    url, *, split: str = "all", num_workers: int = 0, storage_options: dict | None = None, progress: bool = True
) -> Report:
    """Check a packed set, or all resolutions of a pyramid, at a path or fsspec URL, or one split of it.

    num_workers: processes; 0 works in this one. Raises UserError when there is no index, or one that is no
    index of sivae, damage of it included, and when the storage does not answer.
    """
    folder, findings = Folder(url, storage_options), Findings()
    levels = []
    for name, found in _find(folder):
        index = Index.load(found)
        _beside(found, index, name, findings)
        levels.append(Level(name, index.shard_folder(found), index.split(split, shown(found.url))))
        _try_range(levels[-1])
    first = levels[0].index
    if levels[0].label:  # a pyramid has every power of two down to 4
        there, resolution = {level.index.resolution for level in levels}, first.resolution
        while (resolution := resolution // 2) >= SMALLEST_LEVEL:
            if resolution not in there:
                findings.add(f"{resolution}/index.json: is missing")
    for level in levels[1:]:
        same = level.index.key == first.key and level.index.splits == first.splits
        if not same or not np.array_equal(level.index.label, first.label):
            findings.add(f"{level.label}index.json: other samples, labels or splits than {levels[0].label}index.json")
    jobs = [(i, shard) for i, level in enumerate(levels) for shard in range(len(level.index.shards))]
    num_bytes = sum(shard.size_bytes for level in levels for shard in level.index.shards)
    results = {}
    bar = progress_bar(num_bytes, f"checking {shown(url)}", "B", enabled=progress)
    with interruptible(), bar:
        for job, found in each(check_shard, levels, jobs, num_workers, bar.update, DIED):
            results[job] = found
    for job in jobs:
        findings.extend(results[job])
    count = sum(level.index.count for level in levels)
    return Report(findings, count, num_bytes, first.digest, all(level.index.crc32 is not None for level in levels))


def _find(folder: Folder) -> list[tuple[str, Folder]]:
    """(label, folder) of the set, or of each resolution of a pyramid, the highest first."""
    if folder.size("index.json") is not None:
        return [("", folder)]
    levels = [name for name in folder.names() if name.isdecimal() and folder.size(name, "index.json") is not None]
    if not levels:
        Index.load(folder)  # says that there is none, and what to do
        raise NoIndex(f"there is no packed image set at {shown(folder.url)}")
    return [(f"{name}/", folder.folder(name)) for name in sorted(levels, key=int, reverse=True)]


def _try_range(level: Level):
    """Raises UserError where a server ignores ranges: small shards are checked whole, and training never reads them so."""
    if not level.folder.is_local:
        shard = min(level.index.shards, key=lambda shard: shard.size_bytes)
        size = level.folder.size(shard.name)
        if size is not None:
            RangeFile(level.folder, shard.name, size, BLOCK).at(0, BLOCK)


def _beside(folder: Folder, index: Index, label: str, findings: Findings):
    if index.base:
        return
    try:
        names = folder.names()
    except UserError:  # a web server need not list
        return
    for name in sorted(set(names) - {shard.name for shard in index.shards}):
        if name.endswith(".tar"):
            findings.add(f"{label}{name}: lies beside the index and is not in it")


def check_shard(levels: list[Level], job: tuple[int, int], tick: Callable[[int], None]) -> tuple[tuple, Findings]:
    """What is wrong with one shard; job: (level, shard). Raises UserError when its storage does not answer."""
    check = _Shard(levels[job[0]], job[1], tick)
    check.run()
    return job, check.findings


class _Shard:
    def __init__(self, level: Level, number: int, tick: Callable[[int], None]):
        self.level, self.index, self.tick, self.findings = level, level.index, tick, Findings()
        self.shard = self.index.shards[number]
        first = int(self.index.shard_sizes[:number].sum())
        self.rows = range(first, first + self.shard.count)
        self.told = 0

    def add(self, what: str):
        self.findings.add(f"{self.level.label}{self.shard.name}: {what}")

    def run(self):
        size = self.level.folder.size(self.shard.name)
        if size is None:
            self.add("is missing")
            self.tick(self.shard.size_bytes)
            return
        if size != self.shard.size_bytes:
            self.add(f"has {size:,} bytes where the index says {self.shard.size_bytes:,}")
        self.file = RangeFile(self.level.folder, self.shard.name, size, AHEAD_BYTES)
        by_start = {int(self.index.offset[row]): row for row in self.rows}
        by_key = {self.index.key[row]: row for row in self.rows}
        seen, labelled, whole = set(), set(), False
        try:
            members = Members(self.file.at, size)
            for member in members:
                row = by_start.get(member.start)
                if row is not None:
                    seen.add(row)
                    self._named(member, row)
                    self._image(row)
                elif member.suffix in SUFFIXES:
                    self.add(f"{member.name!r} is not in the index, or not at byte {member.start}")
                elif member.suffix == "cls" and self.index.label is not None and member.key in by_key:
                    labelled.add(by_key[member.key])
                    self._label(member, by_key[member.key])
                elif member.suffix == "json":
                    self._json(member)
                else:
                    self._bytes(member.start, member.stop)
                self._zeros(member.stop, -(-member.stop // BLOCK) * BLOCK, "the padding")
                self._tell(member.stop)
            if size - members.stop < 2 * BLOCK:
                self.add(f"its end mark at byte {members.stop} is cut short")
            whole = True
        except Damaged as error:
            self.add(str(error))
        for row in self.rows:
            if row not in seen:
                if whole:
                    self.add(f"sample {self.index.key[row]} is not at byte {self.index.offset[row]}, as the index says")
                self._image(row)
            elif whole and self.index.label is not None and row not in labelled:
                self.add(f"sample {self.index.key[row]} has no .cls, and the index a label")
        self._tell(self.shard.size_bytes, 0)

    def _named(self, member: Member, row: int):
        key, size = self.index.key[row], int(self.index.size[row])
        if member.key != key or SUFFIXES.get(member.suffix) != self.index.image_format or member.size != size:
            self.add(
                f"{member.name!r} has {member.size:,} bytes at byte {member.start}, where the index has {key!r}, "
                f"{self.index.image_format}, {size:,} bytes"
            )

    def _image(self, row: int):
        index, size, key = self.index, int(self.index.size[row]), self.index.key[row]
        encoded = self.file.at(int(index.offset[row]), size)
        if len(encoded) < size:
            return self.add(f"sample {key} is cut short, {len(encoded):,} of {size:,} bytes are there")
        crc32 = zlib.crc32(encoded)
        if index.crc32 is not None and crc32 != index.crc32[row]:
            return self.add(f"sample {key} is damaged, crc32 {crc32:08x} where {int(index.crc32[row]):08x} was packed")
        try:
            DECODERS[index.image_format](encoded, index.resolution, index.num_channels, f"sample {key}")
        except UserError as error:
            self.add(str(error).partition("; ")[0])

    def _label(self, member: Member, row: int):
        text, label = self.file.at(member.start, min(member.size, 100)), int(self.index.label[row])
        if text.strip() != b"%d" % label:
            self.add(f"{member.name!r} says {text[:20]!r} where the index has the label {label}")

    def _json(self, member: Member):
        if member.size > AHEAD_BYTES:
            return self._bytes(member.start, member.stop)
        try:
            json.loads(self.file.at(member.start, member.size))
        except (ValueError, RecursionError):
            self.add(f"{member.name!r} is no JSON")

    def _zeros(self, start: int, stop: int, what: str):
        for data in self._bytes(start, stop):
            if data.strip(b"\0"):
                self.add(f"{what} from byte {start} on is not zeros")
                return

    def _bytes(self, start: int, stop: int) -> list[bytes]:
        """Read them, however many."""
        return [self.file.at(at, min(AHEAD_BYTES, stop - at)) for at in range(start, stop, AHEAD_BYTES)]

    def _tell(self, position: int, step: int = TICK_BYTES):
        position = min(position, self.shard.size_bytes)
        if position - self.told > step:
            self.tick(position - self.told)
            self.told = position
