"""The index of a packed set: where each sample lies, and what its bytes must be. One `index.json` beside
the shards, written last, so that a set with an index is whole."""

import dataclasses
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sivae.errors import UserError, shown
from sivae.storage import Folder

FILE_NAME = "index.json"
COLUMNS = ("offset", "size", "crc32", "label")
FORMAT, VERSION = "sivae-shards", 2
IMAGE_FORMATS = ("png", "qoi", "webp", "jpeg")
SHARD_NAME, SPLIT_NAME = r"[\w-][\w.-]{0,200}", r"[\w-]{1,100}"  # in ASCII: no path leads out of the set
MAX_RESOLUTION = 16384  # with the checks of sizes below, bounds what a hostile index makes a reader allocate


class NoIndex(UserError):
    """There is no index where one was looked for."""


@dataclass(frozen=True)
class Shard:
    """One tar: a plain file name beside the index, its bytes, and its number of samples."""

    name: str
    size_bytes: int
    count: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """A packed set of N square images. Samples are numbered in the order of (shard, offset)."""

    resolution: int  # height and width, in pixels
    num_channels: int  # 1 or 3
    num_classes: int | None  # None: no labels
    image_format: str  # the encoding of every sample, one of IMAGE_FORMATS
    quality: int | None = None  # 0..100 of a lossy encoding; None: lossless, or not known
    crop: str = ""  # how the images were cut to squares; "" when that is not known
    filter: str = ""  # how they were resized: "lanczos", "box", ...; "" when that is not known
    source: str  # where the images came from
    licence: str = ""  # their licence and attribution; "" when the source has none
    splits: dict[str, int]  # split -> samples, in their order: the first so many samples, then the next, ...
    skipped: tuple[str, ...] = ()  # the images that could not be packed, each with the reason
    base: str | None = None  # folder or URL of the shards; None: the index lies beside them
    shards: tuple[Shard, ...]
    key: list[str]  # [N], unique: the name of each sample inside its tar
    offset: np.ndarray  # int64 [N]: where the encoded image begins in its shard, in bytes
    size: np.ndarray  # int64 [N]: its length, in bytes
    crc32: np.ndarray | None  # int64 [N]: zlib.crc32 of it; None in an index made from headers alone
    label: np.ndarray | None  # int64 [N] in [0, num_classes), or None

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard, int64 [number of shards]."""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)

    @cached_property
    def shard(self) -> np.ndarray:
        """The shard of each sample, int64 [N]."""
        return np.repeat(np.arange(len(self.shards)), self.shard_sizes)

    @property
    def count(self) -> int:
        return len(self.key)

    @cached_property
    def digest(self) -> str:
        """sha256 of everything in the index: sets of equal digests have equal images, where the index has checksums."""
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def name(self, sample: int) -> str:
        """A sample as errors name it."""
        return f"sample {self.key[sample]} of {self.shards[self.shard[sample]].name}"

    def split(self, name: str, where: str = "this set") -> "Index":
        """The set that one split is by itself, or for `all` this one. Raises UserError when there is no such split at `where`."""
        if name == "all":
            return self
        if name not in self.splits:
            have = ", ".join(f"{split} ({count:,} images)" for split, count in self.splits.items())
            raise UserError(f"{where}: there is no split {name!r}, it has {have}; or take `all`")
        if len(self.splits) == 1:
            return self
        names = list(self.splits)
        first = sum(self.splits[other] for other in names[: names.index(name)])
        rows = slice(first, first + self.splits[name])
        shards = slice(self.shard[rows.start], self.shard[rows.stop - 1] + 1)

        def cut(column):
            return None if column is None else column[rows]

        return dataclasses.replace(
            self, splits={name: self.splits[name]}, shards=self.shards[shards], key=self.key[rows], offset=cut(self.offset),
            size=cut(self.size), crc32=cut(self.crc32), label=cut(self.label),
        )  # fmt: skip

    def shard_folder(self, folder: Folder) -> Folder:
        """Where the shards lie, for an index that was loaded from `folder`."""
        if self.base is None:
            return folder
        shards = folder.sibling(self.base)
        if shards.is_local and not folder.is_local:
            raise UserError(
                f"the index at {shown(folder.url)} names shards on this machine's disk; a remote index may not"
            )
        return shards

    @classmethod
    def load(cls, folder: Folder) -> "Index":
        """Read and check the index in a folder.

        Raises NoIndex when there is none, and UserError when any part of it is not as `dump` writes it.
        """
        where, parsed = f"{shown(folder.url)}/{FILE_NAME}", []

        def check(_, data: bytes):
            try:
                parsed.append(parse(data, where))
            except UserError as error:  # may be the transport's fault: let it be read again
                return error
            return None

        _, problems = folder.read_ranges([(FILE_NAME, None, None)], check)
        for _, problem in problems:
            if isinstance(problem, (FileNotFoundError, NotADirectoryError)):
                raise NoIndex(
                    f"there is no packed image set at {shown(folder.url)} (no {FILE_NAME} in it); make one with "
                    "`sivae pack SOURCE DEST --resolution R`, or for shards made by others `sivae index URLS`"
                )
            if isinstance(problem, UserError):
                raise problem
            raise UserError(
                f"cannot read {where}: {folder.reason(problem)}; check the URL, the network and the credentials"
            )
        return parsed[-1]

    def dump(self, folder: Folder):
        """Write the index beside its shards, whole or not at all."""
        folder.write(_canonical(self._content() | {"base": self.base, "digest": self.digest}), FILE_NAME)

    def _content(self) -> dict:
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        columns = {name: settings.pop(name) for name in ("key", *COLUMNS)}
        del settings["base"]  # the same set, wherever its shards lie
        return settings | {
            "format": FORMAT,
            "version": VERSION,
            "count": self.count,
            "splits": list(self.splits.items()),  # their order counts, and JSON objects have none
            "skipped": list(self.skipped),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "samples": {
                k: column.tolist() if isinstance(column, np.ndarray) else column for k, column in columns.items()
            },
        }


def _canonical(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def parse(data: bytes, where: str) -> Index:
    """The index in the bytes of an `index.json`; `where` names it in errors. Nothing in it is trusted."""

    def need(ok, what: str):
        if not ok:
            raise UserError(f"{where} is damaged: {what}; copy or pack the set again")

    def fields(value, names: str, what: str) -> list:
        names = names.split()
        need(isinstance(value, dict) and set(value) == set(names), f"{what} must have the fields {names}")
        return [value[name] for name in names]

    def whole(value, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high  # type, as True is an int

    def column(values, low: int, high: int, what: str) -> np.ndarray:
        need(isinstance(values, list) and len(values) == count, f"{what} must be a list of {count}")
        fits = set(map(type, values)) == {int} and low <= min(values) and max(values) <= high
        need(fits, f"{what} must hold whole numbers in {low}..{high}")
        return np.array(values, dtype=np.int64)

    def texts(values, longest: int) -> bool:
        return isinstance(values, list) and all(isinstance(v, str) and 0 < len(v) <= longest for v in values)

    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        need(False, f"not JSON ({error})")
    need(isinstance(content, dict) and content.get("format") == FORMAT, "not an index of sivae")
    if content.get("version") != VERSION:
        raise UserError(
            f"{where} has version {content.get('version')!r} and this sivae reads {VERSION}: "
            "use the sivae that packed it, or pack it again"
        )
    names = "resolution num_channels num_classes image_format quality crop filter source licence skipped base"
    names, others = names.split(), ("format", "version", "count", "splits", "shards", "samples", "digest")
    settings = dict(zip(names, fields({k: v for k, v in content.items() if k not in others}, " ".join(names), "it")))
    count, splits, shards, samples, digest = (content.get(k) for k in others[2:])
    resolution, num_channels, num_classes = (settings[name] for name in names[:3])
    formats = settings["image_format"] in IMAGE_FORMATS  # a list is not: it has no hash, and `in` compares
    need(formats, f"image_format must be one of {', '.join(IMAGE_FORMATS)}")
    need(whole(resolution, 1, MAX_RESOLUTION), f"resolution must be in 1..{MAX_RESOLUTION}")
    need(whole(num_channels, 1, 3) and num_channels != 2, "num_channels must be 1 or 3")
    need(num_classes is None or whole(num_classes, 1, 2**31), "num_classes must be null or at least 1")
    need(settings["quality"] is None or whole(settings["quality"], 0, 100), "quality must be null or in 0..100")
    for name in ("crop", "filter", "source", "licence"):
        need(isinstance(settings[name], str), f"{name} must be a text")
    need(texts(settings["skipped"], 10_000), "skipped must be a list of texts")
    settings["skipped"] = tuple(settings["skipped"])
    need(settings["base"] is None or texts([settings["base"]], 4096), "base must be null or a URL")

    need(isinstance(shards, list) and shards, "there must be shards")
    shards = tuple(Shard(*fields(shard, "name size_bytes count", "each shard")) for shard in shards)
    for shard in shards:  # a plain file name, so that no path leads out of the set
        plain = isinstance(shard.name, str) and re.fullmatch(SHARD_NAME, shard.name, re.ASCII)
        need(plain, f"{shard.name!r} is no plain file name for a shard")
        need(whole(shard.size_bytes, 1, 2**60), f"{shard.name}: size_bytes must be a whole number of bytes")
        need(whole(shard.count, 1, len(data)), f"{shard.name}: count must be at least 1")
    need(len({shard.name for shard in shards}) == len(shards), "two shards have one name")
    need(whole(count, 1, len(data)) and count == sum(s.count for s in shards), "the counts do not add up")

    ok = isinstance(splits, list) and splits and all(isinstance(pair, list) and len(pair) == 2 for pair in splits)
    need(ok, "splits must be pairs of a name and a count")
    for name, split_count in splits:
        need(isinstance(name, str) and re.fullmatch(SPLIT_NAME, name, re.ASCII), f"{name!r} is no name of a split")
        need(name != "all" and whole(split_count, 1, count), f"split {name} must have 1 to {count} samples")
    need(len({name for name, _ in splits}) == len(splits), "two splits have one name")
    shard_ends = set(itertools.accumulate(shard.count for shard in shards))
    ends = list(itertools.accumulate(split_count for _, split_count in splits))
    need(ends[-1] == count and shard_ends.issuperset(ends), "the splits do not part the shards")

    key, offset, size, crc32, label = fields(samples, "key offset size crc32 label", "samples")
    need(isinstance(key, list) and len(key) == count, f"key must be a list of {count}")
    need(texts(key, 255) and all(map(str.isprintable, key)), "a key is no plain text")
    need(len(set(key)) == count, "two samples have one key")
    max_size = 4 * num_channels * resolution**2 + 2**20  # no sane encoding of such an image is longer
    offset, size = column(offset, 0, 2**60, "offset"), column(size, 1, max_size, "size")
    crc32 = crc32 if crc32 is None else column(crc32, 0, 2**32 - 1, "crc32")
    need((label is None) == (num_classes is None), "there must be labels and num_classes, or neither")
    label = label if label is None else column(label, 0, num_classes - 1, "label")

    index = Index(
        **settings, splits=dict(splits), shards=shards, key=key, offset=offset, size=size, crc32=crc32, label=label
    )
    stops, same_shard = offset + size, index.shard[1:] == index.shard[:-1]
    need(not np.any(same_shard & (offset[1:] < stops[:-1])), "samples overlap or are out of order")
    size_bytes = np.array([shard.size_bytes for shard in shards])
    need(np.all(stops <= size_bytes[index.shard]), "a sample ends past its shard")
    need(index.digest == digest, "its digest does not match its content")
    return index
