"""Proves that every kind of source is read as it is published: small files in the real formats give back their pixels,
labels, splits, names and attribution, in this process and in a copy of the source in another one; that images that are
missing or damaged are BadImage with their path, and everything else that is wrong is one UserError.

    python -m pytest tests/unit/test_data_sources.py
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import fsspec
import numpy as np
import pytest
import scipy.io
from PIL import Image

from sivae.data.index import Index, Shard
from sivae.data.sources import BadImage, open_source
from sivae.data.sources.cifar_pickle import read_batch
from sivae.data.sources.pictures import decode
from sivae.data.sources.svhn import read_mat
from sivae.errors import UserError
from sivae.storage import Folder
from tests.proxy import object_store
from tests.unit.source_files import (
    cifar_binary,
    cifar_pickle,
    cifar_pickle_of_python_3,
    idx,
    noise,
    png,
    png_of_rows,
    tar,
    tfrecord,
    write,
    write_cifar,
    write_ffhq,
    write_zip,
)


def check(source, pixels, labels=None, splits=None):
    """A source and its pickled copy hold these images, in this order, and the copy is small."""
    copy = pickle.dumps(source)
    assert len(copy) < 20_000
    for each in (source, pickle.loads(copy)):
        assert len(each) == len(pixels)
        samples = [each[i] for i in range(len(each))]
        for sample, expected in zip(samples, pixels):
            expected = expected if expected.ndim == 3 else expected[..., None]
            assert sample.pixels.dtype == np.uint8 and np.array_equal(sample.pixels, expected)
        assert [sample.label for sample in samples] == ([None] * len(pixels) if labels is None else list(labels))
        assert each.num_classes == (None if labels is None else max(labels) + 1) or each.num_classes == 10
        found = each.splits and {name: list(numbers) for name, numbers in each.splits.items()}
        assert found == splits and list(found or ()) == list(splits or ())
        assert each.num_channels == samples[0].pixels.shape[2]
        assert len({sample.name for sample in samples}) == len(samples)
    assert not any(text in source.description for text in ("/", "pytest"))
    return samples


def opened(path, **settings):
    return open_source(path, **({"resolution": 8} | settings))


def changed(path, change, **settings):
    """Whether the fingerprint stays while nothing changes, and changes with the source."""
    before = opened(path, **settings).fingerprint
    assert opened(path, **settings).fingerprint == before and len(before) == 64
    change()
    return opened(path, **settings).fingerprint != before


# Folders


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    """Where a source lies: a folder of this machine, or an object store (fsspec's own, in memory)."""
    if request.param == "local":
        yield str(tmp_path)
    else:
        yield f"memory://sources-{tmp_path.name}"
        fsspec.filesystem("memory").rm(f"/sources-{tmp_path.name}", recursive=True)


def test_folder(place):
    names = ["2.png", "10.png", "deep/1.jpg", ".hidden/1.png", ".3.png"]
    pictures = [noise(8, 6, 3, seed=i) for i in range(5)]
    for name, picture in zip(names, pictures):
        write(f"{place}/in/{name}", png(picture))
    source = opened(f"{place}/in")
    samples = check(source, pictures[:3])
    assert [sample.name for sample in samples] == names[:3] and source.description == "folder in"
    assert [sample.encoded for sample in samples] == [png(picture) for picture in pictures[:3]]
    assert changed(f"{place}/in", lambda: write(f"{place}/in/4.png", png(pictures[0])))
    assert changed(f"{place}/in", lambda: write(f"{place}/in/4.png", png(noise(9, 9, 3))))


def test_fingerprint_sees_times_and_options(tmp_path):
    for name in ("a/1.png", "b/1.png"):
        write(tmp_path / "in" / name, png(noise(4, 4)))
    assert opened(tmp_path / "in").fingerprint != opened(tmp_path / "in", labels=True).fingerprint
    assert changed(tmp_path / "in", lambda: os.utime(tmp_path / "in" / "a/1.png", (1, 1)))
    os.rename(tmp_path / "in", tmp_path / "moved")
    assert changed(tmp_path / "moved", lambda: os.rename(tmp_path / "moved/a", tmp_path / "moved/c"))


def test_marks_of_folders_in_an_object_store(caplog):
    """The empty objects that a web console makes for folders are no files."""
    with object_store("marks") as options:
        folder = Folder("s3://marks/set", options)
        for name in ("", "cats/", "dogs/"):
            folder.fs.pipe_file(f"marks/set/{name}", b"")
        for name in ("cats", "dogs"):
            folder.write(png(noise(8, 8)), name, "1.png")
        source = opened("s3://marks/set", labels=True, storage_options=options)
        assert (
            source.names == ["cats/1.png", "dogs/1.png"]
            and source.classes.tolist() == [0, 1]
            and "left out" not in caplog.text
        )


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folder_of_splits_with_classes(tmp_path, val):
    """StyleGAN v2's celeba_hq/{train,val}/{male,female}; training images come first, whatever their name."""
    names = [
        f"{split}/{kind}/{i}.png" for split in ("train", val, "test") for kind in ("female", "male") for i in (2, 10)
    ]
    for i, name in enumerate(names):
        write(tmp_path / "celeba_hq" / name, png(noise(4, 4, 3, seed=i)))
    splits = {"train": [0, 1, 2, 3], "validation": [4, 5, 6, 7], "test": [8, 9, 10, 11]}
    pictures = [noise(4, 4, 3, seed=i) for i in range(12)]
    samples = check(opened(tmp_path / "celeba_hq", labels=True), pictures, [0, 0, 1, 1] * 3, splits)
    assert [sample.name for sample in samples] == names
    check(opened(tmp_path / "celeba_hq"), pictures, None, splits)
    os.rename(tmp_path / "celeba_hq/test/male", tmp_path / "celeba_hq/test/mail")
    with pytest.raises(UserError, match="celeba_hq/.* has no class"):
        opened(tmp_path / "celeba_hq", labels=True)


@pytest.mark.parametrize(
    "names", [["train", "other"], ["val", "test"], ["train"], ["train", "val", "valid"], ["a", "b"]]
)
def test_folders_that_are_no_splits(tmp_path, names):
    for name in names:
        write(tmp_path / "in" / name / "1.png", png(noise(4, 4)))
    source = opened(tmp_path / "in", labels=True)
    assert source.splits is None and source.num_classes == len(names)
    write(tmp_path / "with" / "train" / "1.png", png(noise(4, 4)))
    write(tmp_path / "with" / "val" / "1.png", png(noise(4, 4)))
    assert opened(tmp_path / "with").splits is not None
    write(tmp_path / "with" / "0.png", png(noise(4, 4)))
    assert opened(tmp_path / "with").splits is None


def test_damaged_and_missing_images_of_a_folder(place):
    whole = png(noise(8, 8, 3))
    broken = {"cut": whole[:60], "empty": b"", "end": whole[:-12], "bit": whole[:50] + b"\x00" + whole[51:]}
    broken["crc"] = whole[:-16] + bytes([whole[-16] ^ 1]) + whole[-15:]  # the checksum of the pixels, and nothing else
    broken["text"], broken["huge"] = b"no image", whole[:16] + struct.pack(">II", 30000, 30000) + whole[24:]
    header = broken["huge"][12:29]
    broken["huge"] = broken["huge"][:29] + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    for name, data in broken.items():
        write(f"{place}/in/{name}.png", data)
    write(f"{place}/in/gone.png", whole)
    write(f"{place}/in/whole.png", whole)
    source = opened(f"{place}/in")
    fsspec.core.url_to_fs(f"{place}/in")[0].rm(fsspec.core.url_to_fs(f"{place}/in/gone.png")[1])
    bad = 0
    for i in range(len(source)):
        if source.names[i] == "whole.png":
            assert source[i].encoded == whole
            continue
        with pytest.raises(BadImage, match=rf"in/{source.names[i]} "):
            source[i]
        bad += 1
    assert bad == len(broken) + 1
    assert source.num_channels == 3  # of the first that can be read


def test_only_plain_png_is_copied():
    def saved(image, **settings):
        buffer = io.BytesIO()
        image.save(buffer, **({"format": "PNG"} | settings))
        return buffer.getvalue()

    rgb, grey = Image.fromarray(noise(6, 5, 3)), Image.fromarray(noise(6, 5))
    exif = Image.Exif()
    exif[0x0112] = 6
    text = saved(rgb, dpi=(72, 72))
    for data in (saved(rgb), saved(grey), text):
        pixels, encoded = decode(data, "x")
        assert encoded == data
    interlaced = png(noise(6, 5, 3), interlace=True)
    others = [
        saved(rgb.quantize(8)), saved(rgb.convert("RGBA")), saved(grey.convert("LA")), saved(grey.convert("1")),
        saved(Image.fromarray(noise(6, 5).astype(np.uint16) * 200)), saved(rgb, transparency=(1, 2, 3)),
        saved(rgb, exif=exif), saved(rgb) + b"x", saved(rgb, format="JPEG"), interlaced,
        saved(rgb, save_all=True, append_images=[Image.fromarray(noise(6, 5, 3, seed=1))]),
    ]  # fmt: skip
    for data in others:
        pixels, encoded = decode(data, "x")
        assert encoded is None and pixels.shape[2] in (1, 3)
    assert np.array_equal(decode(saved(rgb, exif=exif), "x")[0], np.rot90(np.asarray(rgb), -1))
    for broken in (b"Exif\0\0" + bytes(9), b"Exif\0\0MM\0*"):  # is no reason to leave an image out
        assert np.array_equal(decode(saved(rgb, exif=broken), "x")[0], rgb)


@pytest.mark.parametrize("colour, num_values", [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"])
def test_16_bits_become_8(colour, num_values):
    """Rounded where they are grey; of all others Pillow gives the upper 8."""
    values = np.array([0, 128, 129, 257, 385, 386, 32767, 32768, 65407, 65535], np.uint16)
    pixels = np.full((1, len(values), num_values), 65535, ">u2")  # opaque
    pixels[..., : 3 if colour in (2, 6) else 1] = values[:, None]
    data = png_of_rows([b"\0" + pixels.tobytes()], len(values), 1, depth=16, colour=colour)
    found, encoded = decode(data, "x")
    assert encoded is None and found.shape == (1, len(values), 1 if colour == 0 else 3)
    expected = np.rint(values / 257) if colour == 0 else values >> 8
    assert np.array_equal(found[0], np.repeat(expected[:, None], found.shape[2], axis=1))


# FFHQ


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("images", ["images1024x1024", "thumbnails128x128"])
def test_ffhq(place, images, flat):
    pictures = write_ffhq(f"{place}/ffhq", images, flat=flat)
    for verify in (None, "file", "pixels"):
        source = opened(f"{place}/ffhq", verify=verify)
        # 10 is after 2, and the JSON's order is another
        samples = check(source, pictures, None, {"train": [0, 1], "validation": [2]})
    assert samples[2].name == (f"{images}/00010.png" if flat else f"{images}/00000/00010.png")
    assert samples[0].metadata == {
        "photo_url": "https://example.org/0", "photo_title": "DSCF0.JPG", "author": "Jürgen 0", "country": "",
        "license": "Attribution License", "license_url": "https://creativecommons.org/licenses/by/2.0/",
    }  # fmt: skip
    assert samples[0].encoded == png(pictures[0]) and "BY-NC-SA 4.0" in source.licence
    assert source.description == f"FFHQ {images}"
    assert changed(f"{place}/ffhq", lambda: write(f"{place}/ffhq/{samples[0].name}", png(noise(9, 9, 3))))


def test_ffhq_that_is_not_whole(tmp_path):
    pictures = write_ffhq(tmp_path / "ffhq", "images1024x1024")
    with pytest.raises(UserError, match="no labels"):
        opened(tmp_path / "ffhq", labels=True)
    path = tmp_path / "ffhq/images1024x1024/00000/00002.png"
    path.write_bytes(png(pictures[1], compress_level=1))  # the same pixels in another file
    assert np.array_equal(opened(tmp_path / "ffhq", verify="pixels")[1].pixels, pictures[1])
    with pytest.raises(BadImage, match=r"md5 of the file .*00002\.png"):
        opened(tmp_path / "ffhq", verify="file")[1]
    path.write_bytes(png(pictures[0]))
    with pytest.raises(BadImage, match=r"md5 of the pixels of .*00002\.png"):
        opened(tmp_path / "ffhq", verify="pixels")[1]
    path.unlink()
    with pytest.raises(UserError, match=r"1 of the 3 images .* missing, .*00000/00002\.png"):
        opened(tmp_path / "ffhq")
    listing = tmp_path / "ffhq/ffhq-dataset-v2.json"
    whole = listing.read_text()
    for text in (
        "",
        "[]",
        "{}",
        "[" * 100000,
        whole[:-20],
        whole.replace("training", "other"),
        whole.replace('"image"', '"x"'),
    ):
        listing.write_text(text)
        with pytest.raises(UserError, match="ffhq-dataset-v2.json"):
            opened(tmp_path / "ffhq")


def test_checksums_are_only_ffhqs(tmp_path):
    write(tmp_path / "in" / "1.png", png(noise(4, 4)))
    with pytest.raises(UserError, match="only FFHQ"):
        opened(tmp_path / "in", verify="file")
    with pytest.raises(UserError, match="verify is 'x'"):
        opened(tmp_path / "in", verify="x")


# Zips


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stylegan_zip(place, compression):
    pictures = [noise(8, 8, 3, seed=i) for i in range(3)]
    names = ["00000/img00000002.png", "00000/img00000010.png", "00001/img00000000.png"]
    labels = [["00001\\img00000000.png", 6], [names[0], 2], [names[1], 0]]
    write_zip(f"{place}/set.zip", dict(zip(names, pictures)), labels, compression)
    source = opened(f"{place}/set.zip")
    samples = check(source, pictures, [2, 0, 6])
    assert [sample.name for sample in samples] == names and samples[0].encoded == png(pictures[0])
    assert source.description == "zip set.zip"
    check(opened(f"{place}/set.zip", labels=False), pictures)
    assert opened(f"{place}/set.zip", labels=False).fingerprint != source.fingerprint
    assert changed(f"{place}/set.zip", lambda: write_zip(f"{place}/set.zip", {"1.png": pictures[0]}, None))
    check(opened(f"{place}/set.zip"), pictures[:1])


def test_zip_labels_that_are_none(tmp_path, caplog):
    path = tmp_path / "set.zip"
    for labels in (None, [["1.png", [0.5, 1]]]):
        write_zip(path, {"1.png": noise(4, 4)}, labels)
        assert opened(path).num_classes is None
        with pytest.raises(UserError, match=r"set\.zip.*labels"):
            opened(path, labels=True)
    assert "left out" in caplog.text
    for labels, message in [([["2.png", 1]], "no label for 1.png"), ([1], ""), ({"a": 1}, ""), ("x", "")]:
        write_zip(path, {"1.png": noise(4, 4)}, labels)
        with pytest.raises(UserError, match=rf"dataset\.json in .*set\.zip.*{message}"):
            opened(path)


def test_bad_zips(tmp_path):
    path, whole = tmp_path / "set.zip", noise(8, 8, 3)
    write_zip(path, {"1.png": whole, "2.png": whole}, None)
    data = path.read_bytes()
    at = data.rindex(b"IDAT")  # of 1.png, which lies behind
    path.write_bytes(data[:at] + b"xxxx" + data[at + 4 :])
    source = opened(path)
    with pytest.raises(BadImage, match=r"1\.png in .*set\.zip"):
        source[0]
    assert np.array_equal(source[1].pixels, whole)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(UserError, match="no images"):
        opened(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("1.png", bytes(10**7))
    with pytest.raises(BadImage, match="deflate"):
        opened(path)[0]


def test_zip_bombs_are_not_unpacked(tmp_path):
    """A member that declares 10 bytes and holds 64 MB gives no more than what it declares."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(2**26))
    data = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(data.replace(struct.pack("<I", 2**26), struct.pack("<I", 10)))
    import tracemalloc

    source = opened(tmp_path / "set.zip")
    tracemalloc.start()
    with pytest.raises(BadImage, match="1.png"):
        source[0]
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


# TFRecords


def write_tfrecords(folder, levels=(2, 3), count=5, one_hot=True):
    pictures = {level: [noise(2**level, 2**level, 3, seed=10 * level + i) for i in range(count)] for level in levels}
    for level in levels:
        records = b"".join(tfrecord(picture.transpose(2, 0, 1)) for picture in pictures[level])
        write(f"{folder}/faces-r{level:02}.tfrecords", records)
    labels = np.arange(count) % 3
    with io.BytesIO() as file:
        np.save(file, np.eye(3, dtype=np.float32)[labels] if one_hot else np.full((count, 40), 0.5))
        write(f"{folder}/faces-rxx.labels", file.getvalue())
    return pictures, labels.tolist()


def test_tfrecords(place):
    pictures, labels = write_tfrecords(f"{place}/faces")
    samples = check(opened(f"{place}/faces"), pictures[3], labels)
    assert samples[2].name == "record 2 of faces-r03.tfrecords"
    check(opened(f"{place}/faces", resolution=4), pictures[2], labels)
    check(opened(f"{place}/faces", resolution=1024, labels=False), pictures[3])
    check(opened(f"{place}/faces/faces-r02.tfrecords", resolution=8), pictures[2], labels)
    assert changed(f"{place}/faces", lambda: write_tfrecords(f"{place}/faces", count=4))
    write_tfrecords(f"{place}/faces", one_hot=False)
    assert opened(f"{place}/faces").num_classes is None
    with pytest.raises(UserError, match="one-hot"):
        opened(f"{place}/faces", labels=True)


def test_tfrecords_of_many_lengths(tmp_path):
    """The next headers are read where they would be if all records were as long as the last; most here are not."""
    pictures = [noise(2, 2 + i // 700, 3, seed=i) for i in range(1500)]
    write(tmp_path / "a.tfrecords", b"".join(tfrecord(picture.transpose(2, 0, 1)) for picture in pictures))
    source = opened(tmp_path / "a.tfrecords")
    assert len(source) == 1500
    for i in (0, 511, 512, 513, 699, 700, 701, 1399, 1400, 1499):
        assert np.array_equal(source[i].pixels, pictures[i])


def test_damaged_tfrecords(tmp_path):
    pictures, _ = write_tfrecords(tmp_path / "faces", levels=(3,))
    path = tmp_path / "faces/faces-r03.tfrecords"
    whole = path.read_bytes()
    length = len(whole) // 5
    for data, message in [
        (whole[:-1], "cut short"),
        (whole[:-length] + whole[-length : 9 - length], "cut short"),
        (whole[:length] + b"x" + whole[length + 1 :], rf"header at byte {length} is damaged"),
        (b"", "no images"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"faces-r03\.tfrecords.*{message}|{message}.*tfrecords"):
            opened(tmp_path / "faces")
    path.write_bytes(whole[: length + 100] + bytes([whole[length + 100] ^ 1]) + whole[length + 101 :])
    source = opened(tmp_path / "faces")
    with pytest.raises(BadImage, match="record 1 of .*crc32c"):
        source[1]
    assert np.array_equal(source[2].pixels, pictures[3][2])
    for features in ({"shape": [3, 8, 9]}, {"shape": [4, 8, 8]}, {"shape": [3, 192]}, {"shape": []}, {"data": b""}):
        write(tmp_path / "one.tfrecords", tfrecord(noise(3, 8, 8), **features))
        with pytest.raises(BadImage, match=r"record 0 of .*one\.tfrecords"):
            opened(tmp_path / "one.tfrecords")[0]
    path.write_bytes(whole)
    source = opened(tmp_path / "faces")
    path.write_bytes(whole[:-4])  # somebody writes it again meanwhile
    with pytest.raises(UserError, match="bytes came where") as error:
        source[4]
    assert not isinstance(error.value, BadImage)
    write(tmp_path / "faces/other.tfrecords", whole)
    with pytest.raises(UserError, match="give the one file"):
        opened(tmp_path / "faces")


def test_a_missing_google_crc32c_is_one_sentence(tmp_path, monkeypatch):
    write(tmp_path / "one.tfrecords", tfrecord(noise(3, 8, 8)))
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(UserError, match=r"pip install google-crc32c"):
        opened(tmp_path / "one.tfrecords")


# CIFAR-10


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("encode", [cifar_pickle, cifar_pickle_of_python_3, cifar_binary])
def test_cifar(place, encode, archive):
    path, pictures, labels = write_cifar(place, encode, archive, counts=(3, 2, 2, 2, 2, 4))
    source = opened(path)
    samples = check(source, pictures, labels, {"train": list(range(11)), "test": [11, 12, 13, 14]})
    assert samples[3].name == "data_batch_2 image 0" and samples[14].name == "test_batch image 3"
    assert source.num_classes == 10 and opened(path, labels=False)[0].label is None
    assert changed(path, lambda: write_cifar(place, encode, archive, counts=(1, 1, 1, 1, 1, 2)))


def test_cifar_that_is_not_whole(tmp_path):
    path, _, _ = write_cifar(tmp_path, cifar_pickle, False)
    os.remove(os.path.join(path, "data_batch_3"))
    with pytest.raises(UserError, match=r"cifar-10-batches-py lacks data_batch_3"):
        opened(path)
    write(os.path.join(path, "data_batch_3"), cifar_pickle(noise(1, 3072), [10]))
    with pytest.raises(UserError, match="data_batch_3 .*labels over 9"):
        opened(path)
    for data in (b"", b"x", cifar_pickle(noise(1, 3072), [1])[:-5]):
        write(os.path.join(path, "data_batch_3"), data)
        with pytest.raises(UserError, match="data_batch_3 .* cannot be read"):
            opened(path)
    path, _, _ = write_cifar(tmp_path, cifar_binary, False)
    write(os.path.join(path, "test_batch.bin"), bytes(3074))
    with pytest.raises(UserError, match=r"test_batch\.bin .*3073"):
        opened(path)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_no_code_of_a_pickle_runs(tmp_path):
    marker = str(tmp_path / "ran")
    for protocol in range(6):
        for content in (Evil(marker), {b"data": Evil(marker), b"labels": [1]}):
            with pytest.raises(ValueError):
                read_batch(pickle.dumps(content, protocol=protocol))
    bombs = [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"\x80\x02cnumpy\nload\n.",
        b"\x80\x02c__builtin__\neval\n(U\x011tR.",
        b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",  # sets state on the stand-in itself
        b"\x80\x02" + b"(" * 10000 + b".",
        b"\x80\x02}U\x04data(K\x01K\x02tsU\x06labels]s.",
        b"\x80\x02T\xff\xff\xff\x7fx.",  # a text of 2 GB
    ]
    for bomb in bombs:
        with pytest.raises(Exception) as error:
            read_batch(bomb)
        assert not isinstance(error.value, MemoryError)
    assert not os.path.exists(marker)
    assert read_batch(cifar_pickle(noise(2, 3072), [1, 2]))[1].tolist() == [1, 2]


# idx


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("point", ["-", "."])
def test_mnist(place, zipped, point):
    pack, end = (gzip.compress, ".gz") if zipped else (bytes, "")
    pictures = {part: noise(count, 7, 5, seed=count) for part, count in (("train", 5), ("t10k", 3))}
    for part, images in pictures.items():
        write(f"{place}/mnist/{part}-images{point}idx3-ubyte{end}", pack(idx(images)))
        write(f"{place}/mnist/{part}-labels{point}idx1-ubyte{end}", pack(idx(np.arange(len(images), dtype=np.uint8))))
    images = [*pictures["train"], *pictures["t10k"]]
    samples = check(
        opened(f"{place}/mnist"), images, [0, 1, 2, 3, 4, 0, 1, 2], {"train": [0, 1, 2, 3, 4], "test": [5, 6, 7]}
    )
    assert samples[5].name == f"t10k-images{point}idx3-ubyte{end} image 0"
    check(opened(f"{place}/mnist/t10k-images{point}idx3-ubyte{end}"), images[5:], [0, 1, 2])
    check(opened(f"{place}/mnist", labels=False), images, None, {"train": [0, 1, 2, 3, 4], "test": [5, 6, 7]})
    name = f"{place}/mnist/train-images{point}idx3-ubyte{end}"
    assert changed(f"{place}/mnist", lambda: write(name, pack(idx(noise(5, 7, 5, seed=9)) + b"")) or _touch(name))


def _touch(url):
    if "://" not in url:
        os.utime(url, (1, 1))


def test_bad_idx(tmp_path):
    whole = idx(noise(4, 6, 6))
    path = tmp_path / "train-images-idx3-ubyte"
    for data, message in [
        (b"", "no idx"),
        (whole[:10], "no idx"),
        (whole[:-1], "ends after"),
        (whole + b"x", "goes on"),
        (b"\x00\x00\x0d\x03" + whole[4:], "no idx"),
        (whole[:4] + b"\xff" * 12 + whole[16:], "declares"),
        (gzip.compress(whole)[:-20], "cannot be read"),
        (gzip.compress(whole[:-1]), "ends after"),
        (gzip.compress(whole + bytes(2**20)), "goes on"),
        (gzip.compress(whole[:4] + b"\x00\x10\x00\x00" * 3), "declares"),
        (idx(noise(0, 6, 6)), "shape"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"train-images-idx3-ubyte.*{message}"):
            opened(tmp_path)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="labels-idx1"):
        opened(tmp_path, labels=True)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(UserError, match="3 labels for 4 images"):
        opened(tmp_path)


# SVHN


def save_mat(path, images, labels, **settings):
    with io.BytesIO() as file:
        scipy.io.savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": np.array(labels)[:, None]}, **settings)
        write(path, file.getvalue())


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])  # the published y is double
def test_svhn(place, compressed, dtype):
    parts = {"train": noise(4, 32, 32, 3), "test": noise(2, 32, 32, 3, seed=1), "extra": noise(3, 32, 32, 3, seed=2)}
    labels = {"train": [1, 10, 9, 10], "test": [10, 2], "extra": [3, 3, 3]}
    for name, images in parts.items():
        path = f"{place}/svhn/{name}_32x32.mat"
        save_mat(path, images, np.array(labels[name], dtype), do_compression=compressed)
    samples = check(
        opened(f"{place}/svhn"), [*parts["train"], *parts["test"], *parts["extra"]], [1, 0, 9, 0, 0, 2, 3, 3, 3],
        {"train": [0, 1, 2, 3], "test": [4, 5], "extra": [6, 7, 8]},
    )  # fmt: skip
    assert samples[8].name == "extra_32x32.mat image 2"
    check(opened(f"{place}/svhn/test_32x32.mat"), parts["test"], [0, 2])
    path = f"{place}/svhn/test_32x32.mat"
    assert changed(f"{place}/svhn", lambda: save_mat(path, parts["extra"], [1, 1, 1]))


def test_read_mat_agrees_with_scipy():
    content = {"a": np.arange(6).reshape(2, 3), "text": "x", "b": np.array([[1.5]]), "X": noise(2, 3, 4, 5), "c": 1j}
    for compressed in (False, True):
        file = io.BytesIO()
        scipy.io.savemat(file, content, do_compression=compressed)
        found, expected = read_mat(file.getvalue()), scipy.io.loadmat(io.BytesIO(file.getvalue()))
        assert sorted(found) == ["X", "a", "b"]  # what is text or complex is left alone
        for name in found:
            assert np.array_equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype


def test_bad_svhn(tmp_path):
    path = tmp_path / "train_32x32.mat"
    save_mat(path, noise(4, 32, 32, 3), [1, 2, 3, 4], do_compression=True)
    whole = path.read_bytes()
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    for data in (
        b"",
        whole[:100],
        whole[:-10],
        whole[:200] + b"x" + whole[201:],
        hdf5,
        whole[:128],
        whole[:128] + bytes(8),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"train_32x32\.mat"):
            opened(path)
    for images, labels in [
        (noise(4, 32, 31, 3), [1] * 4), (noise(4, 32, 32, 3), [1] * 3), (noise(4, 32, 32, 3), [11] * 4),
        (noise(4, 32, 32, 3) / 2, [1] * 4), (noise(4, 32, 32, 3), [0.5] * 4),
    ]:  # fmt: skip
        save_mat(path, images, labels)
        with pytest.raises(UserError, match=r"train_32x32\.mat"):
            opened(path)


# Cars3D and KTH


def save_car(path, views, **settings):
    """views [24, 4, H, W, 3], the published way round."""
    with io.BytesIO() as file:
        scipy.io.savemat(file, {"im": views.transpose(2, 3, 4, 0, 1)}, **settings)
        write(path, file.getvalue())


@pytest.mark.parametrize("compressed", [False, True])
def test_cars3d(place, compressed):
    cars = {number: noise(96, 6, 5, 3, seed=number).reshape(24, 4, 6, 5, 3) for number in (2, 10)}
    for number, views in cars.items():
        save_car(f"{place}/cars/car_{number}_mesh.mat", views, do_compression=compressed)
    pixels = [*cars[2].reshape(96, 6, 5, 3), *cars[10].reshape(96, 6, 5, 3)]
    samples = check(opened(f"{place}/cars"), pixels, [0] * 96 + [1] * 96)
    assert samples[96 + 4 * 7 + 3].name == "car_10_mesh azimuth 7 elevation 3"
    assert np.array_equal(samples[96 + 4 * 7 + 3].pixels, cars[10][7, 3])
    check(opened(f"{place}/cars", labels=False), pixels)
    assert changed(f"{place}/cars", lambda: save_car(f"{place}/cars/car_3.mat", cars[2], do_compression=compressed))


def test_the_last_20_cars_are_the_test_split(tmp_path):
    for number in range(23):
        save_car(tmp_path / f"car_{number:03}_mesh.mat", np.zeros((24, 4, 1, 1, 3), np.uint8))
    source = opened(tmp_path)
    assert source.splits == {"train": range(3 * 96), "test": range(3 * 96, 23 * 96)} and source.num_classes == 23


@pytest.mark.parametrize("views", [np.zeros((24, 3, 2, 2, 3), np.uint8), np.zeros((24, 4, 2, 2, 3)), None])
def test_bad_cars3d(tmp_path, views):
    path = tmp_path / "car_001_mesh.mat"
    save_car(path, np.zeros((24, 4, 2, 2, 3), np.uint8) if views is None else views)
    if views is None:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadImage, match=r"car_001_mesh\.mat cannot be read .*; download it again"):
        opened(tmp_path)[0]


def test_pictures_with_a_mat_file_among_them_are_pictures(tmp_path):
    save_car(tmp_path / "notes.mat", np.zeros((24, 4, 2, 2, 3), np.uint8))
    (tmp_path / "a.png").write_bytes(png(noise(4, 4, 3)))
    assert len(opened(tmp_path)) == 1


def save_video(path, frames):
    """MPEG-4 in AVI, as KTH's are, of grey frames [N, H, W]."""
    av = pytest.importorskip("av")
    with io.BytesIO() as file:
        with av.open(file, "w", format="avi") as video:
            stream = video.add_stream("mpeg4", rate=25)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], "yuv420p"
            stream.bit_rate = 4_000_000
            for frame in frames:
                video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray").reformat(format="yuv420p")))
            video.mux(stream.encode())
        write(path, file.getvalue())


def test_kth(place):
    """Frames come in order, with the person as their class; values to what MPEG-4 leaves of them."""
    levels = {"person03_handwaving_d4": [40, 90, 140], "person11_boxing_d1": [200, 60]}
    for name, values in levels.items():
        frames = np.stack([np.full((32, 48), value, np.uint8) for value in values])
        save_video(f"{place}/kth/{name}_uncomp.avi", frames)
    source = opened(f"{place}/kth")
    copy = pickle.loads(pickle.dumps(source))
    for each in (source, copy):
        samples = [each[i] for i in (4, 0, 1, 2, 3)]
        assert len(each) == 5 and each.num_classes == 2 and each.num_channels == 1
        assert [sample.label for sample in samples] == [1, 0, 0, 0, 1]
        assert all(sample.pixels.shape == (32, 48, 1) for sample in samples)
        assert [sample.pixels.mean() for sample in samples] == pytest.approx([60, 40, 90, 140, 200], abs=4)
    assert samples[3].name == "person03_handwaving_d4_uncomp.avi frame 2"
    assert opened(f"{place}/kth", labels=False)[0].label is None


def test_bad_kth(tmp_path, monkeypatch):
    path = tmp_path / "person01_walking_d2_uncomp.avi"
    save_video(path, noise(2, 32, 32))
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[:-10], b"x" * 1000, b"RIFF" + bytes(1000)):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"person01_walking_d2_uncomp\.avi cannot be read .*; download it again"):
            opened(tmp_path)
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'sivae\[video\]'"):
        opened(tmp_path)


# Arrays


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(place, order):
    data = np.asarray(noise(5, 6, 4, 3), order=order)
    with io.BytesIO() as file:
        np.save(file, data)
        write(f"{place}/a.npy", file.getvalue())
    samples = check(opened(f"{place}/a.npy"), data)
    assert samples[3].name == "sample 3 of a.npy"
    with io.BytesIO() as file:
        np.savez_compressed(file, images=(data / 255).astype(np.float16), labels=[2, 0, 1, 1, 0])
        write(f"{place}/b.npz", file.getvalue())
    expected = ((data / 255).astype(np.float16).astype(np.float64) * 255).round().astype(np.uint8)
    check(opened(f"{place}/b.npz"), expected, [2, 0, 1, 1, 0])
    check(opened(f"{place}/b.npz", labels=False), expected)


def test_array_headers_are_not_believed(tmp_path):
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    for shape in ("(99999999, 999, 999)", "(-1, 4, 4)", "(10**9,)", "(9999999999999999999999, 4, 4)"):
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
        (tmp_path / "a.npy").write_bytes(header + text + bytes(48))
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", header + text + bytes(48))
        for name in ("a.npy", "a.npz"):
            with pytest.raises(UserError, match=f"{name} cannot be read"):
                opened(tmp_path / name)


def test_float_sample_out_of_range_is_a_bad_image(tmp_path):
    data = np.zeros((3, 4, 4))
    data[1, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", data)
    source = opened(tmp_path / "a.npy")
    assert source[0].pixels.max() == 0
    with pytest.raises(BadImage, match=r"sample 1 of .*a\.npy"):
        source[1]


def test_digits_are_a_source():
    source = open_source("digits:", resolution=16)
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == 1797 and np.array_equal(copy[5].pixels, source[5].pixels) and copy.num_channels == 1
    assert source.fingerprint == open_source("digits:", resolution=16).fingerprint
    assert source.fingerprint != open_source("digits:", resolution=8).fingerprint


# Tars and packed sets


def shard(first, count, labels=True, metadata=True):
    members = []
    for i in range(first, first + count):
        key = f"set/{i:05}"
        members += [(f"{key}.cls", b"%d\n" % (i % 3))] if labels else []
        members += [(f"{key}.json", json.dumps({"author": f"Ä{i}"}).encode())] if metadata else []
        members += [(f"{key}.jpg", png(noise(6, 6, 3, seed=i))), (f"{key}.txt", b"a caption")]
    return tar(members)


def test_shards_of_others(place):
    for i in range(3):
        write(f"{place}/set/shards-{i:06}.tar", shard(4 * i, 4))
    pictures, labels = [noise(6, 6, 3, seed=i) for i in range(12)], [i % 3 for i in range(12)]
    for source in (f"{place}/set/shards-{{000000..000002}}.tar", f"{place}/set"):
        samples = check(opened(source), pictures, labels)
        assert samples[5].name == "shards-000001.tar set/00005" and samples[5].metadata == {"author": "Ä5"}
    check(opened(f"{place}/set/shards-000001.tar", labels=False), pictures[4:8])
    assert changed(f"{place}/set", lambda: write(f"{place}/set/shards-000001.tar", shard(4, 3)))
    write(f"{place}/set/shards-000001.tar", shard(4, 4, labels=False, metadata=False))
    with pytest.raises(UserError, match=r"set/00004 in .*000001\.tar.* no \.cls"):
        opened(f"{place}/set")
    check(opened(f"{place}/set", labels=False), pictures)
    with pytest.raises(UserError, match=r"shards-000003\.tar"):
        opened(f"{place}/set/shards-{{000000..000003}}.tar")


def test_a_local_name_has_no_query(tmp_path):
    (tmp_path / "what?.tar").write_bytes(shard(0, 3))
    assert len(opened(tmp_path / "what?.tar")) == 3


def test_damaged_shards_are_refused(tmp_path):
    path, whole = tmp_path / "a.tar", shard(0, 3)
    for at in (0, 100, 512, 1536, 4096, len(whole) // 2 // 512 * 512):
        path.write_bytes(whole[:at])
        with pytest.raises(UserError, match=r"a\.tar|no images"):
            opened(path)
    headers = [m.offset for m in tarfile.open(fileobj=io.BytesIO(whole))]
    for at in headers:
        path.write_bytes(whole[: at + 10] + b"\xff" + whole[at + 11 :])
        with pytest.raises(UserError, match=r"a\.tar"):
            opened(path)
    picture = png(noise(4, 4))
    for members, message in [
        ([("a.png", picture), ("a.jpg", picture)], "two of one kind"),
        ([("a.png", picture), ("a.cls", b"cat")], "whole number"),
        ([("a.png", picture), ("a.cls", b"9" * 30)], "whole number"),
        ([("a.txt", b"x")], "no images"),
    ]:
        path.write_bytes(tar(members))
        with pytest.raises(UserError, match=message):
            opened(path)
    path.write_bytes(tar([("a.png", picture), ("b.png", b"x"), ("c.png", picture), ("c.json", b"{")]))
    source = opened(path)
    assert np.array_equal(source[0].pixels[..., 0], noise(4, 4))
    for i, message in [(1, "b in .*a.tar"), (2, "json of c in .*a.tar")]:
        with pytest.raises(BadImage, match=message):
            source[i]


def test_tars_among_photographs_are_left_alone(tmp_path):
    write(tmp_path / "in" / "1.png", png(noise(4, 4)))
    write(tmp_path / "in" / "backup.tar", shard(0, 1))
    check(opened(tmp_path / "in"), [noise(4, 4)])


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_packed_set(place, metadata, elsewhere):
    """Its splits, labels, licence and attribution carry over; its shards may lie in another folder."""
    pictures, shards, rows = [noise(6, 6, 3, seed=i) for i in range(5)], [], []
    for first, last in ((0, 3), (3, 5)):
        members = []
        for i in range(first, last):
            members += [(f"{i:08}.json", json.dumps({"author": f"Ä{i}"}).encode())] if metadata else []
            members.append((f"{i:08}.png", png(pictures[i])))
        data = tar(members)
        shards.append(Shard(f"shard-{len(shards):06}.tar", len(data), last - first))
        write(f"{place}/{'shards' if elsewhere else 'set'}/{shards[-1].name}", data)
        found = [member for member in tarfile.open(fileobj=io.BytesIO(data)) if member.name.endswith(".png")]
        rows += [(m.offset_data, m.size, zlib.crc32(data[m.offset_data : m.offset_data + m.size])) for m in found]
    offset, size, crc32 = np.array(rows).T
    index = Index(
        resolution=6, num_channels=3, num_classes=3, image_format="png", source="digits", licence="mine",
        splits={"train": 3, "test": 2}, base=f"{place}/shards" if elsewhere else None, shards=tuple(shards),
        key=[f"{i:08}" for i in range(5)], offset=offset, size=size, crc32=crc32, label=np.array([0, 2, 1, 1, 0]),
    )  # fmt: skip
    index.dump(Folder(f"{place}/set"))
    source = opened(f"{place}/set")
    splits = {"train": [0, 1, 2], "test": [3, 4]}
    samples = check(source, pictures, [0, 2, 1, 1, 0], splits)
    assert [sample.metadata for sample in samples] == [{"author": f"Ä{i}"} if metadata else None for i in range(5)]
    assert samples[4].encoded == png(pictures[4]) and source.licence == "mine"
    assert samples[4].name == "sample 00000004 of shard-000001.tar"
    check(opened(f"{place}/set", labels=False), pictures, None, splits)


# What a source is, whatever its kind


def test_another_process_reads_the_same(tmp_path):
    """By spawn, where nothing is inherited, and by fork, where everything is."""
    pictures = [noise(8, 8, 3, seed=i) for i in range(3)]
    write_zip(tmp_path / "set.zip", {f"{i}.png": picture for i, picture in enumerate(pictures)}, None)
    write_cifar(tmp_path, cifar_pickle, True)
    write_tfrecords(tmp_path / "faces")
    code = (
        "import pickle, sys, hashlib\n"
        "for s in pickle.load(open(sys.argv[1], 'rb')):\n"
        "    print(hashlib.sha256(b''.join(s[i].pixels.tobytes() for i in range(len(s)))).hexdigest())"
    )
    sources = [opened(tmp_path / name) for name in ("set.zip", "cifar-10-python.tar.gz", "faces")]
    expected = [hashlib.sha256(b"".join(s[i].pixels.tobytes() for i in range(len(s)))).hexdigest() for s in sources]
    (tmp_path / "sources.pickle").write_bytes(pickle.dumps(sources))
    command = [sys.executable, "-c", code, str(tmp_path / "sources.pickle")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == expected
    reader, writer = os.pipe()
    if not (child := os.fork()):
        found = [hashlib.sha256(b"".join(s[i].pixels.tobytes() for i in range(len(s)))).hexdigest() for s in sources]
        os.write(writer, " ".join(found).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1000).decode().split() == expected


class FlakyFileSystem(fsspec.get_filesystem_class("memory")):
    """A store whose reads fail so many times, as a network does."""

    protocol, failures = "flaky", 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        if type(self).failures > 0:
            type(self).failures -= 1
            raise TimeoutError("the store does not answer")
        return super().cat_file(path, start, end, **kwargs)


def test_a_network_that_fails_is_asked_again_and_is_no_bad_image(tmp_path):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    name = f"flaky-{tmp_path.name}"
    write(f"memory://{name}/1.png", png(noise(4, 4)))
    source = open_source(f"flaky://{name}", resolution=4)
    source.folder.backoff_sec = 0.001
    FlakyFileSystem.failures = 4
    assert np.array_equal(source[0].pixels[..., 0], noise(4, 4))
    FlakyFileSystem.failures = 5
    with pytest.raises(UserError, match=r"1\.png could not be read, 5 times .*does not answer") as error:
        source[0]
    assert not isinstance(error.value, BadImage)
    FlakyFileSystem.failures = 0


def test_what_is_no_source(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for source, message in [("absent", "no source"), ("a.txt", "is no source.*TFRecords|is no source.*tfrecords")]:
        with pytest.raises(UserError, match=message):
            opened(tmp_path / source)
    with pytest.raises(UserError, match="nowhere"):
        opened("nowhere://bucket/x")
