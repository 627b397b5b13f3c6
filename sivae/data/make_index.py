"""`sivae index`: an index for WebDataset shards that others made, from their headers, so that they can be trained on
as they are."""

import glob
import os
import re
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from sivae.data.check import AHEAD_BYTES, SUFFIXES
from sivae.data.decode import read_header
from sivae.data.index import FILE_NAME, SHARD_NAME, SPLIT_NAME, Index, Shard
from sivae.data.sources.base import natural_key
from sivae.data.sources.files import expand_braces, split_url
from sivae.data.tar import Damaged, Members, RangeFile, refuse_links
from sivae.errors import UserError, query_start, shown
from sivae.progress import progress_bar
from sivae.storage import Folder

NUM_THREADS = 8  # shards that are looked through at once: most of it is waiting for storage
JUMP_BYTES = 2**18  # members longer than this on average are jumped over, shorter ones read through
HEADER_BYTES = 2**16  # read at once after a jump
MAX_LABEL_BYTES = 20
REPACK = "pack them instead: `sivae pack URLS DEST --resolution R`"


@dataclass
class Found:
    """The images of one shard, in order."""

    size_bytes: int
    image_format: str | None = None
    key: list[str] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    label: dict[str, int] = field(default_factory=dict)  # key -> class


def make_index(
    urls: str | list[str],
    *,
    output=None,
    crc: bool = False,
    split: str = "train",
    licence: str = "",
    storage_options: dict | None = None,
    progress: bool = True,
) -> Index:
    """Write the index of shards at paths or fsspec URLs, with braces ({000..069}) or local patterns, in one folder.

    The index lies beside the shards, or in the folder `output`, and then says where they are. crc: read every
    byte and record checksums; without them only the headers are read, and damage is found when it does not
    decode. split: the name of all the samples. Labels are those of the .cls members, when all samples have one.
    Resolution and channels are those of the first image; the others are compared as they are read. Raises
    UserError for what is no tar, or is cut short, for images of several formats, equal keys, and images that
    are not square.
    """
    url, names = _expand([urls] if isinstance(urls, str) else list(urls))
    if split == "all" or not re.fullmatch(SPLIT_NAME, split, re.ASCII):
        raise UserError(f"{split!r} is no name for a split; take letters, digits, - and _, and not `all`")
    odd = next((name for name in names if not re.fullmatch(SHARD_NAME, name, re.ASCII)), None)
    if odd is not None:
        raise UserError(
            f"{shown(f'{url}/{odd}')} is no name for a shard (a plain file name of letters, digits, . - and _); rename it, or {REPACK}"
        )
    folder = Folder(url, storage_options)
    where = shown(folder.url)
    if output is not None and where != folder.url:
        raise UserError(f"{where} holds credentials, which an index elsewhere would keep; give them by the environment")
    dest = folder if output is None else Folder(output)
    if dest.size(FILE_NAME) is not None:
        raise UserError(f"{shown(dest.url)} already holds an index; give another folder with --output, or remove it")
    found = _find_all(folder, names, crc, progress)

    keys = [key for shard in found for key in shard.key]
    formats = {shard.image_format: name for name, shard in zip(names, found)}
    if len(formats) > 1:
        told = ", ".join(f"{image_format} in {name}" for image_format, name in formats.items())
        raise UserError(f"the shards at {where} hold images of several formats ({told}); {REPACK}")
    if len(set(keys)) < len(keys):
        seen = set()
        twice = next(key for key in keys if key in seen or seen.add(key))
        raise UserError(f"two samples of the shards at {where} have the key {twice!r}; {REPACK}")
    wrong = next((key for key in keys if not key.isprintable() or not 0 < len(key) <= 255), None)
    if wrong is not None:
        raise UserError(f"{wrong[:300]!r} in the shards at {where} is no key, 1 to 255 printable letters; {REPACK}")
    image_format, header = found[0].image_format, _first_header(folder, names[0], found[0])
    size = np.array([size for shard in found for size in shard.size], np.int64)
    too_long = np.flatnonzero((size > 4 * header.num_channels * header.width**2 + 2**20) | (size < 1))
    if len(too_long):
        raise UserError(
            f"sample {keys[too_long[0]]} at {where} has {size[too_long[0]]:,} bytes, which no image of "
            f"{header.width}x{header.width} pixels has, as the first one is; {REPACK}"
        )
    label = _labels(found, keys, where)
    index = Index(
        resolution=header.width,
        num_channels=header.num_channels,
        num_classes=None if label is None else int(label.max()) + 1,
        image_format=image_format,
        source=f"WebDataset shards {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else ""),
        licence=licence,
        splits={split: len(keys)},
        base=None if output is None else os.path.abspath(folder.path) if folder.is_local else folder.url,
        shards=tuple(Shard(name, shard.size_bytes, len(shard.key)) for name, shard in zip(names, found)),
        key=keys,
        offset=np.array([offset for shard in found for offset in shard.offset], np.int64),
        size=size,
        crc32=np.array([crc32 for shard in found for crc32 in shard.crc32], np.int64) if crc else None,
        label=label,
    )
    index.dump(dest)
    return index


def folder_of(urls: list[str]) -> str:
    """Where the shards of these URLs and patterns lie."""
    return _expand(urls)[0]


