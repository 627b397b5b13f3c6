"""The index of a packed set: where each sample lies, and what its bytes must be. One `index.json` beside
the shards, written last, so that a set with an index is whole."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from sivae.data.shards import Storage
from sivae.errors import UserError, shown

FILE_NAME = "index.json"
FORMAT, VERSION = "sivae-shards", 1
IMAGE_FORMATS = ("png",)
MAX_RESOLUTION = 16384  # with the checks of sizes below, bounds what a hostile index makes a reader allocate


@dataclass(frozen=True)
class Shard:
    """One tar: a plain file name beside the index, its bytes, and its number of samples."""

    name: str
    size_bytes: int
    count: int


@dataclass(frozen=True, eq=False)
class Index:
    """A packed set of N square images. Samples are numbered in the order of (shard, offset)."""

    resolution: int  # height and width, in pixels
    num_channels: int  # 1 or 3
    num_classes: int | None  # None: no labels
    image_format: str  # the encoding of every sample, one of IMAGE_FORMATS
    source: str  # where the images came from
    licence: str  # their licence and attribution; "" when the source has none
    shards: tuple[Shard, ...]
    key: list[str]  # [N], unique: the name of each sample inside its tar
    offset: np.ndarray  # int64 [N]: where the encoded image begins in its shard, in bytes
    size: np.ndarray  # int64 [N]: its length, in bytes
    crc32: np.ndarray  # int64 [N]: zlib.crc32 of it
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
        """sha256 of everything in the index, hence of all images: equal digests are equal sets."""
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def name(self, sample: int) -> str:
        """A sample as errors name it."""
        return f"sample {self.key[sample]} of {self.shards[self.shard[sample]].name}"

    @classmethod
    def load(cls, url, storage_options: dict | None = None, **storage_settings) -> "Index":
        """Read and check the index of the set at a URL; storage_settings are those of Storage.

        Raises UserError when there is none, or when any part of it is not as `dump` writes it.
        """
        storage, parsed = Storage(url, storage_options, **storage_settings), []

        def check(_, data: bytes):
            try:
                parsed.append(parse(data, f"{shown(url)}/{FILE_NAME}"))
            except UserError as error:  # may be the transport's fault: let it be read again
                return error
            return None

        _, problems = storage.read([(FILE_NAME, None, None)], check)
        for _, problem in problems:
            if isinstance(problem, (FileNotFoundError, NotADirectoryError)):
                raise UserError(
                    f"there is no packed image set at {shown(url)} (no {FILE_NAME} in it); "
                    "make one with `sivae pack SOURCE DEST --resolution R`"
                )
            if isinstance(problem, UserError):
                raise problem
            raise UserError(
                f"cannot read {shown(url)}/{FILE_NAME}: {type(problem).__name__} {shown(problem)}"
                "; check the URL, the network and the credentials"
            )
        return parsed[-1]

    def dump(self, url, storage_options: dict | None = None):
        """Write the index beside its shards, whole or not at all."""
        storage = Storage(url, storage_options)
        data, path = _canonical(self._content() | {"digest": self.digest}), storage.path(FILE_NAME)
        if storage.is_local:
            storage.fs.pipe_file(f"{path}.tmp", data)
            storage.fs.mv(f"{path}.tmp", path)
        else:
            storage.fs.pipe_file(path, data)  # object stores show an object only once it is complete

    def _content(self) -> dict:
        columns = {"offset": self.offset, "size": self.size, "crc32": self.crc32, "label": self.label}
        samples = {k: None if column is None else column.tolist() for k, column in columns.items()}
        return {
            "format": FORMAT,
            "version": VERSION,
            "image_format": self.image_format,
            "count": self.count,
            "resolution": self.resolution,
            "num_channels": self.num_channels,
            "num_classes": self.num_classes,
            "source": self.source,
            "licence": self.licence,
            "shards": [asdict(shard) for shard in self.shards],
            "samples": {"key": self.key} | samples,
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
        need(all(whole(v, low, high) for v in values), f"{what} must hold whole numbers in {low}..{high}")
        return np.array(values, dtype=np.int64)

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
    _, _, image_format, resolution, num_channels, num_classes, source, licence = fields(
        {k: v for k, v in content.items() if k not in ("count", "shards", "samples", "digest")},
        "format version image_format resolution num_channels num_classes source licence",
        "it",
    )
    count, shards, samples, digest = (content.get(k) for k in ("count", "shards", "samples", "digest"))
    need(image_format in IMAGE_FORMATS, f"image_format must be one of {', '.join(IMAGE_FORMATS)}")
    need(whole(resolution, 1, MAX_RESOLUTION), f"resolution must be in 1..{MAX_RESOLUTION}")
    need(whole(num_channels, 1, 3) and num_channels != 2, "num_channels must be 1 or 3")
    need(num_classes is None or whole(num_classes, 1, 2**31), "num_classes must be null or at least 1")
    need(isinstance(source, str) and isinstance(licence, str), "source and licence must be texts")

    need(isinstance(shards, list) and shards, "there must be shards")
    shards = tuple(Shard(*fields(shard, "name size_bytes count", "each shard")) for shard in shards)
    for shard in shards:  # a plain file name, so that no path leads out of the set
        plain = isinstance(shard.name, str) and re.fullmatch(r"[\w-][\w.-]{0,200}", shard.name, re.ASCII)
        need(plain, f"{shard.name!r} is no plain file name for a shard")
        need(whole(shard.size_bytes, 1, 2**60), f"{shard.name}: size_bytes must be a whole number of bytes")
        need(whole(shard.count, 1, len(data)), f"{shard.name}: count must be at least 1")
    need(len({shard.name for shard in shards}) == len(shards), "two shards have one name")
    need(whole(count, 1, len(data)) and count == sum(s.count for s in shards), "the counts do not add up")

    key, offset, size, crc32, label = fields(samples, "key offset size crc32 label", "samples")
    need(isinstance(key, list) and len(key) == count, f"key must be a list of {count}")
    plain = all(isinstance(k, str) and 0 < len(k) <= 255 and k.isprintable() for k in key)
    need(plain, "a key is no plain text")
    need(len(set(key)) == count, "two samples have one key")
    max_size = 4 * num_channels * resolution**2 + 2**20  # no sane encoding of such an image is longer
    offset, size = column(offset, 0, 2**60, "offset"), column(size, 1, max_size, "size")
    crc32 = column(crc32, 0, 2**32 - 1, "crc32")
    need((label is None) == (num_classes is None), "there must be labels and num_classes, or neither")
    label = label if label is None else column(label, 0, num_classes - 1, "label")

    index = Index(
        resolution, num_channels, num_classes, image_format, source, licence, shards, key, offset, size, crc32, label
    )
    stops, same_shard = offset + size, index.shard[1:] == index.shard[:-1]
    need(not np.any(same_shard & (offset[1:] < stops[:-1])), "samples overlap or are out of order")
    size_bytes = np.array([shard.size_bytes for shard in shards])
    need(np.all(stops <= size_bytes[index.shard]), "a sample ends past its shard")
    need(index.digest == digest, "its digest does not match its content")
    return index
