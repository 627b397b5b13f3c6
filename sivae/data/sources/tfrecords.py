"""Multi-resolution TFRecords of ProGAN, StyleGAN and StyleGAN2 (NVlabs; FFHQ's `tfrecords` folder): NAME-rXX.tfrecords
with images of 2^XX pixels, and NAME-rxx.labels, one-hot rows in numpy's format.

Framing (TensorFlow, python_io, "TFRecords Format Details"): uint64 length, uint32 masked crc32c of it, data, uint32
masked crc32c of the data, all little-endian. Data is a tf.train.Example with `shape` (C, H, W) and `data`, raw bytes.
TensorFlow is not needed.
"""

import re
import struct
from functools import cache
from math import prod

import numpy as np

from sivae.data.sources.arrays import read_npy
from sivae.data.sources.base import BadImage, Sample, Source, fingerprint, natural_key, wanted_labels
from sivae.data.sources.files import File, damage, find_file, find_files
from sivae.errors import UserError, shown
from sivae.storage import Folder

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
MAX_SIDE = 16384
BATCH = 512  # headers asked for at once, where records seem to be of one length


class TFRecords(Source):
    """One .tfrecords file; of a folder, the one of `resolution`, else that of the highest."""

    def __init__(self, folder: Folder, name: str | None, labels: bool | None = None, resolution: int | None = None):
        self.file = find_file(folder, name) if name else _pick(folder, resolution)
        self.name = self.file.identity[0]
        self.description = f"TFRecords {self.name}"
        self.offsets, self.lengths = index_records(self.file)
        found = None if labels is False else self._read_labels()
        how = f"put {_labels_name(self.name)} beside it, with one-hot rows, or pack without labels"
        self.labels = wanted_labels(labels, found, self.file.where, how)
        self.num_classes = None if self.labels is None else int(self.labels.max()) + 1
        self.fingerprint = fingerprint("tfrecords", self.num_classes, self.file.identity)

    def _read_labels(self) -> np.ndarray | None:
        """int64 [N] from one-hot rows or numbers; None when there is no file of labels, or they are no classes."""
        name = _labels_name(self.name)
        if name == self.name or not self.file.folder.exists(name):
            return None
        file = find_file(self.file.folder, name)
        with damage(file.where, "copy it again, or pack without labels"):
            found = read_npy(file.open(), file.size)
            if len(found) != len(self):
                raise ValueError(f"it has {len(found)} rows for {len(self)} images")
            if found.ndim == 2 and found.shape[1] and (found.sum(axis=1) == 1).all() and np.isin(found, (0, 1)).all():
                return found.argmax(axis=1)
            if found.ndim == 1 and found.dtype.kind in "iu" and found.min() >= 0 and found.max() < 2**31:
                return found.astype(np.int64)
        return None

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i: int) -> Sample:
        start, length = int(self.offsets[i]), int(self.lengths[i])
        data = self.file.read(start, start + length + FOOTER.size)
        where = f"record {i} of {self.file.where}"
        with damage(where, "copy the file again", BadImage):
            if masked_crc32c(data[:length]) != FOOTER.unpack(data[length:])[0]:
                raise ValueError("its crc32c does not match")
            features = example_class().FromString(data[:length]).features.feature
            shape, values = list(features["shape"].int64_list.value), features["data"].bytes_list.value
            if len(shape) != 3 or shape[0] not in (1, 3) or not all(1 <= side <= MAX_SIDE for side in shape[1:]):
                raise ValueError(f"its shape is {shape[:9]} where [1 or 3, H, W] is right")
            if len(values) != 1 or len(values[0]) != prod(shape):
                raise ValueError(f"its data are not the {prod(shape)} bytes of its shape")
            pixels = np.ascontiguousarray(np.frombuffer(values[0], np.uint8).reshape(shape).transpose(1, 2, 0))
        return Sample(f"record {i} of {self.name}", pixels, None if self.labels is None else int(self.labels[i]))


def index_records(file: File) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, lengths) of the data of all records, int64 [N], from their headers alone.

    Records of one resolution have one length, so headers are asked for many at a time where the next ones should be.
    Raises UserError at a damaged header, and when the file is cut short.
    """
    offsets, lengths, position, stride = [], [], 0, None
    while position < file.size:
        last = file.size - HEADER.size
        expected = [position] if stride is None else range(position, max(last, position) + 1, stride)[:BATCH]
        with damage(file.where, "copy it again"):
            if position > last:
                raise ValueError("it is cut short")
            headers = file.read_many([(start, start + HEADER.size) for start in expected])
            for start, header in zip(expected, headers):
                if start != position:  # a record of another length lay before
                    break
                length, crc = HEADER.unpack(header)
                if masked_crc32c(header[:8]) != crc:
                    raise ValueError(f"the header at byte {start} is damaged")
                if length > file.size - start - HEADER.size - FOOTER.size:
                    raise ValueError("it is cut short")
                offsets.append(start + HEADER.size)
                lengths.append(length)
                stride = HEADER.size + length + FOOTER.size
                position += stride
    if not offsets:
        raise UserError(f"there are no images in {file.where}")
    return np.array(offsets, np.int64), np.array(lengths, np.int64)


def masked_crc32c(data: bytes) -> int:
    try:
        import google_crc32c
    except ImportError:
        raise UserError(
            "TFRecords need google-crc32c; `pip install google-crc32c` (the extra sivae[tfrecords])"
        ) from None
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def example_class():
    """tf.train.Example (tensorflow/core/example/example.proto and feature.proto) as far as it is needed here."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise UserError("TFRecords need protobuf, which comes with tensorboard; `pip install protobuf`") from None
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="sivae", syntax="proto3")

    def add(message, name: str, number: int, kind: int, *, of: str | None = None, repeated: bool = False):
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        message.field.add(name=name, number=number, type=kind, label=label, type_name=of)

    for name, kind in (("BytesList", field.TYPE_BYTES), ("Int64List", field.TYPE_INT64)):
        add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    add(feature, "bytes_list", 1, field.TYPE_MESSAGE, of=".sivae.BytesList")
    add(feature, "int64_list", 3, field.TYPE_MESSAGE, of=".sivae.Int64List")
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, of=".sivae.Feature")
    add(features, "feature", 1, field.TYPE_MESSAGE, of=".sivae.Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, field.TYPE_MESSAGE, of=".sivae.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("sivae.Example"))


def _pick(folder: Folder, resolution: int | None) -> File:
    files = [file for file in find_files(folder) if file.name.endswith(".tfrecords") and "/" not in file.name]
    levels = {int(found[1]): file for file in files if (found := re.search(r"-r(\d\d)\.tfrecords$", file.name))}
    if len(files) == 1:
        return files[0]
    if len(levels) != len(files):
        names = sorted((file.name for file in files), key=natural_key)
        raise UserError(
            f"{shown(folder.path)} holds more than NAME-r02.tfrecords, NAME-r03.tfrecords and so on of one set "
            f"({', '.join(names[:4])}, ...); give the one file to pack"
        )
    return next((file for level, file in levels.items() if 2**level == resolution), levels[max(levels)])


def _labels_name(name: str) -> str:
    return re.sub(r"(-r\d\d)?\.tfrecords$", "-rxx.labels", name)
