"""Packing a set once, so that training only ever streams it: tars that webdataset reads, and the index.

Packing the same source twice gives the same bytes, hence the same digest.
"""

import io
import os
import shutil
import tarfile
import tempfile
import zlib

import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from sivae.data.index import FILE_NAME, MAX_RESOLUTION, Index, Shard
from sivae.data.shards import Storage
from sivae.data.sources import open_source
from sivae.errors import UserError, shown


def pack(
    source,
    dest,
    *,
    resolution: int,
    num_channels: int | None = None,
    labels: bool | None = None,
    samples_per_shard: int | None = None,
    shard_size_bytes: int = 256 * 2**20,
    licence: str | None = None,
    storage_options: dict | None = None,
    source_options: dict | None = None,
    progress: bool = True,
) -> Index:
    """Pack a source (see `sources`) into shards and an index at `dest`, a local folder or any fsspec URL.

    Images are cropped to their central square and resized with Lanczos to resolution x resolution.
    num_channels: 1 or 3; None takes what the first image has. labels: None takes those the source has,
    True asks for them, False leaves them out. A shard ends after samples_per_shard images, or once it
    holds shard_size_bytes. licence: recorded in the index, None takes what the source says.
    storage_options and source_options: fsspec's, for dest and for source.

    One shard at a time is made on local disk and uploaded; the index comes last, so what an interrupted
    run leaves is no set, and the next run overwrites it. Raises UserError: a setting or a source that
    cannot be packed, an unreadable image (with its path), a destination that holds a set already.
    """
    if not 1 <= resolution <= MAX_RESOLUTION or num_channels not in (None, 1, 3):
        raise UserError(
            f"cannot pack at resolution {resolution} with num_channels {num_channels}; give a "
            f"resolution in 1..{MAX_RESOLUTION} and 1 or 3 channels"
        )
    if (samples_per_shard is not None and samples_per_shard < 1) or shard_size_bytes < 1:
        raise UserError(
            f"samples_per_shard {samples_per_shard} and shard_size_bytes {shard_size_bytes} must be at least 1"
        )
    images = open_source(source, resolution=resolution, labels=labels, storage_options=source_options)
    channels = num_channels or images.num_channels
    storage = Storage(dest, storage_options)
    writable(storage)

    shards, columns, classes = [], [], []
    bar = tqdm(total=len(images), desc=f"packing {shown(source)}", unit="image", disable=not progress)
    with bar, tempfile.TemporaryDirectory(prefix="sivae-pack-") as scratch:
        next_image = 0
        while next_image < len(images):
            name, size_bytes, first = f"shard-{len(shards):06d}.tar", 0, next_image
            path = os.path.join(scratch, name)
            # mtime and owner are fixed: the bytes of a set depend on its images alone
            with TarWriter(path, encoder=False, compress=False, mtime=0, user="sivae", group="sivae") as tar:
                while next_image < len(images) and size_bytes < shard_size_bytes:
                    if samples_per_shard and next_image - first == samples_per_shard:
                        break
                    origin, image, label = images[next_image]
                    if num_channels is None and image.shape[2] > channels:
                        raise UserError(
                            f"{origin} is in colour, and the first image is grey; say which is "
                            "right with num_channels 3 or 1"
                        )
                    encoded = encode_png(fit(image, resolution, channels))
                    sample = {"__key__": f"{next_image:08d}", "png": encoded}
                    if label is not None:
                        sample["cls"] = str(label).encode()
                        classes.append(label)
                    size_bytes += tar.write(sample)
                    next_image += 1
                    bar.update()
            found = list_shard(path)
            assert len(found) == next_image - first, (name, len(found), next_image, first)
            shards.append(Shard(name, os.path.getsize(path), len(found)))
            columns.extend(found)
            upload(storage, path, name)
            os.remove(path)
    key, offset, size, crc32 = zip(*columns)
    label = np.array(classes) if images.num_classes else None
    index = Index(
        resolution,
        channels,
        images.num_classes,
        "png",
        images.description,
        images.licence if licence is None else licence,
        tuple(shards),
        list(key),
        np.array(offset),
        np.array(size),
        np.array(crc32),
        label,
    )
    index.dump(dest, storage_options)
    return index


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


def list_shard(path: str) -> list[tuple[str, int, int, int]]:
    """(key, offset, size, crc32) of each image in a tar, in order, read back as any tar reader sees it."""
    found = []
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if suffix == "png":
                crc32 = zlib.crc32(tar.extractfile(member).read())
                found.append((key, member.offset_data, member.size, crc32))
    return found


def fit(image: np.ndarray, resolution: int, num_channels: int) -> Image.Image:
    """uint8 [H, W, 1 or 3] to its central square at the resolution (Lanczos), grey or RGB."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side != resolution:
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return picture.convert("L" if num_channels == 1 else "RGB")


def encode_png(picture: Image.Image) -> bytes:
    """Always by Pillow, whatever else is installed, so that the bytes are the same everywhere."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def writable(storage: Storage):
    """Make the destination; raises UserError when it holds a set already or cannot be written."""
    try:
        if storage.fs.exists(storage.path(FILE_NAME)):
            raise UserError(f"{shown(storage.url)} already holds a packed set; pack into another folder, or remove it")
        if storage.is_local:
            storage.fs.makedirs(storage.path(""), exist_ok=True)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - each filesystem has its own
        raise UserError(
            f"cannot write to {shown(storage.url)}: {shown(error)}; check its address and credentials"
        ) from None


def upload(storage: Storage, path: str, name: str):
    try:
        storage.fs.put_file(path, storage.path(name))
    except Exception as error:  # noqa: BLE001 - each filesystem has its own
        raise UserError(
            f"cannot write {name} to {shown(storage.url)}: {shown(error)}; pack again once it can be written"
        ) from None
