"""Arrays of images: a numpy `.npy`, or a `.npz` with `images` (or a single array) and perhaps `labels`.

Nothing pickled is loaded, and no header is believed about how much memory it needs.
"""

import zipfile
from abc import abstractmethod
from functools import cached_property
from math import prod

import numpy as np

from sivae.data.sources.base import BadImage, Sample, Source, fingerprint, wanted_labels
from sivae.data.sources.files import File, check_member, damage, find_file, read_exactly
from sivae.errors import UserError
from sivae.storage import Folder

HINT = "save plain arrays, in a .npz `images` and `labels`"


class InMemory(Source):
    """A set small enough to lie in memory. A copy in another process loads it again when it first needs it."""

    parts: list[str]  # names of the files that the images lie in
    _loaded: tuple | None = None

    @abstractmethod
    def _load(self) -> tuple[np.ndarray, np.ndarray | None, list[int]]:
        """Images [N, H, W, C], labels [N] or None, and the number of images in each part."""

    def _name(self, i: int) -> str:
        for part, count in zip(self.parts, self.counts):
            if i < count:
                break
            i -= count
        return f"{part} image {i}"

    @property
    def images(self) -> np.ndarray:
        return self._arrays()[0]

    @property
    def labels(self) -> np.ndarray | None:
        return self._arrays()[1]

    @cached_property
    def counts(self) -> list[int]:
        """The number of images in each part; kept in a copy, which so knows its length before it loads."""
        return self._arrays()[2]

    def _arrays(self) -> tuple:
        if self._loaded is None:
            loaded = self._load()
            if self.__dict__.get("counts", loaded[2]) != loaded[2]:
                raise UserError(f"{self.description} changed since it was opened; start again")
            self._loaded = loaded
        return self._loaded

    def __getstate__(self):
        len(self)
        return self.__dict__ | {"_loaded": None}

    def __len__(self):
        return sum(self.counts)

    def __getitem__(self, i: int) -> Sample:
        images, labels, _ = self._arrays()
        return Sample(self._name(i), np.asarray(images[i]), None if labels is None else int(labels[i]))


class Array(InMemory):
    """Images are uint8, or float in [0, 1], as [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3."""

    def __init__(self, folder: Folder, name: str, labels: bool | None = None):
        self.file, self.asked = find_file(folder, name), labels
        self.name = self.file.identity[0]
        self.description = f"array {self.name}"
        self.num_channels = self.images.shape[3]
        self.num_classes = None if self.labels is None else int(self.labels.max()) + 1
        self.fingerprint = fingerprint("array", self.num_classes, self.file.identity)

    def _load(self):
        where, found = self.file.where, None
        with damage(where, HINT):
            if self.name.endswith(".npz"):
                data, found = _read_npz(self.file)
            else:
                data = _read_npy_file(self.file)
        if data.ndim == 3:
            data = data[..., None]
        elif data.ndim == 4 and data.shape[3] not in (1, 3) and data.shape[1] in (1, 3):
            data = np.moveaxis(data, 1, 3)
        if data.ndim != 4 or data.shape[3] not in (1, 3) or 0 in data.shape[1:]:
            raise UserError(
                f"{where} has shape {data.shape}; give [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3"
            )
        if len(data) == 0:
            raise UserError(f"there are no images in {where}")
        if data.dtype != np.uint8 and data.dtype.kind != "f":
            raise UserError(f"{where} holds {data.dtype}; give uint8, or float in [0, 1]")
        labels = wanted_labels(self.asked, found, where, "save a .npz with `images` and `labels`")
        if labels is not None:
            whole = labels.shape == (len(data),) and labels.dtype.kind in "iu"
            if not whole or labels.min() < 0 or labels.max() >= 2**31:
                raise UserError(f"`labels` in {where} must be {len(data)} whole numbers from 0 on")
        return data, labels, [len(data)]

    def _name(self, i: int) -> str:
        return f"sample {i} of {self.name}"

    def __getitem__(self, i: int) -> Sample:
        sample = super().__getitem__(i)
        image = sample.pixels
        if image.dtype != np.uint8:
            if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
                raise BadImage(
                    f"sample {i} of {self.file.where} holds NaN, infinity, or values outside [0, 1]; "
                    "float images must lie in [0, 1]"
                )
            image = (image.astype(np.float64) * 255).round().astype(np.uint8)
        return Sample(sample.name, image, sample.label)


def _read_npy_file(file: File) -> np.ndarray:
    if not file.folder.is_local:
        return read_npy(file.open(), file.size)
    with file.open() as opened:  # a local .npy is mapped rather than read, for it may be larger than memory
        shape, order, dtype = _npy_header(opened)
        if prod(shape) * dtype.itemsize > file.size - opened.tell():
            raise ValueError("it is cut short")
        if prod(shape) == 0:
            return np.empty(shape, dtype)
        return np.memmap(file.folder.join(file.name), dtype, "r", opened.tell(), shape, order)


def _read_npz(file: File) -> tuple[np.ndarray, np.ndarray | None]:
    """(images, labels or None)."""
    with zipfile.ZipFile(file.open()) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

        def read(name: str) -> np.ndarray:
            check_member(members[name], members[name].file_size)
            with archive.open(members[name]) as stream:
                return read_npy(stream, members[name].file_size)

        if "images" not in members and len(members) != 1:
            raise ValueError("it has no `images`")
        name = "images" if "images" in members else next(iter(members))
        return read(name), read("labels") if "labels" in members else None


def read_npy(stream, bound: int) -> np.ndarray:
    """The array in a .npy stream of at most `bound` bytes. Raises ValueError, or what numpy does."""
    shape, order, dtype = _npy_header(stream)
    data = read_exactly(stream, prod(shape) * dtype.itemsize, bound)
    return data.view(dtype).reshape(shape, order=order)


def _npy_header(stream) -> tuple[tuple, str, np.dtype]:
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy version {version} is for other things than numbers")
    shape, fortran, dtype = readers[version](stream)
    if dtype.kind not in "uifb" or min(shape, default=1) < 0:
        raise ValueError(f"it holds {dtype} of shape {shape}")
    return shape, "F" if fortran else "C", dtype
