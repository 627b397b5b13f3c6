"""MNIST and its relatives (Fashion-MNIST, KMNIST, ...) in LeCun's idx format, plain or gzipped: train-images-idx3-ubyte,
train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte.

idx: two zero bytes, the type (8: uint8), the number of dimensions, each as uint32, then the values; all big-endian.
"""

import gzip
import re
import struct
from math import prod

import numpy as np

from sivae.data.sources.arrays import InMemory
from sivae.data.sources.base import consecutive, fingerprint, wanted_labels
from sivae.data.sources.files import MAX_RATIO, File, damage, find_file, find_files, read_exactly
from sivae.errors import UserError, shown
from sivae.storage import Folder

IMAGES_NAME = re.compile(r"(train|t10k)-images[-.]idx3-ubyte(\.gz)?")
UINT8 = 8
MAX_SIDE = 16384


class Idx(InMemory):
    """A folder: `train` and `test` where they are there. A single file of images has no splits."""

    num_channels = 1

    def __init__(self, folder: Folder, name: str | None, labels: bool | None = None):
        self.where, self.asked = shown(folder.join(name) if name else folder.path), labels
        names = {file.name: file for file in find_files(folder) if "/" not in file.name}
        found = [name] if name else [n for n in names if IMAGES_NAME.fullmatch(n)]
        # (images, labels or None) of each part; of x and x.gz side by side the plain one is taken
        parts = {name.removesuffix(".gz"): name for name in sorted(found, reverse=True)}
        self.files = [(names.get(parts[n]) or find_file(folder, parts[n]), _labels_of(n, names)) for n in sorted(parts)]
        self.files.sort(key=lambda pair: not pair[0].name.startswith("train"))
        self.parts = [file.identity[0] for file, _ in self.files]
        self.description = f"idx {', '.join(self.parts)}"
        if not name:
            names = ["train" if part.startswith("train") else "test" for part in self.parts]
            self.splits = consecutive(dict(zip(names, self.counts)))
        self.num_classes = None if self.labels is None else int(self.labels.max()) + 1
        identities = [file.identity for pair in self.files for file in pair if file is not None]
        self.fingerprint = fingerprint("idx", self.num_classes, identities)

    def _load(self):
        images, labels = [], []
        for file, beside in self.files:
            images.append(_read(file, 3))
            if 0 in images[-1].shape or max(images[-1].shape[1:]) > MAX_SIDE:
                raise UserError(f"{file.where} has shape {images[-1].shape}; give images of [N, H, W]")
            labels.append(None if beside is None or self.asked is False else _read(beside, 1).astype(np.int64))
            if labels[-1] is not None and len(labels[-1]) != len(images[-1]):
                raise UserError(
                    f"{beside.where} has {len(labels[-1])} labels for {len(images[-1])} images; copy both again"
                )
        if len({part.shape[1:] for part in images}) > 1:
            raise UserError(f"the images in {self.where} are of different sizes; pack one file at a time")
        known = None if any(part is None for part in labels) else np.concatenate(labels)
        known = wanted_labels(self.asked, known, self.where, "put the labels-idx1-ubyte beside the images")
        return np.concatenate(images)[..., None], known, [len(part) for part in images]


def _labels_of(name: str, names: dict[str, File]) -> File | None:
    beside = name.replace("-images", "-labels").replace("idx3", "idx1")
    return (names.get(beside) or names.get(f"{beside}.gz")) if beside != name else None


def _read(file: File, num_dimensions: int) -> np.ndarray:
    """uint8 of the shape that the header declares; no more is unpacked than that."""
    with damage(file.where, "download it again"):
        zipped = file.read(0, min(2, file.size)) == b"\x1f\x8b"
        stream = gzip.GzipFile(fileobj=file.open()) if zipped else file.open()
        header = stream.read(4 + 4 * num_dimensions)
        if len(header) < 4 + 4 * num_dimensions or header[:4] != bytes([0, 0, UINT8, num_dimensions]):
            raise ValueError(f"it is no idx file of {num_dimensions} dimensions")
        shape = struct.unpack_from(f">{num_dimensions}I", header, 4)
        return read_exactly(stream, prod(shape), file.size * MAX_RATIO if zipped else file.size).reshape(shape)
