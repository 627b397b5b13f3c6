"""Flickr-Faces-HQ as NVlabs/ffhq-dataset publishes it: ffhq-dataset-v2.json beside images1024x1024/00000/00000.png,
or beside thumbnails128x128 alone (Karras, Laine and Aila, CVPR 2019).

The JSON is a quarter of a gigabyte, most of it landmarks: it is read once, and a copy in another process
gets only names, attribution and, where asked for, checksums.
"""

import hashlib
import json
import logging
import zlib

import numpy as np

from sivae.data.sources.base import BadImage, Sample, Source, fingerprint, wanted_labels
from sivae.data.sources.files import File, damage, find_file, find_files
from sivae.data.sources.pictures import decode
from sivae.errors import UserError, shown
from sivae.storage import Folder

logger = logging.getLogger(__name__)
JSON_NAME = "ffhq-dataset-v2.json"
IMAGES = {"images1024x1024": "image", "thumbnails128x128": "thumbnail"}  # folder -> the JSON's key
SPLITS = {"training": "train", "validation": "validation"}
ATTRIBUTION = ("photo_url", "photo_title", "author", "country", "license", "license_url")
VERIFY = {"file": "file_md5", "pixels": "pixel_md5"}  # what `verify` compares -> the JSON's key
MAX_JSON_BYTES = 2**30
BLOCK = 512  # images whose attribution is compressed together


class FFHQ(Source):
    """The aligned and cropped images, split as published: the first 60,000 train, the last 10,000 validation.

    verify: compare the published md5 of each "file", or of its "pixels", which stay when it is encoded again.
    Every image that the JSON lists must be there.
    """

    licence = (
        "Flickr-Faces-HQ (FFHQ), NVIDIA Corporation, CC BY-NC-SA 4.0; cite Karras, Laine and Aila, CVPR 2019, and say "
        "what you changed; each image under its author's own licence (CC BY 2.0, CC BY-NC 2.0, Public Domain Mark "
        "1.0, CC0 1.0 or U.S. Government Works)"
    )

    def __init__(self, folder: Folder, labels: bool | None = None, verify: str | None = None):
        listing = find_file(folder, JSON_NAME)
        wanted_labels(labels, None, listing.where, "pack without labels")
        present = {}
        for images in IMAGES:
            with damage(shown(folder.path), "check its address and credentials"):
                if folder.exists(images):
                    present = {file.name: file for file in find_files(folder, images) if file.name.endswith(".png")}
            if present:
                break
        else:
            raise UserError(
                f"there are no images beside {listing.where}; download {' or '.join(IMAGES)} with download_ffhq.py"
            )
        self.folder, self.description, self.verify = folder, f"FFHQ {images}", verify
        items = _read_json(listing, IMAGES[images])
        self.names = [_place(item["file_path"], images, present) for item in items]
        missing = [item["file_path"] for item, name in zip(items, self.names) if name is None]
        if missing:
            raise UserError(
                f"{len(missing):,} of the {len(items):,} images that {listing.where} lists are missing, the first are "
                f"{', '.join(missing[:3])}; download them, or pack {shown(folder.join(images))} as a plain folder"
            )
        if len(present) > len(items):
            logger.warning("%d images are not in %s and were left out", len(present) - len(items), listing.where)
        self.splits = {}
        for category, split in SPLITS.items():
            numbers = np.flatnonzero([item["category"] == category for item in items])
            self.splits |= {split: numbers} if len(numbers) else {}
        self.md5 = None if verify is None else _md5_column([item.get(VERIFY[verify]) for item in items], listing)
        texts = [json.dumps(item["metadata"]) for item in items]
        blocks = ["\n".join(texts[i : i + BLOCK]) for i in range(0, len(texts), BLOCK)]
        self.attribution = [zlib.compress(block.encode()) for block in blocks]
        self.fingerprint = fingerprint("ffhq", listing.identity, [present[name].identity for name in self.names])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        file = File(self.folder, self.names[i], 0, "")
        data = file.read(missing=BadImage)
        if self.verify == "file":
            self._compare(i, data, file)
        pixels, encoded = decode(data, file.where)
        if self.verify == "pixels":
            self._compare(i, pixels, file)
        metadata = json.loads(zlib.decompress(self.attribution[i // BLOCK]).split(b"\n")[i % BLOCK])
        return Sample(self.names[i], pixels, None, encoded, metadata)

    def _compare(self, i: int, content, file: File):
        found, expected = hashlib.md5(np.ascontiguousarray(content)).digest(), self.md5[i].tobytes()
        if found != expected:
            raise BadImage(
                f"the md5 of {'the file' if self.verify == 'file' else 'the pixels of'} {file.where} is {found.hex()} "
                f"where {expected.hex()} was published; download it again"
            )


def _read_json(listing: File, key: str) -> list[dict]:
    """category, file_path, metadata and checksums of each image, in the order of their numbers."""
    if listing.size > MAX_JSON_BYTES:
        raise UserError(f"{listing.where} has {listing.size:,} bytes where about 250 MB are right; download it again")

    def shrink(found: dict) -> dict:  # called for each object as soon as it is read, so that landmarks never pile up
        if "category" in found:
            return {"category": found["category"], "metadata": found["metadata"], **found[key]}
        return {name: found[name] for name in found if name not in ("face_landmarks", "face_quad", "face_rect")}

    with damage(listing.where, "download it again"):
        content = json.loads(listing.read(), object_hook=shrink)
        items = [content[number] for number in sorted(content, key=int)]
        for item in items:
            item["metadata"] = {name: str(item["metadata"].get(name) or "") for name in ATTRIBUTION}
            if not isinstance(item["file_path"], str) or item["category"] not in SPLITS:
                raise ValueError("an image without file_path, or of a category that is not known")
    if not items:
        raise UserError(f"{listing.where} lists no images; download it again")
    return items


def _place(path: str, images: str, present: dict) -> str | None:
    """Where an image lies: as published, or without the folders of thousands; None when it is missing."""
    flat = f"{images}/{path.rpartition('/')[2]}"
    return path if path in present else flat if flat in present else None


def _md5_column(values: list, listing: File) -> np.ndarray:
    """uint8 [N, 16]."""
    with damage(listing.where, "it has no md5 for every image, so pack without verify"):
        return np.stack([np.frombuffer(bytes.fromhex(value), np.uint8, 16) for value in values])
