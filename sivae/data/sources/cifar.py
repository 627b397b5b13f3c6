"""CIFAR-10 (Krizhevsky, 2009), as https://www.cs.toronto.edu/~kriz/cifar.html publishes it: the python version
(folder cifar-10-batches-py or cifar-10-python.tar.gz) and the binary one (cifar-10-batches-bin, cifar-10-binary.tar.gz).

The python version is pickled; it is read by `cifar_pickle`, which runs none of its code.
"""

import gzip
import io
import re
import tarfile

import numpy as np

from sivae.data.sources.arrays import InMemory
from sivae.data.sources.base import consecutive, fingerprint
from sivae.data.sources.cifar_pickle import read_batch
from sivae.data.sources.files import File, damage, find_file, find_files
from sivae.errors import UserError, shown
from sivae.storage import Folder

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
NUM_CLASSES, SHAPE = 10, (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # bytes of an image in the binary version: its label, then red, green, blue
MAX_BATCH_BYTES, MAX_ARCHIVE_BYTES = 2**27, 2**29  # 31 MB and 186 MB are right


class CIFAR10(InMemory):
    """50,000 training and 10,000 test images, 32x32, RGB, in 10 classes."""

    licence = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; published without a licence"
    num_channels = 3

    def __init__(self, folder: Folder, name: str | None, labels: bool | None = None):
        self.asked = labels
        self.where = shown(folder.join(name) if name else folder.path)
        if name:
            self.files = [find_file(folder, name)]
        else:
            # data_batch_1 of the python version, data_batch_1.bin of the binary one
            self.files = [file for file in find_files(folder) if file.name.removesuffix(".bin") in BATCHES]
        self.num_classes = None if labels is False else NUM_CLASSES
        self.parts = BATCHES
        self.splits = consecutive({"train": sum(self.counts[:-1]), "test": self.counts[-1]})
        self.description = "CIFAR-10"
        self.fingerprint = fingerprint("cifar-10", self.num_classes, sorted(file.identity for file in self.files))

    def _load(self):
        with damage(self.where, "download it again"):
            if len(self.files) == 1 and self.files[0].name.endswith(".tar.gz"):
                found = _read_archive(self.files[0])
            else:
                if any(file.size > MAX_BATCH_BYTES for file in self.files):
                    raise ValueError(f"a batch has more than {MAX_BATCH_BYTES:,} bytes")
                found = {file.name: file.read() for file in self.files}
        binary = any(name.endswith(".bin") for name in found)
        names = [f"{name}.bin" for name in BATCHES] if binary else BATCHES
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"{self.where} lacks {', '.join(missing)}; download it again")
        images, labels = [], []
        for name in names:
            with damage(f"{name} in {self.where}", "download it again"):
                pixels, classes = (_read_binary if binary else read_batch)(found.pop(name))
                if not len(pixels) or classes.max() >= NUM_CLASSES:
                    raise ValueError("it has no images, or labels over 9")
            images.append(pixels.reshape(-1, *SHAPE).transpose(0, 2, 3, 1))
            labels.append(classes)
        counts = [len(part) for part in images]
        return np.concatenate(images), None if self.asked is False else np.concatenate(labels), counts


def _read_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 [N, 3072], labels [N])."""
    if len(data) % RECORD:
        raise ValueError(f"it has {len(data)} bytes where a multiple of {RECORD} is right")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    return records[:, 1:], records[:, 0].astype(np.int64)


class _Bounded(io.RawIOBase):
    """A stream that may hold so many bytes; a few of gzip can become any number, and tarfile reads what headers say."""

    def __init__(self, stream):
        self.stream, self.left = stream, MAX_ARCHIVE_BYTES

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes")
        return data


def _read_archive(file: File) -> dict[str, bytes]:
    """The batches in the archive. Names in it are compared, and never paths of files."""
    found = {}
    stream = _Bounded(gzip.GzipFile(fileobj=file.open()))
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = re.sub(".*/", "", member.name)
            if member.isreg() and name.removesuffix(".bin") in BATCHES and member.size <= MAX_BATCH_BYTES:
                found[name] = archive.extractfile(member).read()
    return found
