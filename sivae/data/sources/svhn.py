"""Street View House Numbers (Netzer et al., 2011), cropped digits: train_32x32.mat, test_32x32.mat, extra_32x32.mat.

MATLAB 5 files (MathWorks, "MAT-File Format"): after 128 bytes elements of (type, length, data), each perhaps
deflated; a matrix has as elements flags, dimensions, name and values, column by column. Only the two matrices that
the set is made of are understood, `X` [32, 32, 3, N] and `y` [N], so nothing in a file decides how much memory it takes.
"""

import re
import struct
import zlib
from math import prod

import numpy as np

from sivae.data.sources.arrays import InMemory
from sivae.data.sources.base import consecutive, fingerprint
from sivae.data.sources.files import MAX_RATIO, damage, find_file, find_files
from sivae.storage import Folder

NAME = re.compile(r"(train|test|extra)_32x32\.mat")
DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MATRIX, DEFLATED = 14, 15
HEADER_BYTES = 128
NUM_CLASSES = 10


class SVHN(InMemory):
    """A folder: `train`, `test` and `extra` where they are there. A single file has no splits. Label 10 stands for 0."""

    licence = (
        "Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, NIPS Workshop 2011; "
        "for non-commercial use only"
    )
    num_channels = 3

    def __init__(self, folder: Folder, name: str | None, labels: bool | None = None):
        self.asked = labels
        if name:
            self.files = [find_file(folder, name)]
        else:
            self.files = [file for file in find_files(folder) if NAME.fullmatch(file.name)]
            self.files.sort(key=lambda file: ["train", "test", "extra"].index(file.name.partition("_")[0]))
        self.parts = [file.identity[0] for file in self.files]
        self.description = f"SVHN {', '.join(self.parts)}"
        if not name:
            self.splits = consecutive({part.partition("_")[0]: count for part, count in zip(self.parts, self.counts)})
        self.num_classes = None if self.labels is None else NUM_CLASSES
        self.fingerprint = fingerprint("svhn", self.num_classes, [file.identity for file in self.files])

    def _load(self):
        images, labels = [], []
        for file in self.files:
            with damage(file.where, "download it again"):
                found = read_mat(file.read())
                pixels, classes = found["X"], found["y"].ravel(order="F")
                if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
                    raise ValueError(f"its X is {pixels.dtype} of {pixels.shape}")
                if (
                    len(classes) != pixels.shape[3]
                    or not len(classes)
                    or not np.isin(classes, range(NUM_CLASSES + 1)).all()
                ):
                    raise ValueError("its y is not one label of 1 to 10 for every image")
            images.append(pixels.transpose(3, 0, 1, 2))
            labels.append(classes.astype(np.int64) % NUM_CLASSES)
        counts = [len(part) for part in images]
        images = np.concatenate(images) if len(images) > 1 else images[0]
        return images, None if self.asked is False else np.concatenate(labels), counts


def read_mat(data: bytes) -> dict[str, np.ndarray]:
    """Real numeric matrices by name, as stored. Raises ValueError on what is damaged, or no such file."""
    if len(data) < HEADER_BYTES or data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        hint = ", save it with MATLAB's -v7 or scipy.io.savemat" if data[:20].startswith(b"MATLAB 7.3") else ""
        raise ValueError(f"it is no MATLAB 5 file{hint}")
    order = "<" if data[126:128] == b"IM" else ">"
    found = {}
    for kind, content in _elements(memoryview(data)[HEADER_BYTES:], order):
        if kind == DEFLATED:
            # A first stretch tells how long the element is, which bounds the second.
            start = zlib.decompressobj().decompress(content, 8)
            length = struct.unpack(f"{order}II", start)[1]
            if length > len(content) * MAX_RATIO:
                raise ValueError(f"it declares {length:,} bytes")
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(content, 8 + length)
            if unpacker.decompress(unpacker.unconsumed_tail, 1) or not unpacker.eof:  # compares zlib's checksum
                raise ValueError("a deflated part is longer than it says, or cut short")
            [(kind, content)] = _elements(memoryview(unpacked), order)
        if kind == MATRIX:
            found |= _matrix(content, order)
    return found


def _elements(data: memoryview, order: str):
    """(type, bytes) of each element one after the other."""
    position = 0
    while position < len(data):
        kind, length = struct.unpack_from(f"{order}II", data, position)
        if kind >> 16:  # a short one has its length in the type's upper half, and its data in place of the length
            kind, length, start, stop = kind & 0xFFFF, kind >> 16, position + 4, position + 8
        else:
            start = position + 8
            stop = start + length if kind == DEFLATED else start + -(-length // 8) * 8
        if start + length > len(data) or (stop == position + 8 and length > 4):
            raise ValueError(f"its element at byte {position} is cut short")
        yield kind, data[start : start + length]
        position = stop


def _matrix(content: memoryview, order: str) -> dict[str, np.ndarray]:
    (_, flags), (_, dimensions), (_, name), *values = _elements(content, order)
    if len(values) != 1 or values[0][0] not in DTYPES:  # texts, cells, structures, complex numbers
        return {}
    shape = tuple(struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions))
    dtype = np.dtype(DTYPES[values[0][0]]).newbyteorder(order)
    if min(shape) < 0 or prod(shape) * dtype.itemsize != len(values[0][1]):
        raise ValueError(f"its matrix of shape {shape} has {len(values[0][1])} bytes")
    return {bytes(name).decode("latin1"): np.frombuffer(values[0][1], dtype).reshape(shape, order="F")}
