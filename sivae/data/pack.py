"""Packing a set once, so that training only ever streams it: tars that webdataset reads, and the index.

Which samples go into which shard is decided before anything is encoded, so that shards can be made by many
processes, in any order, and again after a kill: the same source and settings give the same bytes, hence the
same digest. While it runs, DEST/.packing holds the plan, and a record of every shard that is done.
"""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict

import numpy as np

from sivae.data.encode import check_format
from sivae.data.fit import check_fit, fit, pyramid_levels
from sivae.data.index import FILE_NAME, MAX_RESOLUTION, Index, Shard
from sivae.data.names import write_names
from sivae.data.pack_shard import FOLDER, Job, Recipe, Record, Shared, make_shard, plan_id, sizes
from sivae.data.pool import each, interruptible
from sivae.data.scratch import Scratch
from sivae.data.sources import DRAWN, open_source
from sivae.data.splits import assign
from sivae.errors import UserError, shown
from sivae.progress import progress_bar
from sivae.storage import Folder

__all__ = ["fit", "pack", "pack_once"]
logger = logging.getLogger(__name__)
PLAN, VERSION = "plan.json", 1
NUM_PROBES = 16  # images encoded to estimate how many fill a shard
DIED = (
    "a process that packs was killed, as a rule because memory ran out; run the same command again with fewer --workers "
    "(what is finished is kept)"
)


def pack(
    source,
    dest,
    *,
    resolution: int,
    num_channels: int | None = None,
    labels: bool | None = None,
    image_format: str = "png",
    quality: int | None = None,
    crop: str = "center",
    filter: str = "lanczos",
    samples_per_shard: int | None = None,
    shard_size_bytes: int = 256 * 2**20,
    splits: str | None = None,
    pyramid: bool = False,
    skip_bad: bool = False,
    verify: str | None = None,
    licence: str | None = None,
    num_workers: int = 0,
    storage_options: dict | None = None,
    source_options: dict | None = None,
    progress: bool = True,
) -> Index:
    """Pack a source (see `sources`) into shards and an index at `dest`, a local folder or any fsspec URL.

    Images are cut to squares (crop: see `fit.crop_box`), resized with the filter to resolution x resolution,
    and encoded (image_format and quality: see `encode`). num_channels: 1 or 3; None takes what the first image
    has. labels: None takes those the source has, True asks for them, False leaves them out.

    A shard holds samples_per_shard images or about shard_size_bytes, and samples of one split (splits: see
    `splits.assign`); the shards of a split differ by one sample at most. pyramid: one set for each power of two
    from the resolution down to 4, dest/RESOLUTION, each pixel the average of a square of the full resolution;
    a sample has the same number, and lies in the same shard, in all of them.

    skip_bad: leave out images that cannot be read, and list them in the index; otherwise the first stops it.
    verify: "file" or "pixels", see `open_source`. licence: recorded in the index, None takes what the source
    says. num_workers: processes, 0 packs in this one (with more, a script needs its `if __name__ ==
    "__main__"`). storage_options and source_options: fsspec's, for dest and for source.

    Returns the index, of a pyramid that of the full resolution. Killed and called again it makes what is
    missing. Raises UserError: a setting or a source that cannot be packed, an unreadable image (with its
    path), a destination that holds a set already or was begun with other settings; KeyboardInterrupt on
    Ctrl-C and SIGTERM.
    """
    if not 1 <= resolution <= MAX_RESOLUTION or num_channels not in (None, 1, 3):
        raise UserError(
            f"cannot pack at resolution {resolution} with num_channels {num_channels}; give a "
            f"resolution in 1..{MAX_RESOLUTION} and 1 or 3 channels"
        )
    if (samples_per_shard is not None and samples_per_shard < 1) or shard_size_bytes < 1 or num_workers < 0:
        raise UserError(
            f"samples_per_shard {samples_per_shard} and shard_size_bytes {shard_size_bytes} must be at least 1, "
            f"and num_workers {num_workers} at least 0"
        )
    check_fit(crop, filter)
    quality = check_format(image_format, quality, resolution)
    levels = pyramid_levels(resolution) if pyramid else (resolution,)
    folder = Folder(dest, storage_options)
    refuse_source(folder, source)
    refuse_finished(folder, levels)
    images = open_source(source, resolution=resolution, labels=labels, storage_options=source_options, verify=verify)
    recipe = Recipe(
        levels=levels,
        num_channels=num_channels or images.num_channels,
        any_colour=num_channels is not None,
        num_classes=images.num_classes,
        image_format=image_format,
        quality=quality,
        crop=crop,
        filter=filter,
    )
    numbers = assign(images, splits)
    scratch = Scratch(folder.join(FOLDER)) if folder.is_local else Scratch.for_uploads()
    settings = asdict(recipe) | {
        "levels": list(levels),
        "samples_per_shard": samples_per_shard,
        "shard_size_bytes": None if samples_per_shard else shard_size_bytes,
        "splits": splits,
        "num_images": len(images),
        "source": images.fingerprint,
    }
    if folder.url.startswith("memory:"):  # of this process alone
        num_workers = 0
    with interruptible():
        scratch.sweep()
        records: dict[str, Record] = {}
        plan, jobs = _plan(Shared(images, recipe, folder, scratch, "", skip_bad), settings, numbers)
        shared = Shared(images, recipe, folder, scratch, plan_id(plan), skip_bad)
        try:
            records = _make(shared, jobs, num_workers, progress, f"packing {shown(source)}")
            for level in reversed(levels):  # the full resolution last: it says that all is there
                index = _index(shared, jobs, records, level, numbers, licence)
                if getattr(images, "names", None):
                    write_names(recipe.folder(folder, level), index, images.names)
                index.dump(recipe.folder(folder, level))
        except UserError:
            done = recipe.folder(folder, levels[0])
            if done.size(FILE_NAME) is None:
                raise
            index = Index.load(done)  # another process did the same, and was faster
        finally:
            scratch.sweep()
        clear(folder)
    enlarged = sum(record.num_enlarged for record in records.values())
    if enlarged:
        logger.warning(
            "%d images are smaller than %d pixels once they are cut, and were enlarged", enlarged, resolution
        )
    return index


