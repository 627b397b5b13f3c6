"""A zip of images, as StyleGAN2-ADA's and StyleGAN3's dataset_tool.py (NVlabs) writes it, with labels in its
dataset.json: {"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}.

Names of members are never paths of files, and a member is read only when its declared size is sane; zipfile
compares its crc32.
"""

import json
import logging
import os
import zipfile

import numpy as np

from sivae.data.sources.base import BadImage, Sample, Source, fingerprint, natural_key, wanted_labels
from sivae.data.sources.files import check_member, damage, find_file
from sivae.data.sources.pictures import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, decode
from sivae.errors import UserError
from sivae.storage import Folder

logger = logging.getLogger(__name__)
LABELS_NAME = "dataset.json"
MAX_LABELS_BYTES = 2**29


class Zip(Source):
    """All images of the zip in natural order. Labels, where there are any, are one whole number for every image."""

    def __init__(self, folder: Folder, name: str, labels: bool | None = None):
        self.file = find_file(folder, name)
        self.name = self.file.identity[0]
        self.description, self._opened = f"zip {self.name}", None
        where = self.file.where
        with damage(where, "copy it again, or make it again with dataset_tool.py"):
            members = self._archive().NameToInfo
        kept = [n for n in members if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith("__MACOSX/")]
        self.names = sorted(kept, key=natural_key)
        if not self.names:
            raise UserError(f"there are no images in {where} (looked for {' '.join(IMAGE_SUFFIXES)})")
        found = self._read_labels(labels) if LABELS_NAME in members and labels is not False else None
        self.labels = wanted_labels(labels, found, where, f"put a {LABELS_NAME} with a number for every image into it")
        self.num_classes = None if self.labels is None else int(self.labels.max()) + 1
        self.fingerprint = fingerprint("zip", self.num_classes, self.file.identity)

    def _read_labels(self, labels: bool | None) -> np.ndarray | None:
        """int64 [N], or None when it says that there are none."""
        where = f"{LABELS_NAME} in {self.file.where}"
        with damage(where, "make the zip again with dataset_tool.py"):
            pairs = json.loads(self._read(LABELS_NAME, MAX_LABELS_BYTES))["labels"]
            if pairs is None:
                return None
            found = {name.replace("\\", "/"): label for name, label in pairs}
            missing = next((name for name in self.names if name not in found), None)
            if missing is not None:
                raise ValueError(f"it has no label for {missing}")
            values = [found[name] for name in self.names]
            if all(type(value) is int and 0 <= value < 2**31 for value in values):
                return np.array(values, np.int64)
        if labels:
            raise UserError(f"{where} holds labels that are not whole numbers from 0 on; pack without labels")
        logger.warning("%s holds labels that are not whole numbers from 0 on; they were left out", where)
        return None

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():  # its position and its lock are one process's own
            self._opened = os.getpid(), zipfile.ZipFile(self.file.open())
        return self._opened[1]

    def _read(self, name: str, bound: int) -> bytes:
        info = self._archive().NameToInfo[name]
        check_member(info, bound)
        with self._archive().open(info) as stream:
            return stream.read(info.file_size)  # without the number, deflate may make 2 GB of a member of any size

    def __getstate__(self):
        return self.__dict__ | {"_opened": None}

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        where = f"{self.names[i]} in {self.file.where}"
        with damage(where, "copy the zip again, or take this image out of it", BadImage):
            data = self._read(self.names[i], MAX_IMAGE_BYTES)
        pixels, encoded = decode(data, where)
        return Sample(self.names[i], pixels, None if self.labels is None else int(self.labels[i]), encoded)
