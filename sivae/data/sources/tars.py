"""WebDataset shards made by others (github.com/webdataset/webdataset): tars whose members of one key, up to the first
point of the name, are one sample: KEY.jpg, KEY.cls with the class as a number, KEY.json with attribution.

An index is made from the tars' headers; after that every image is a range of bytes.
"""

import json
import logging

import numpy as np

from sivae.data.sources.base import BadImage, Sample, Source, fingerprint, natural_key
from sivae.data.sources.files import File, base_name, damage, find_file, find_files
from sivae.data.sources.pictures import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, decode
from sivae.data.tar import Members, refuse_links
from sivae.errors import UserError, shown
from sivae.storage import Folder

logger = logging.getLogger(__name__)
MAX_LABEL_BYTES, MAX_METADATA_BYTES = 20, 2**16
PARTS = ("image", "cls", "json")


class Tars(Source):
    """All images of one tar, or of several in the order given; of a folder, all its tars in natural order."""

    def __init__(self, folder: Folder, names: str | list[str] | None, labels: bool | None = None):
        if names is None:
            files = [file for file in find_files(folder) if file.name.endswith(".tar") and "/" not in file.name]
            self.files = sorted(files, key=lambda file: natural_key(file.name))
            self.description = f"WebDataset shards {base_name(folder)}"
        else:
            names = [names] if isinstance(names, str) else names
            self.files = [find_file(folder, name) for name in names]
            first, last = self.files[0].identity[0], self.files[-1].identity[0]
            self.description = f"WebDataset shards {first}" + (f" to {last}" if len(names) > 1 else "")
        self.keys, shards, places, classes = [], [], [], []
        for number, file in enumerate(self.files):
            for key, place, label in index_tar(file, labels is not False):
                self.keys.append(key)
                shards.append(number)
                places.append([place.get(part, (0, -1)) for part in PARTS])
                classes.append(label)
        where = shown(folder.path)
        if not self.keys:
            raise UserError(f"there are no images in the tars of {where} (looked for {' '.join(IMAGE_SUFFIXES)})")
        self.shards = np.array(shards, np.int32)  # [N]
        self.places = np.array(places, np.int64)  # [N, part, (offset, size)]
        self.labels = self._labels(classes, labels)
        self.num_classes = None if self.labels is None else int(self.labels.max()) + 1
        self.fingerprint = fingerprint("tars", self.num_classes, [file.identity for file in self.files])

    @property
    def names(self) -> list[str]:
        """What a share of the samples is drawn by."""
        return self.keys

    def _labels(self, classes: list, labels: bool | None) -> np.ndarray | None:
        without = next((i for i, label in enumerate(classes) if label is None), None)
        if labels is False or (not labels and all(label is None for label in classes)):
            return None
        if without is not None:
            raise UserError(f"{self._where(without)} has no .cls with a label; add it, or pack without labels")
        return np.array(classes, np.int64)

    def _where(self, i: int) -> str:
        return f"{self.keys[i]} in {self.files[self.shards[i]].where}"

    def __len__(self):
        return len(self.keys)

    def _part(self, i: int, part: str) -> bytes | None:
        offset, size = self.places[i, PARTS.index(part)].tolist()
        return None if size < 0 else self.files[self.shards[i]].read(offset, offset + size)

    def __getitem__(self, i: int) -> Sample:
        if self.places[i, 0, 1] > MAX_IMAGE_BYTES:
            raise BadImage(f"{self._where(i)} has {self.places[i, 0, 1]:,} bytes, which no image has; take it out")
        pixels, encoded = decode(self._part(i, "image"), self._where(i))
        name = f"{self.files[self.shards[i]].identity[0]} {self.keys[i]}"
        label = None if self.labels is None else int(self.labels[i])
        return Sample(name, pixels, label, encoded, self._metadata(i))

    def _metadata(self, i: int) -> dict | None:
        if self.places[i, PARTS.index("json"), 1] > MAX_METADATA_BYTES:
            return None
        text = self._part(i, "json")
        if text is None:
            return None
        with damage(f"the .json of {self._where(i)}", "repair or remove it", BadImage):
            metadata = json.loads(text)
        return metadata if isinstance(metadata, dict) else None


def index_tar(file: File, labels: bool = True) -> list[tuple[str, dict[str, tuple[int, int]], int | None]]:
    """(key, part -> (offset, size), label or None) of each sample that has an image, in order, from headers and .cls.

    Raises UserError when the tar is damaged or cut short, and when a sample has two images or a .cls that is no number.
    """
    samples, found, others = [], [], 0
    reader = file.open()
    with damage(file.where, "copy it again"):
        members = Members(reader.at, file.size)
        for member in members:
            key, part = member.key, "image" if f".{member.suffix}" in IMAGE_SUFFIXES else member.suffix
            if not key.rpartition("/")[2]:
                continue  # hidden
            if not samples or key != samples[-1][0]:
                samples.append((key, {}))
            if part in PARTS:
                if part in samples[-1][1]:
                    raise UserError(f"{key} in {file.where} has two of one kind ({member.name}); take one out")
                samples[-1][1][part] = member.start, member.size
        refuse_links(members, [suffix.lstrip(".") for suffix in IMAGE_SUFFIXES], file.where)
    for key, places in samples:
        if "image" not in places:
            others += 1
        else:
            found.append((key, places, _label(reader, places, key, file) if labels and "cls" in places else None))
    if others:
        logger.warning("%d samples of %s have no image and were left out", others, file.where)
    return found


def _label(reader, places: dict, key: str, file: File) -> int:
    offset, size = places["cls"]
    text = reader.at(offset, min(size, MAX_LABEL_BYTES)).strip()
    if not text.isdigit() or size > MAX_LABEL_BYTES or int(text) >= 2**31:
        raise UserError(f"the .cls of {key} in {file.where} is no whole number from 0 on; pack without labels")
    return int(text)