def refuse_source(folder: Folder, source):
    """Raises UserError when the destination is the source, whose files would lie among the shards."""

    def place(url: str) -> str:
        return os.path.realpath(url) if folder.is_local else url

    other = Folder(source)
    if str(source) not in DRAWN and other.is_local == folder.is_local and place(other.path) == place(folder.path):
        raise UserError(f"{shown(source)} is the source itself; give another folder for the packed set")


def refuse_finished(folder: Folder, levels: tuple[int, ...]):
    """Raises UserError when the destination holds a set already, or shards of somebody else."""
    where, advice = shown(folder.url), "pack into another folder, or remove it"
    if any(folder.size(*names, FILE_NAME) is not None for names in ((), (str(levels[0]),))):
        clear(folder)  # one was killed right after its last index
        raise UserError(f"{where} already holds a packed set; {advice}")
    if folder.size(FOLDER, PLAN) is None:
        names = folder.names()
        if any(name.isdecimal() and folder.size(name, FILE_NAME) is not None for name in names):
            raise UserError(f"{where} already holds a packed pyramid; {advice}")
        tars = [name for name in names if name.endswith(".tar")]
        if tars:
            raise UserError(f"{where} holds tars that this did not make, such as {tars[0]}; {advice}")


def clear(folder: Folder):
    """Remove the plan and the records of a set that is whole. Another process that makes the same set may just be
    putting one there: it removes them later."""
    for _ in range(3):
        try:
            return folder.remove(FOLDER)
        except UserError as error:
            logger.debug("%s", error)


