"""Small files in the formats in which image sets are published, for the tests of sources."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib

import fsspec
import google_crc32c
import numpy as np
from PIL import Image

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(url, data: bytes):
    fs, path = fsspec.core.url_to_fs(os.fspath(url))
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    fs.pipe_file(path, data)


def png(pixels: np.ndarray, interlace: bool = False, **settings) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **settings)
    return interlaced(pixels) if interlace else buffer.getvalue()


def interlaced(pixels: np.ndarray) -> bytes:
    """Adam7, which Pillow does not write: seven passes of every so many rows and columns."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [
        b"\x00" + row.tobytes()
        for top, left, down, right in passes
        for row in pixels[top::down, left::right]
        if row.size
    ]

    return png_of_rows(rows, pixels.shape[1], pixels.shape[0], depth=8, colour=2, interlace=1)


def png_of_rows(rows: list[bytes], width: int, height: int, depth: int, colour: int, interlace: int = 0) -> bytes:
    """A PNG of any colour type and depth, whose rows come with the byte of their filter."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def write_ffhq(folder, images: str, flat: bool = False) -> list[np.ndarray]:
    """Images 0 and 2 of training and 10 of validation; the JSON as published, with landmarks, in another order."""
    import hashlib

    pictures, content = {i: noise(16, 16, 3, seed=i) for i in (10, 0, 2)}, {}
    for i, picture in pictures.items():
        data = png(picture)
        write(f"{folder}/{images}/{'' if flat else '00000/'}{i:05}.png", data)
        about = {
            "file_url": "https://example.org", "file_path": f"{images}/00000/{i:05}.png", "file_size": len(data),
            "file_md5": hashlib.md5(data).hexdigest(), "pixel_size": [16, 16],
            "pixel_md5": hashlib.md5(picture).hexdigest(), "face_landmarks": [[1.5, 2.5]] * 68,
        }  # fmt: skip
        other = about | {"file_path": f"in-the-wild-images/00000/{i:05}.png", "file_md5": "0" * 32}
        content[str(i)] = {
            "category": "validation" if i == 10 else "training",
            "metadata": {
                "photo_url": f"https://example.org/{i}", "photo_title": f"DSCF{i}.JPG", "author": f"Jürgen {i}",
                "country": "", "license": "Attribution License",
                "license_url": "https://creativecommons.org/licenses/by/2.0/",
                "date_uploaded": "2007-08-16", "date_crawled": "2018-10-10",
            },
            "image": about if images.startswith("images") else other,
            "thumbnail": other if images.startswith("images") else about,
            "in_the_wild": other | {"face_rect": [1, 2, 3, 4], "face_quad": [1.5] * 8},
        }  # fmt: skip
    write(f"{folder}/{images}/LICENSE.txt", b"CC BY-NC-SA 4.0")
    write(f"{folder}/ffhq-dataset-v2.json", json.dumps(content).encode())
    return [pictures[i] for i in (0, 2, 10)]


def write_zip(url, pictures: dict, labels, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, picture in reversed(pictures.items()):
            archive.writestr(name, png(picture))
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    write(url, buffer.getvalue())


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8 & 0xFFFFFFFF)


def varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def delimited(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def tfrecord(pixels: np.ndarray, shape=None, data=None) -> bytes:
    """A record of dataset_tool.py, encoded by hand: tf.train.Example of `shape` and `data`; pixels [C, H, W]."""
    shape, data = pixels.shape if shape is None else shape, pixels.tobytes() if data is None else data
    shape = delimited(3, delimited(1, b"".join(map(varint, shape))))
    data = delimited(1, delimited(1, data))
    entries = [
        delimited(1, delimited(1, name) + delimited(2, value)) for name, value in ((b"shape", shape), (b"data", data))
    ]
    example, length = delimited(1, b"".join(entries)), None
    length = struct.pack("<Q", len(example))
    return length + masked(length) + example + masked(example)


def cifar_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2's cPickle wrote the published ones: protocol 2, every string a SHORT_BINSTRING or BINSTRING."""
    memo = iter(range(1, 256))

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode() + put()

    def put() -> bytes:
        return b"q" + bytes([next(memo)])

    def number(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    parts = [b"\x80\x02}", put(), b"(", text("batch_label"), text("training batch 1 of 5"), text("labels"), b"]", put()]
    parts += [b"(", *(number(label) for label in labels), b"e", text("data")]
    parts += [b"cnumpy.core.multiarray\n_reconstruct\n", put(), b"cnumpy\nndarray\n", put(), b"K\x00\x85", put()]
    parts += [text("b"), b"\x87", put(), b"R", put(), b"(K\x01", number(len(pixels)), number(3072), b"\x86", put()]
    parts += [b"cnumpy\ndtype\n", put(), text("u1"), b"K\x00K\x01\x87", put(), b"R", put(), b"(K\x03", text("|")]
    parts += [b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t", put(), b"b\x89"]
    parts += [b"T", struct.pack("<i", pixels.size), pixels.tobytes(), put(), b"t", put(), b"b"]
    parts += [text("filenames"), b"]", put(), b"(", *(text(f"x_{i}.png") for i in range(len(labels))), b"eu."]
    return b"".join(parts)


def cifar_pickle_of_python_3(pixels: np.ndarray, labels: list[int]) -> bytes:
    content = {b"batch_label": b"training batch 1 of 5", b"labels": labels, b"data": pixels, b"filenames": []}
    return pickle.dumps(content, protocol=2)


def cifar_binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()


def write_cifar(place, encode, archive: bool, counts=(2, 1, 1, 1, 1, 2)) -> tuple[str, list[np.ndarray], list[int]]:
    """(path, pictures [32, 32, 3], labels) of a set in which training batches and the test batch have so many images."""
    pixels, labels = noise(sum(counts), 3072), [i % 10 for i in range(sum(counts))]
    binary = encode is cifar_binary
    folder, start, files = f"cifar-10-batches-{'bin' if binary else 'py'}", 0, {}
    for name, count in zip(BATCHES, counts):
        part = slice(start, start + count)
        files[f"{name}.bin" if binary else name] = encode(pixels[part], labels[part])
        start += count
    files["batches.meta.txt" if binary else "batches.meta"] = pickle.dumps({"label_names": ["airplane"]}, protocol=2)
    pictures = [each.reshape(3, 32, 32).transpose(1, 2, 0) for each in pixels]
    if archive:
        path = f"{place}/cifar-10-{'binary' if binary else 'python'}.tar.gz"
        write(path, tar([(f"{folder}/{name}", data) for name, data in reversed(files.items())], "w:gz"))
        return path, pictures, labels
    for name, data in files.items():
        write(f"{place}/{folder}/{name}", data)
    return f"{place}/{folder}", pictures, labels


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def tar(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
