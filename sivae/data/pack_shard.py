"""One shard of a set: read the images, fit and encode them, write the tar at every resolution, leave a record.

The unit of packing's work, in whichever process. The record is written last and tells a later run that the
shard is done.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
from webdataset import TarWriter

from sivae.data.encode import SUFFIXES, encode
from sivae.data.fit import crop_box, fit, pyramid
from sivae.data.scratch import Scratch
from sivae.data.sources.base import BadImage, Sample, Source
from sivae.data.tar import Members
from sivae.errors import UserError, shown
from sivae.storage import Folder, reason

FOLDER = ".packing"  # in the destination, until the set is whole
COLUMNS = ("offset", "size", "crc32")
MAX_REASON = 1000  # letters of what the index says about a skipped image


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of a set, besides its source."""

    levels: tuple[int, ...]  # resolutions, the full one first; more than one is a pyramid
    num_channels: int
    any_colour: bool  # whether colour images may become grey
    num_classes: int | None
    image_format: str
    quality: int | None
    crop: str
    filter: str

    def folder(self, dest: Folder, level: int) -> Folder:
        return dest if len(self.levels) == 1 else dest.folder(str(level))


@dataclass(frozen=True)
class Job:
    """One shard to make: the numbers of its samples in the source, int64."""

    name: str  # without .tar
    numbers: np.ndarray

    @property
    def tar(self) -> str:
        return f"{self.name}.tar"


@dataclass(frozen=True)
class Shared:
    """What all jobs of a run have in common."""

    source: Source
    recipe: Recipe
    dest: Folder
    scratch: Scratch
    plan_id: str
    skip_bad: bool


@dataclass
class Level:
    """A shard at one resolution: its bytes, and where each image lies."""

    size_bytes: int = 0
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)


@dataclass
class Record:
    """What is known of a finished shard; without keys there is no tar, as none of its images could be read."""

    plan_id: str
    key: list[str]
    label: list[int] | None
    skipped: list[str]
    num_enlarged: int
    levels: dict[int, Level]

    def dump(self, dest: Folder, name: str):
        dest.write(json.dumps(asdict(self), separators=(",", ":")).encode(), FOLDER, f"{name}.json")

    @classmethod
    def load(cls, shared: Shared, name: str) -> "Record | None":
        """The record of a shard that has one, when it is right and the shard lies whole in its place, else None."""
        try:
            content = json.loads(shared.dest.read(FOLDER, f"{name}.json"))
            levels = {int(level): Level(**found) for level, found in content.pop("levels").items()}
            record = cls(**content, levels=levels)
        except (ValueError, TypeError, AttributeError, KeyError):  # not what `dump` writes: make the shard again
            return None
        if record.plan_id != shared.plan_id or set(levels) != set(shared.recipe.levels):
            return None
        if record.skipped and not shared.skip_bad:
            return None
        for level, found in levels.items():
            folder = shared.recipe.folder(shared.dest, level)
            if record.key and folder.size(f"{name}.tar") != found.size_bytes:
                return None
        return record


def make_shard(shared: Shared, job: Job, tick: Callable[[int], None]) -> tuple[str, Record]:
    """Write one shard and its record. Raises UserError as `pack` does; what was not finished leaves nothing."""
    recipe = shared.recipe
    record = Record(shared.plan_id, [], [], [], 0, {level: Level() for level in recipe.levels})
    try:  # outside, as leaving the stack closes files, which is when a full disk is told of again
        with contextlib.ExitStack() as stack:
            files = {level: stack.enter_context(shared.scratch.file(f"{level}-{job.name}")) for level in recipe.levels}
            tars = {level: stack.enter_context(_writer(file)) for level, (file, _) in files.items()}
            for number in job.numbers.tolist():
                made = read_sample(shared, number, record)
                if made is not None:
                    _add(shared, tars, f"{number:08d}", *made, record)
                tick(1)
            if record.key:
                for level, (file, path) in files.items():
                    tars[level].close()
                    _finish(file, record.levels[level], record.key, recipe)
                    recipe.folder(shared.dest, level).upload(path, job.tar)
    except OSError as error:
        elsewhere = "" if shared.dest.is_local else ", or set TMPDIR to a larger disk"
        raise UserError(
            f"{shown(shared.scratch.path)}: cannot write a shard there ({error.strerror or reason(error)}); "
            f"free space or repair it{elsewhere}, and run the same command again"
        ) from error
    if recipe.num_classes is None:
        record.label = None
    record.dump(shared.dest, job.name)
    return job.name, record