def _plan(shared: Shared, settings: dict, numbers: dict[str, np.ndarray]) -> tuple[dict, list[Job]]:
    """The plan that the destination holds, or a new one put there, and the shards to make by it."""
    dest = shared.dest
    if dest.size(FOLDER, PLAN) is None:
        shards, per_shard = [], settings["samples_per_shard"] or _estimate(shared, settings, numbers)
        for split, members in numbers.items():
            num_shards = -(-len(members) // per_shard)
            ends = [len(members) * i // num_shards for i in range(num_shards + 1)]
            shards += [[f"{split}-{i:06d}", split, *ends[i : i + 2]] for i in range(num_shards)]
        plan = {"version": VERSION, "settings": settings, "shards": shards}
        for level in shared.recipe.levels:
            folder = shared.recipe.folder(dest, level)
            if folder.is_local:
                make_folder(folder)
        dest.write(json.dumps(plan).encode(), FOLDER, PLAN)
    else:
        plan = _found_plan(dest, settings)
    return plan, [Job(name, numbers[split][first:stop]) for name, split, first, stop in plan["shards"]]


def _found_plan(dest: Folder, settings: dict) -> dict:
    where = shown(dest.url)
    try:
        plan = json.loads(dest.read(FOLDER, PLAN))
        found, version = plan["settings"], plan["version"]
    except (ValueError, TypeError, KeyError):
        found = version = None
    if version != VERSION:
        raise UserError(f"{where} was begun by another version of sivae, or is damaged; remove it and pack again")
    differ = [name for name in settings if found.get(name) != settings[name]]
    if differ == ["source"] or differ == ["source", "num_images"] or differ == ["num_images", "source"]:
        raise UserError(
            f"{where} was begun with other images, the source has changed since; remove that folder and pack again"
        )
    if differ:
        name = "resolution" if differ[0] == "levels" else differ[0]
        raise UserError(
            f"{where} was begun with other settings ({name}: {found.get(differ[0])} there, {settings[differ[0]]} now); "
            "go on with the same command as then, or remove that folder"
        )
    return plan


def _estimate(shared: Shared, settings: dict, numbers: dict[str, np.ndarray]) -> int:
    """How many samples fill a shard, from the encoded sizes of a few that lie evenly over the set."""
    members = np.concatenate(list(numbers.values()))
    probes = members[np.linspace(0, len(members) - 1, min(NUM_PROBES, len(members))).round().astype(int)]
    found = list(sizes(shared, probes)) or [512 + 3 * shared.recipe.levels[0] ** 2]
    return max(1, round(settings["shard_size_bytes"] / (sum(found) / len(found))))


def _make(shared: Shared, jobs: list[Job], num_workers: int, progress: bool, text: str) -> dict[str, Record]:
    """The records of all shards; those that are not finished are made."""
    found = set(shared.dest.names(FOLDER))
    records = {job.name: Record.load(shared, job.name) if f"{job.name}.json" in found else None for job in jobs}
    waiting = [job for job in jobs if records[job.name] is None]
    count = sum(len(job.numbers) for job in jobs)
    initial = count - sum(len(job.numbers) for job in waiting)
    with progress_bar(count, text, " images", initial=initial, enabled=progress) as bar:
        for name, record in each(make_shard, shared, waiting, num_workers, bar.update, DIED):
            records[name] = record
    return records


def _index(
    shared: Shared, jobs: list[Job], records: dict[str, Record], level: int, numbers: dict, licence: str | None
) -> Index:
    recipe, source = shared.recipe, shared.source
    kept = [(job, records[job.name]) for job in jobs if records[job.name].key]
    splits, skipped = dict.fromkeys(numbers, 0), {split: [] for split in numbers}
    for job in jobs:
        split = job.name.rpartition("-")[0]
        splits[split] += len(records[job.name].key)
        skipped[split] += records[job.name].skipped
    for split, count in splits.items():
        if not count:
            raise UserError(f"no image of {split} can be read, the first: {skipped[split][0]}")

    def column(name: str) -> np.ndarray:
        return np.array([value for _, record in kept for value in getattr(record.levels[level], name)], np.int64)

    return Index(
        resolution=level,
        num_channels=recipe.num_channels,
        num_classes=recipe.num_classes,
        image_format=recipe.image_format,
        quality=recipe.quality,
        crop=recipe.crop,
        filter=recipe.filter if level == recipe.levels[0] else f"{recipe.filter}, then averages of squares",
        source=source.description,
        licence=source.licence if licence is None else licence,
        splits=splits,
        skipped=tuple(line for lines in skipped.values() for line in lines),
        shards=tuple(Shard(job.tar, record.levels[level].size_bytes, len(record.key)) for job, record in kept),
        key=[key for _, record in kept for key in record.key],
        offset=column("offset"),
        size=column("size"),
        crc32=column("crc32"),
        label=None if recipe.num_classes is None else np.array([v for _, r in kept for v in r.label], np.int64),
    )


def make_folder(folder: Folder):
    try:
        folder.fs.makedirs(folder.path, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {shown(folder.url)}: {error.strerror or error}; give a folder that can be written"
        ) from None


def pack_once(source, folder, **settings) -> str:
    """Pack into a local folder unless it holds a set already; returns the folder.

    Safe when many processes do so at once: each packs into a folder of its own beside it and renames
    that into place, and renaming onto a folder with something in it fails, so the first one wins.
    """
    folder = os.path.abspath(os.path.expanduser(folder))
    if os.path.exists(os.path.join(folder, FILE_NAME)):
        return folder
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=f".{os.path.basename(folder)}-", dir=os.path.dirname(folder))
    except OSError as error:
        raise UserError(
            f"cannot write the cache {folder}: {error.strerror}; set SIVAE_CACHE to a folder that can be written"
        ) from None
    try:
        packed = os.path.join(scratch, "set")
        pack(source, packed, **settings)
        os.rename(packed, folder)
    except OSError as error:
        if not os.path.exists(os.path.join(folder, FILE_NAME)):
            raise UserError(f"cannot make {folder}: {error.strerror}; remove it and run again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