def _expand(urls: list[str]) -> tuple[str, list[str]]:
    """(their folder, the file names in natural order for patterns, else as given)."""
    found = []
    for url in urls:
        url = re.sub("^(file|local)://", "", url)
        if "{" in url:
            folder, names = expand_braces(url)
            found += [(folder, name) for name in names]
        elif "://" not in url and glob.has_magic(url) and not os.path.exists(url):
            paths = sorted(glob.glob(url), key=natural_key)
            if not paths:
                raise UserError(f"there are no files {url}; give the shards, such as 'folder/*.tar'")
            found += [split_url(path) for path in paths]
        elif "://" in url and re.search(r"\*|\[[^/]*$", url[: query_start(url)]):
            raise UserError(
                f"{shown(url)}: patterns with * work for local shards only; write shards-{{000000..000069}}.tar"
            )
        else:
            found.append(split_url(url))
    folders = {os.path.abspath(folder) if "://" not in folder else folder for folder, _ in found}
    names = [name for _, name in found]
    if len(folders) > 1:
        first, second = sorted(folders)[:2]
        raise UserError(
            f"the shards of one index lie in one folder, not in {shown(first)} and {shown(second)}; {REPACK}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice} is given twice; give each shard once")
    return found[0][0], names


def _find_all(folder: Folder, names: list[str], crc: bool, progress: bool) -> list[Found]:
    local = threading.local()  # a Folder keeps files open for one thread

    def find(name: str) -> Found:
        if not hasattr(local, "folder"):
            local.folder = folder.folder()
        return find_images(local.folder, name, crc)

    found = []
    bar = progress_bar(len(names), f"indexing {shown(folder.url)}", " shards", enabled=progress)
    with bar, ThreadPoolExecutor(NUM_THREADS) as threads:
        try:
            for result in threads.map(find, names):
                found.append(result)
                bar.update()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def find_images(folder: Folder, name: str, crc: bool) -> Found:
    """The images of one shard. Raises UserError naming it."""
    where = f"{shown(folder.url)}/{name}"
    size_bytes = folder.size(name)
    if size_bytes is None:
        raise UserError(f"there is no shard {where}; check the address")
    found, jumps = Found(size_bytes), not folder.is_local and not crc
    file = RangeFile(folder, name, size_bytes, AHEAD_BYTES if crc else HEADER_BYTES)
    keys = set()
    try:
        members = Members(file.at, size_bytes)
        for number, member in enumerate(members, 1):
            if jumps:
                through = min(AHEAD_BYTES, 2 * member.stop)  # by and by, as the first ones may be unlike the rest
                file.ahead = HEADER_BYTES if member.stop / number > JUMP_BYTES else max(HEADER_BYTES, through)
            if member.suffix in SUFFIXES:
                image_format = SUFFIXES[member.suffix]
                if found.image_format not in (None, image_format):
                    raise UserError(
                        f"{where} holds images of several formats ({found.image_format}, then {member.name}); {REPACK}"
                    )
                if member.key in keys:
                    raise UserError(f"{where} holds two images of the key {member.key!r}; rename one, or take it out")
                keys.add(member.key)
                found.image_format = image_format
                found.key.append(member.key)
                found.offset.append(member.start)
                found.size.append(member.size)
                if crc:
                    found.crc32.append(_crc32(file, member.start, member.stop))
            elif member.suffix == "cls":
                text = file.at(member.start, min(member.size, MAX_LABEL_BYTES + 1)).strip()
                if not text.isdigit() or len(text) > MAX_LABEL_BYTES or int(text) >= 2**31:
                    raise UserError(f"{member.name} in {where} is no whole number from 0 on, {text[:20]!r}; {REPACK}")
                if found.label.setdefault(member.key, int(text)) != int(text):
                    raise UserError(f"{where} holds two labels of the key {member.key!r}; take one out")
        refuse_links(members, SUFFIXES, where)
    except Damaged as error:
        raise UserError(f"{where}: {error}; copy it again from where it came") from None
    if not found.key:
        raise UserError(f"{where} holds no images (looked for {', '.join(SUFFIXES)}); leave it out")
    return found


def _crc32(file: RangeFile, start: int, stop: int) -> int:
    value = 0
    for at in range(start, stop, AHEAD_BYTES):
        value = zlib.crc32(file.at(at, min(AHEAD_BYTES, stop - at)), value)
    return value


def _first_header(folder: Folder, name: str, found: Found):
    where = f"the first image, {found.key[0]} in {shown(folder.url)}/{name},"
    encoded = RangeFile(folder, name, found.size_bytes, 0).at(found.offset[0], min(found.size[0], AHEAD_BYTES))
    header = read_header(found.image_format, encoded)
    if header is None:
        raise UserError(f"{where} is no {found.image_format}; {REPACK}")
    if header.width != header.height:
        raise UserError(f"{where} is {header.width}x{header.height} pixels, which is no square; {REPACK}")
    if header.num_channels == 0:
        raise UserError(f"{where} is {header.kind}, and only 8-bit grey and RGB are read as they are; {REPACK}")
    return header


def _labels(found: list[Found], keys: list[str], where: str) -> np.ndarray | None:
    labels = [shard.label.get(key) for shard in found for key in shard.key]
    if all(label is None for label in labels):
        return None
    if None in labels:
        raise UserError(
            f"sample {keys[labels.index(None)]} of the shards at {where} has no .cls with a label, and others have; {REPACK}"
        )
    return np.array(labels, np.int64)