def read_sample(shared: Shared, number: int, record: Record | None = None) -> tuple[Sample, np.ndarray, bytes] | None:
    """(sample, its pixels uint8 [R, R, C] as they are packed, their encoding), or None for an image to skip.

    Raises BadImage when images are not skipped, and UserError when a sample does not fit the rest.
    """
    recipe = shared.recipe
    resolution, channels = recipe.levels[0], recipe.num_channels
    try:
        sample = shared.source[number]
        pixels = sample.pixels
        if not recipe.any_colour and pixels.shape[2] > channels:
            raise UserError(
                f"{sample.name} is in colour, and the first image is grey; say which is right with --num-channels 3 or 1"
            )
        if recipe.num_classes is not None and not (sample.label is not None and 0 <= sample.label < recipe.num_classes):
            raise UserError(
                f"{sample.name} has the label {sample.label}, and the source has {recipe.num_classes} classes; "
                "repair it, or pack without labels"
            )
        as_it_is = pixels.shape == (resolution, resolution, channels) and recipe.crop in ("center", "none")
        if not as_it_is:
            height, width = pixels.shape[:2]
            left, _, right, _ = crop_box(width, height, recipe.crop, sample.name)
            if record is not None and right - left < resolution:
                record.num_enlarged += 1
            picture = fit(pixels, resolution, channels, recipe.crop, recipe.filter, sample.name)
            pixels = np.asarray(picture).reshape(resolution, resolution, channels)
    except BadImage as error:
        if not shared.skip_bad:
            raise BadImage(f"{error} (--skip-bad leaves such images out)") from None
        if record is not None:
            record.skipped.append(_told(shared.source, number, error))
        return None
    if as_it_is and recipe.image_format == "png" and _fits(sample.encoded, pixels.shape):
        return sample, pixels, sample.encoded
    return sample, pixels, encode(pixels, recipe.image_format, recipe.quality)


def _told(source: Source, number: int, error: BadImage) -> str:
    """A skipped image as the index lists it, "name: reason", without folders of this machine and advice."""
    reason, names = str(error).partition("; ")[0], getattr(source, "names", None)
    name = f"sample {number}" if names is None else str(names[number])
    if names is not None and name in reason:
        reason = reason.rpartition(name)[2].strip()
    reason = re.sub(r"[^\s'\"(]*/(?=[^/\s])", "", reason)
    return f"{name}: {reason}"[:MAX_REASON]


def _fits(encoded: bytes | None, shape: tuple[int, int, int]) -> bool:
    """Whether a source's own PNG is one that the set's reader takes: longer ones are full of other things."""
    return encoded is not None and len(encoded) <= 4 * math.prod(shape) + 2**16


def _writer(file) -> TarWriter:
    # mtime and owner are fixed: the bytes of a set depend on its images alone
    return TarWriter(file, encoder=False, compress=False, mtime=0, user="sivae", group="sivae")


def _add(shared: Shared, tars: dict, key: str, sample: Sample, pixels: np.ndarray, encoded: bytes, record: Record):
    recipe, members = shared.recipe, {"__key__": key}
    if recipe.num_classes is not None:
        members["cls"] = str(sample.label).encode()
        record.label.append(int(sample.label))
    if sample.metadata is not None:
        members["json"] = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False).encode()
    record.key.append(key)
    for level, image in zip(recipe.levels, pyramid(pixels, len(recipe.levels))):
        if level != recipe.levels[0]:
            encoded = encode(image, recipe.image_format, recipe.quality)
        tars[level].write(members | {SUFFIXES[recipe.image_format]: encoded})
        record.levels[level].crc32.append(zlib.crc32(encoded))


def _finish(file, level: Level, keys: list[str], recipe: Recipe):
    """Get the tar onto the disk, and find where its images lie by reading it as any tar reader does."""
    file.flush()
    os.fsync(file.fileno())
    level.size_bytes = os.fstat(file.fileno()).st_size
    for member in Members(lambda start, size: os.pread(file.fileno(), size, start), level.size_bytes):
        if member.suffix == SUFFIXES[recipe.image_format]:
            assert member.key == keys[len(level.offset)], member
            level.offset.append(member.start)
            level.size.append(member.size)
    assert len(level.offset) == len(keys) == len(level.crc32), level


def sizes(shared: Shared, numbers: np.ndarray) -> Iterator[int]:
    """Bytes that some samples take in a tar at full resolution; what is unreadable and skipped has none."""
    for number in numbers.tolist():
        made = read_sample(shared, number)
        if made is not None:
            sample, _, encoded = made
            small = (sample.label is not None) + (sample.metadata is not None)
            yield 512 + -(-len(encoded) // 512) * 512 + 1024 * small


def plan_id(plan: dict) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
