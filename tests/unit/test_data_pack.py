"""Proves that what `pack` writes is what the sources hold: plain webdataset reads it with equal pixels, the same bytes
come out of any number of processes and of a run that was stopped, splits, crops, pyramids and copies are what they
say, every kind of image is converted rightly, and what cannot be packed is refused with its name.

    python -m pytest tests/unit/test_data_pack.py
"""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from sivae.data import ImageStream, Index, pack_shard
from sivae.data.fit import crop_box, pyramid
from sivae.data.names import read_names
from sivae.data.pack import fit, pack, pack_once
from sivae.data.scratch import Scratch
from sivae.data.sources import natural_key, open_source, to_uint8
from sivae.data.splits import assign
from sivae.errors import UserError
from sivae.storage import Folder
from tests.processes import TIMEOUT_SEC, environment


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def packed(tmp_path, images, name="set", **settings):
    """The images as a packed set; returns (folder, index)."""
    np.save(tmp_path / f"{name}.npy", images)
    settings = {"resolution": images.shape[1], "samples_per_shard": 4, "progress": False} | settings
    return str(tmp_path / name), pack(tmp_path / f"{name}.npy", tmp_path / name, **settings)


def test_digits_are_the_published_pixels(tmp_path):
    from sklearn.datasets import load_digits

    digits, source = load_digits(), open_source("digits:", resolution=16)
    assert len(source) == 1797 and source.num_classes == 10
    x = torch.from_numpy(digits.images).float()[:, None] / 16
    x = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", align_corners=False)
    expected = (x * 255).round().byte().numpy()
    for i in (0, 1, 700, 1796):
        assert np.array_equal(source[i].pixels[..., 0], expected[i, 0]) and source[i].label == digits.target[i]
    assert open_source("digits:", resolution=16, labels=False)[0].label is None


@pytest.mark.parametrize("image_format", ["png", "qoi", "webp", "jpeg"])
def test_plain_webdataset_reads_the_shards(tmp_path, image_format):
    settings = {"resolution": 8, "samples_per_shard": 700, "splits": "train=0:1500,test=1500:", "progress": False}
    found = pack("digits:", tmp_path / "set", image_format=image_format, **settings)
    assert [s.count for s in found.shards] == [500, 500, 500, 297] and found.splits == {"train": 1500, "test": 297}
    source, i = open_source("digits:", resolution=8), -1
    for pattern in ("train-{000000..000002}.tar", "test-000000.tar"):
        samples = webdataset.WebDataset(str(tmp_path / "set" / pattern), shardshuffle=False, empty_check=True)
        for i, sample in enumerate(samples, i + 1):
            assert sample["__key__"] == found.key[i] == f"{i:08d}"
            assert int(sample["cls"]) == source[i].label == found.label[i]
            encoded = sample[{"jpeg": "jpg"}.get(image_format, image_format)]
            image = np.asarray(Image.open(io.BytesIO(encoded)).convert("L")).astype(int)
            assert np.abs(image - source[i].pixels[..., 0]).max() <= (12 if image_format == "jpeg" else 0)
    assert i == 1796


def everything(folder):
    """Relative path -> bytes of every file."""
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(path, folder): open(path, "rb").read() for path in paths}


def test_any_number_of_processes_gives_the_same_bytes(tmp_path):
    settings = {"resolution": 8, "splits": "validation=20%", "pyramid": True, "progress": False}
    found = []
    for workers in (0, 1, 3):
        pack("digits:", tmp_path / str(workers), shard_size_bytes=300_000, num_workers=workers, **settings)
        found.append(everything(tmp_path / str(workers)))
    assert found[0] == found[1] == found[2]
    names = [f"{split}-{i:06d}.tar" for split, count in (("train", 10), ("validation", 3)) for i in range(count)]
    assert sorted(found[0]) == sorted(f"{level}/{name}" for level in (4, 8) for name in [*names, "index.json"])


def test_the_digest_tells_sets_apart(tmp_path):
    digests = [
        pack("digits:", tmp_path / str(i), resolution=8, progress=False, **settings).digest
        for i, settings in enumerate([{}, {"samples_per_shard": 999}, {"labels": False}, {"image_format": "webp"}])
    ]
    assert len(set(digests)) == 4


def test_index_survives_dump_and_load(tmp_path):
    folder, made = packed(tmp_path, noise(10, 6, 6, 3), licence="mine")
    loaded = Index.load(Folder(folder))
    assert loaded._content() == made._content() and loaded.digest == made.digest
    assert (loaded.num_channels, loaded.resolution, loaded.licence, loaded.label) == (3, 6, "mine", None)
    assert loaded.shard.tolist() == [0] * 3 + [1] * 3 + [2] * 4


def test_shards_end_by_size(tmp_path):
    # noise of 768 bytes does not compress: with its header and padding a sample has 1536 bytes, three have 4608
    _, made = packed(tmp_path, noise(10, 16, 16, 3), samples_per_shard=None, shard_size_bytes=4700)
    assert [s.count for s in made.shards] == [2, 3, 2, 3]
    assert [s.name for s in made.shards] == [f"train-{i:06d}.tar" for i in range(4)]
    large = noise(40, 64, 64, 3)
    _, made = packed(tmp_path, large, "large", samples_per_shard=None, shard_size_bytes=130_000)
    assert [s.count for s in made.shards] == [10] * 4 and all(120_000 < s.size_bytes < 145_000 for s in made.shards)


@pytest.mark.parametrize("shape", [(5, 6, 6), (5, 6, 6, 1), (5, 6, 6, 3), (5, 1, 6, 6), (5, 3, 6, 6)])
@pytest.mark.parametrize("kind", ["uint8", "float32", "npz"])
def test_arrays(tmp_path, shape, kind):
    data, path = noise(*shape), tmp_path / "a.npy"
    if kind == "npz":
        path = tmp_path / "a.npz"
        np.savez(path, images=data, labels=[0, 2, 1, 2, 0])
    else:
        np.save(path, data if kind == "uint8" else (data / 255).astype(np.float32))
    made = pack(path, tmp_path / "set", resolution=6, progress=False)
    expected = data[:, None] if data.ndim == 3 else data if shape[1] in (1, 3) else data.transpose(0, 3, 1, 2)
    batch = ImageStream(tmp_path / "set", batch_size=1).sample(range(5))
    assert np.array_equal(batch.images.numpy(), expected)
    assert made.num_classes == (3 if kind == "npz" else None)
    labels = None if batch.labels is None else batch.labels.tolist()
    assert labels == ([0, 2, 1, 2, 0] if kind == "npz" else None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.001, 1.001])
def test_bad_floats_are_named(tmp_path, bad):
    data = np.full((6, 4, 4), 0.5, np.float32)
    data[3, 1, 2] = data[5] = bad
    with pytest.raises(UserError, match=r"sample 3 of .*set\.npy.*\[0, 1\]"):
        packed(tmp_path, data)
    assert not os.path.exists(tmp_path / "set" / "index.json")


@pytest.mark.parametrize(
    "data, message",
    [
        (np.zeros((3, 4, 4), np.int64), "int64"),
        (np.zeros((3, 4, 4, 2), np.uint8), "shape"),
        (np.zeros((3, 4), np.uint8), "shape"),
        (np.zeros((0, 4, 4), np.uint8), "no images"),
        (np.array([{}] * 3), "cannot be read"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, data, message):
    np.save(tmp_path / "a.npy", data)
    with pytest.raises(UserError, match=message):
        pack(tmp_path / "a.npy", tmp_path / "set", resolution=4, progress=False)


def test_damaged_arrays(tmp_path):
    np.savez(tmp_path / "whole.npz", images=noise(3, 4, 4))
    whole = (tmp_path / "whole.npz").read_bytes()
    for i, data in enumerate([b"", b"PK", whole[:100], whole[:-30], b"\x93NUMPY\x01\x00" + b"\xff" * 40]):
        for suffix in ("npy", "npz"):
            path = tmp_path / f"{i}.{suffix}"
            path.write_bytes(data)
            with pytest.raises(UserError, match=path.name):
                pack(path, tmp_path / "set", resolution=4, progress=False)


def test_folder_order_crop_and_resize(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    names = ["2.png", "10.png", "deep/1.png", ".hidden/1.png"]
    for i, name in enumerate(names):
        Image.fromarray(noise(8, 14, 3, seed=i)).save(tmp_path / "in" / name)
    pack(tmp_path / "in", tmp_path / "set", resolution=8, progress=False)
    images = ImageStream(tmp_path / "set", batch_size=1).sample([0, 1, 2]).images.numpy()
    for i in range(3):  # 14 wide, so that columns 3 .. 10 are the central square
        assert np.array_equal(images[i], noise(8, 14, 3, seed=i)[:, 3:11].transpose(2, 0, 1))
    small = fit(noise(8, 14, 3), 4, 3)
    assert np.array_equal(small, Image.fromarray(noise(8, 14, 3)[:, 3:11]).resize((4, 4), Image.LANCZOS))
    names = ["a/b9", "a/b10", "A/c", "a1/b"]
    assert sorted(reversed(names), key=natural_key) == names


def test_folder_labels(tmp_path):
    for i, name in enumerate(["class10/a.png", "class9/x/b.png", "class9/c.png"]):
        os.makedirs(os.path.dirname(tmp_path / "in" / name), exist_ok=True)
        Image.fromarray(noise(4, 4, seed=i)).save(tmp_path / "in" / name)
    made = pack(tmp_path / "in", tmp_path / "set", resolution=4, labels=True, progress=False)
    assert made.label.tolist() == [0, 0, 1] and made.num_classes == 2
    assert pack(tmp_path / "in", tmp_path / "plain", resolution=4, progress=False).label is None
    (tmp_path / "in" / "class9" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="notes.txt"):
        pack(tmp_path / "in", tmp_path / "other", resolution=4, labels=True, progress=False)


def test_left_out_files_are_told(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(4, 4)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.txt").write_text("x")
    open_source(tmp_path / "in", resolution=4)
    assert "1 files" in caplog.text and "b.txt" in caplog.text


def through_png(image, **settings):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **settings)
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_every_kind_of_image_becomes_grey_or_rgb():
    grey, rgb = noise(4, 5), noise(4, 5, 3)
    assert np.array_equal(to_uint8(through_png(Image.fromarray(grey)))[..., 0], grey)
    assert np.array_equal(to_uint8(through_png(Image.fromarray(rgb))), rgb)
    deep = np.array([[0, 128, 129, 32896, 65535]], np.uint16)  # 257 to a step; 128.5 rounds to 1
    assert to_uint8(through_png(Image.fromarray(deep)))[..., 0].tolist() == [[0, 0, 1, 128, 255]]
    two_tone = grey > 127
    assert np.array_equal(to_uint8(through_png(Image.fromarray(two_tone)))[..., 0], two_tone * 255)
    palette = through_png(Image.fromarray(rgb).quantize(256))
    assert palette.mode == "P" and np.array_equal(to_uint8(palette), np.asarray(palette.convert("RGB")))
    rgba = np.dstack([rgb, np.array([[0, 255, 0, 255, 255]] * 4, np.uint8)])
    laid = to_uint8(through_png(Image.fromarray(rgba)))
    assert np.array_equal(laid[:, [1, 3, 4]], rgb[:, [1, 3, 4]]) and (laid[:, [0, 2]] == 255).all()
    assert to_uint8(Image.fromarray(noise(4, 5, 2), "LA")).shape == (4, 5, 1)
    assert to_uint8(Image.fromarray(noise(4, 5, 4), "CMYK")).shape == (4, 5, 3)
    turned = through_png(Image.fromarray(rgb), exif=_exif_orientation(6))
    assert np.array_equal(to_uint8(turned), np.rot90(rgb, -1))
    with pytest.raises(ValueError, match="floating"):
        to_uint8(Image.fromarray(np.zeros((2, 2), np.float32)))
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 200, np.int32)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="32-bit image"):
        to_uint8(Image.open(buffer))


def _exif_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_grey_and_colour_in_one_set(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(4, 4)).save(tmp_path / "in" / "0.png")
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / "in" / "1.png")
    with pytest.raises(UserError, match=r"1\.png is in colour"):
        pack(tmp_path / "in", tmp_path / "set", resolution=4, progress=False)
    for channels in (1, 3):
        dest = tmp_path / f"set{channels}"
        made = pack(tmp_path / "in", dest, resolution=4, num_channels=channels, progress=False)
        assert made.num_channels == channels


@pytest.mark.parametrize("cut", [0, 20, 60])
def test_unreadable_image_is_named(tmp_path, cut):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(noise(8, 8, 3)).save(tmp_path / "in" / name)
    data = (tmp_path / "in" / "b.png").read_bytes()
    (tmp_path / "in" / "b.png").write_bytes(data[:cut])
    with pytest.raises(UserError, match=r"in/b\.png cannot be read"):
        pack(tmp_path / "in", tmp_path / "set", resolution=8, progress=False)


def test_what_cannot_be_packed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    for source, message in [("empty", "no images"), ("absent", "no source"), ("a.txt", "is no source")]:
        with pytest.raises(UserError, match=message):
            pack(tmp_path / source, tmp_path / "set", resolution=4, progress=False)
    for settings in ({"resolution": 0}, {"num_channels": 2}, {"samples_per_shard": 0}):
        with pytest.raises(UserError):
            pack("digits:", tmp_path / "set", progress=False, **({"resolution": 4} | settings))
    with pytest.raises(UserError, match="labels"):
        packed(tmp_path, noise(3, 4, 4), labels=True)
    packed(tmp_path, noise(3, 4, 4))
    with pytest.raises(UserError, match="already holds"):
        packed(tmp_path, noise(3, 4, 4))


def test_a_stopped_pack_goes_on(tmp_path, monkeypatch):
    folder, whole = packed(tmp_path, noise(12, 4, 4), "whole")
    os.rename(tmp_path / "whole.npy", tmp_path / "set.npy")
    finish, made = pack_shard.Record.dump, []

    def dump(record, dest, name):
        if len(made) == 2:
            raise KeyboardInterrupt  # the third shard lies in its place, and has no record
        made.append(name)
        finish(record, dest, name)

    monkeypatch.setattr(pack_shard.Record, "dump", dump)
    settings = {"resolution": 4, "samples_per_shard": 4, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "set.npy", tmp_path / "set", **settings)
    assert made == ["train-000000", "train-000001"]
    with pytest.raises(UserError, match="sivae pack"):
        ImageStream(tmp_path / "set", batch_size=1)
    for change, message in [
        ({"resolution": 8}, r"resolution: \[4\] there, \[8\] now"),
        ({"samples_per_shard": 5}, "samples_per_shard: 4 there, 5 now"),
        ({"crop": "2"}, "crop: center there, 2 now"),
        ({"splits": "validation=2:4"}, "splits"),
    ]:
        with pytest.raises(UserError, match=f"set was begun with other settings .{message}"):
            pack(tmp_path / "set.npy", tmp_path / "set", **(settings | change))
    (tmp_path / "set" / "train-000001.tar").write_bytes(b"cut")  # not the size of its record: made again
    monkeypatch.setattr(pack_shard.Record, "dump", finish)
    before = os.stat(tmp_path / "set" / "train-000000.tar")
    went_on = pack(tmp_path / "set.npy", tmp_path / "set", **settings)
    after = os.stat(tmp_path / "set" / "train-000000.tar")
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    made = everything(tmp_path / "set")
    assert {name: made[name] for name in made if name != "index.json"} == {
        name: data for name, data in everything(folder).items() if name != "index.json"
    }
    assert np.array_equal(went_on.crc32, whole.crc32)


def test_a_failed_pack_goes_on_unless_the_source_changed(tmp_path):
    data = np.full((12, 4, 4), 0.5)
    data[9] = 2
    with pytest.raises(UserError, match="sample 9.*--skip-bad"):
        packed(tmp_path, data)
    assert sorted(os.listdir(tmp_path / "set")) == [".packing", "train-000000.tar", "train-000001.tar"]
    assert sorted(os.listdir(tmp_path / "set" / ".packing")) == ["plan.json", "train-000000.json", "train-000001.json"]
    skipped = pack(
        tmp_path / "set.npy", tmp_path / "set", resolution=4, samples_per_shard=4, skip_bad=True, progress=False
    )
    assert skipped.count == 11 and "00000009" not in skipped.key and "sample 9" in skipped.skipped[0]
    with pytest.raises(UserError, match="sample 9"):
        packed(tmp_path, data, "other")
    with pytest.raises(UserError, match="other images"):
        packed(tmp_path, np.full((12, 4, 4), 0.25), "other")


def test_skipped_images(tmp_path):
    data = np.full((12, 4, 4), 0.5)
    data[4:8] = np.nan
    _, made = packed(tmp_path, data, skip_bad=True)
    assert [shard.name for shard in made.shards] == ["train-000000.tar", "train-000002.tar"]  # one had only bad ones
    assert len(made.skipped) == 4 and all(f"sample {4 + i} " in line for i, line in enumerate(made.skipped))
    assert made.key == [f"{i:08d}" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert Index.load(Folder(tmp_path / "set")).skipped == made.skipped
    assert len(ImageStream(tmp_path / "set", batch_size=1)) == 8
    assert not any(str(tmp_path) in line for line in made.skipped)
    with pytest.raises(UserError, match="no image of test can be read, the first: sample 4"):
        packed(tmp_path, data, "split", splits="train=0:4,test=4:8", skip_bad=True)
    with pytest.raises(UserError, match="sample 4 .*--skip-bad leaves"):  # what was skipped then is not now
        pack(
            tmp_path / "split.npy", tmp_path / "split", resolution=4, samples_per_shard=4, splits="train=0:4,test=4:8",
            progress=False,
        )  # fmt: skip
    with pytest.raises(UserError, match="no image of rest can be read, the first: sample 6"):
        packed(tmp_path, data, "two", splits="test=0:6,rest=6:8", skip_bad=True)
    data[:] = np.nan
    with pytest.raises(UserError, match="sample 0"):
        packed(tmp_path, data, "none", skip_bad=True)


def test_skipped_files_are_named_without_their_folder(tmp_path):
    digests = []
    for parent in ("a", "b c"):
        os.makedirs(tmp_path / parent / "in" / "x")
        for name in ("1.png", "x/2.png"):
            Image.fromarray(noise(8, 8, 3)).save(tmp_path / parent / "in" / name)
        data = (tmp_path / parent / "in" / "x" / "2.png").read_bytes()
        (tmp_path / parent / "in" / "x" / "2.png").write_bytes(data[:60])
        made = pack(tmp_path / parent / "in", tmp_path / f"{parent}-set", resolution=8, skip_bad=True, progress=False)
        assert len(made.skipped) == 1 and made.skipped[0].startswith("x/2.png: cannot be read as an image")
        assert str(tmp_path) not in made.skipped[0] and ";" not in made.skipped[0]
        digests.append(made.digest)
    assert digests[0] == digests[1]


def test_what_is_in_the_way(tmp_path):
    folder, _ = packed(tmp_path, noise(4, 8, 8), pyramid=True)
    os.mkdir(f"{folder}/.packing")  # of one that was killed right after its last index
    for settings in ({"resolution": 8}, {"resolution": 8, "pyramid": True}, {"resolution": 16}):
        with pytest.raises(UserError, match="already holds"):
            pack(tmp_path / "set.npy", folder, progress=False, **settings)
    assert sorted(os.listdir(folder)) == ["4", "8"]
    os.mkdir(tmp_path / "others")
    (tmp_path / "others" / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="did not make"):
        pack(tmp_path / "set.npy", tmp_path / "others", resolution=4, progress=False)
    assert (tmp_path / "others" / "train-000000.tar").read_bytes() == b"precious"
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="file"):
        pack(tmp_path / "set.npy", tmp_path / "file" / "set", resolution=4, progress=False)


def test_scratch_sweeps_the_dead_alone(tmp_path):
    scratch = Scratch(str(tmp_path))
    (tmp_path / "a.tar.1-x.part").write_bytes(b"of a process that was killed")
    (tmp_path / "plan.json").write_bytes(b"{}")
    with scratch.file("b.tar") as (_, path):
        Scratch(str(tmp_path)).sweep()
        assert sorted(os.listdir(tmp_path)) == [os.path.basename(path), "plan.json"]
    assert os.listdir(tmp_path) == ["plan.json"]


# What is in the images


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pyramid_is_averages(tmp_path, channels):
    data = noise(6, 32, 32, channels)
    data[0] = 255 * (np.indices((32, 32)).sum(0) % 2)[..., None]  # averages of 127.5
    full = pack_array(tmp_path, data, resolution=32, pyramid=True, samples_per_shard=2)
    assert sorted(os.listdir(tmp_path / "set"), key=int) == ["4", "8", "16", "32"]
    for level in (32, 16, 8, 4):
        stream = ImageStream(tmp_path / "set" / str(level), batch_size=1)
        step = 32 // level
        squares = data.astype(np.float64).reshape(6, level, step, level, step, channels)
        expected = np.rint(squares.mean(axis=(2, 4))).transpose(0, 3, 1, 2)
        assert np.array_equal(stream.sample(range(6)).images.numpy(), expected)
        assert stream.index.key == full.key and [s.count for s in stream.index.shards] == [2, 2, 2]
    assert stream.sample([0]).images.unique().tolist() == [128]  # half to even: 127.5 is 128
    with pytest.raises(UserError, match="power of two"):
        pack_array(tmp_path, data, "odd", resolution=24, pyramid=True)


def test_a_pyramid_that_is_killed_among_its_indexes_goes_on(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", noise(2, 8, 8))
    dump = Index.dump

    def killed(index, folder):
        if index.resolution == 4:
            raise KeyboardInterrupt
        dump(index, folder)

    for how in (killed, dump):
        monkeypatch.setattr(Index, "dump", how)
        with pytest.raises(KeyboardInterrupt) if how is killed else contextlib.nullcontext():
            pack(tmp_path / "a.npy", tmp_path / "set", resolution=8, pyramid=True, progress=False)
    assert ImageStream(tmp_path / "set" / "8", batch_size=1).index.count == 2


def test_halves_round_to_even():
    assert list(pyramid(np.array([[[0], [1]], [[1], [0]]], np.uint8), 2))[1].item() == 0  # 0.5
    assert list(pyramid(np.array([[[1], [2]], [[1], [2]]], np.uint8), 2))[1].item() == 2  # 1.5


def pack_array(tmp_path, data, name="set", **settings):
    np.save(tmp_path / "a.npy", data)
    return pack(tmp_path / "a.npy", tmp_path / name, progress=False, **settings)


def test_crops_and_filters(tmp_path):
    data = noise(2, 12, 9, 3)
    cuts = {"center": data[:, 1:10], "4": data[:, 4:8, 2:6], "2,3,5": data[:, 3:8, 2:7]}
    for crop, cut in cuts.items():
        for filter in ("lanczos", "bicubic", "bilinear", "box", "nearest"):
            made = pack_array(tmp_path, data, f"{crop}-{filter}", resolution=5, crop=crop, filter=filter)
            assert (made.crop, made.filter) == (crop, filter)
            images = ImageStream(tmp_path / f"{crop}-{filter}", batch_size=1).sample([0, 1]).images.numpy()
            for image, square in zip(images, cut):
                expected = Image.fromarray(square).resize((5, 5), getattr(Image.Resampling, filter.upper()))
                assert np.array_equal(image, np.asarray(expected).transpose(2, 0, 1))
    assert crop_box(178, 218, "148", "x") == (15, 35, 163, 183)  # CelebA as it is usually cut
    for settings, message in [
        ({"crop": "none"}, "9x12 pixels, which is no square"),
        ({"crop": "10"}, "too small for the crop 10"),
        ({"crop": "5,5,5"}, "too small for the crop 5,5,5"),
        ({"crop": "0"}, "no crop"),
        ({"crop": "-1,0,4"}, "no crop"),
        ({"crop": "1,2"}, "no crop"),
        ({"crop": "middle"}, "no crop"),
        ({"filter": "best"}, "no filter"),
    ]:
        with pytest.raises(UserError, match=message):
            pack_array(tmp_path, data, "bad", resolution=4, **settings)
    assert not os.path.exists(tmp_path / "bad" / "index.json")
    pack_array(tmp_path, noise(2, 4, 4), "square", resolution=4, crop="none")


def test_enlarged_images_are_told(tmp_path, caplog):
    pack_array(tmp_path, noise(3, 4, 4), resolution=8)
    assert "3 images are smaller than 8 pixels once they are cut, and were enlarged" in caplog.text
    caplog.clear()
    pack_array(tmp_path, noise(2, 9, 8), "whole", resolution=8)
    assert not caplog.text
    pack_array(tmp_path, noise(2, 9, 8), "cut", resolution=8, crop="1,1,7")
    assert "2 images are smaller than 8 pixels once they are cut" in caplog.text


def test_png_is_copied_where_nothing_changes(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(2):  # other bytes than pack itself would write
        Image.fromarray(noise(8, 8, 3, seed=i)).save(tmp_path / "in" / f"{i}.png", compress_level=0)
    Image.fromarray(noise(8, 8)).save(tmp_path / "in" / "2.png", compress_level=0)
    Image.fromarray(noise(8, 8, 3)).quantize(16).save(tmp_path / "in" / "3.png")  # of numbers in a table of colours
    own = [(tmp_path / "in" / f"{i}.png").read_bytes() for i in range(4)]

    def encoded(name, **settings):
        made = pack(tmp_path / "in", tmp_path / name, num_channels=3, progress=False, **settings)
        with tarfile.open(tmp_path / name / "train-000000.tar") as tar:
            return [tar.extractfile(f"{key}.png").read() for key in made.key]

    copied = encoded("copied", resolution=8)
    assert copied[:2] == own[:2] and copied[2] != own[2]  # the grey one became colour
    images = ImageStream(tmp_path / "copied", batch_size=1).sample(range(4)).images.numpy()
    assert np.array_equal(
        images[3], np.asarray(Image.open(tmp_path / "in" / "3.png").convert("RGB")).transpose(2, 0, 1)
    )
    assert np.array_equal(images[1], noise(8, 8, 3, seed=1).transpose(2, 0, 1))
    assert np.array_equal(images[2], np.repeat(noise(8, 8)[None], 3, axis=0))
    for settings in ({"resolution": 4}, {"resolution": 8, "crop": "6"}):
        assert not set(encoded(f"{settings}", **settings)) & set(own)


def test_attribution_is_kept(tmp_path):
    os.mkdir(tmp_path / "in")
    with webdataset.TarWriter(str(tmp_path / "in" / "a.tar"), encoder=False) as tar:
        for i in range(4):
            buffer = io.BytesIO()
            Image.fromarray(noise(4, 4, 3, seed=i)).save(buffer, "PNG")
            own = {"json": json.dumps({"author": f"Ä{i}"}).encode()} if i % 2 else {}
            tar.write({"__key__": f"x{i}", "png": buffer.getvalue()} | own)
    pack(tmp_path / "in", tmp_path / "set", resolution=4, progress=False)
    samples = list(webdataset.WebDataset(str(tmp_path / "set" / "train-000000.tar"), shardshuffle=False))
    assert [json.loads(s["json"]) if "json" in s else None for s in samples] == [
        None,
        {"author": "Ä1"},
        None,
        {"author": "Ä3"},
    ]


# Splits


class Names:
    """A source of names alone."""

    splits = None

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)


def test_the_names_of_the_source_stay(tmp_path):
    """Of each level of a pyramid, and when the set is packed again; a name that is no text of UTF-8 too."""
    photos = tmp_path / "photos"
    photos.mkdir()
    called = ["a b#1.png", "Größe.png", *(f"k{number}.png" for number in range(8)), "x\udcff.png"]
    for number, name in enumerate(called):
        Image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(photos / name)
    # By shares, so that the set has another order than the source.
    index = pack(photos, tmp_path / "set", resolution=8, pyramid=True, splits="test=50%", progress=False)
    assert index.key != sorted(index.key)
    pack(tmp_path / "set" / "8", tmp_path / "again", resolution=8, progress=False)
    told = [name.encode(errors="backslashreplace").decode() for name in called]
    for folder in ("set/8", "set/4", "again"):
        stream = ImageStream(str(tmp_path / folder), split="all", batch_size=1)
        values = stream.sample(range(len(called))).images[:, 0, 0, 0] // 20
        assert [stream.names[key] for key in stream.index.key] == [told[value] for value in values]
    (tmp_path / "again" / "names.json").write_text("[1]")
    with pytest.raises(UserError, match="names.json: is damaged"):
        ImageStream(str(tmp_path / "again"), split="all", batch_size=1).names  # noqa: B018
    folder, _ = packed(tmp_path, noise(5, 8, 8, 1), "arrays")
    assert ImageStream(folder, split="train", batch_size=1).names == {}


@pytest.mark.parametrize("error, is_absent", [(PermissionError("Forbidden"), True), (TimeoutError(), False)])
def test_a_bucket_that_may_not_be_listed_has_no_names(tmp_path, monkeypatch, error, is_absent):
    def exists(self, path):
        raise error

    monkeypatch.setattr(Folder, "_exists", exists)
    folder = Folder(tmp_path, retries=0)
    if is_absent:
        assert read_names(folder) == {}
    else:
        with pytest.raises(UserError, match="cannot look at"):
            read_names(folder)


def test_splits():
    def found(splits, count=10, own=None):
        source = Names([f"{i}.png" for i in range(count)])
        source.splits = own
        return {name: numbers.tolist() for name, numbers in assign(source, splits).items()}

    whole = list(range(10))
    assert found(None) == found("none") == {"train": whole}
    own = {"train": range(2, 10), "test": np.array([1, 0])}
    assert found(None, own=own) == {"train": whole[2:], "test": [1, 0]}
    assert found("none", own=own) == {"train": whole}
    assert found("train=0:6,validation=6:") == {"train": whole[:6], "validation": whole[6:]}
    assert found("b=7:9,a=:3") == {"b": [7, 8], "a": [0, 1, 2]}
    for bad, message in [
        ("train=0:11", "0:10"),
        ("train=5:5", "0:10"),
        ("train=6:5", "0:10"),
        ("a=0:5,b=4:6", "b overlaps a"),
        ("a=4:6,b=0:10", "b overlaps a"),
        ("a=0:5,a=5:6", "there twice"),
        ("all=0:5", "no name"),
        ("a b=0:5", "no name"),
        ("=0:5", "no name"),
        ("", "no name"),
        ("a", "cannot be read"),
        ("a=5", "cannot be read"),
        ("a=0:5,b=10%", "cannot be read"),
        ("a=-1:5", "cannot be read"),
        ("a=100%", "leave"),
        ("a=60%,b=50%", "leave"),
        ("a=0%", "leave"),
        ("train=90%", "leave"),
        ("a=0.0001%", "no sample"),
    ]:
        with pytest.raises(UserError, match=message):
            found(bad)


def test_shares_stay_when_images_are_added():
    names = [f"photo-{i}.png" for i in range(5000)]
    few = assign(Names(names[::2]), "validation=10%,test=5%")
    many = assign(Names(names), "validation=10%,test=5%")
    assert list(many) == ["train", "validation", "test"]
    assert sorted(np.concatenate(list(many.values()))) == list(range(5000))
    assert abs(len(many["validation"]) - 500) < 70 and abs(len(many["test"]) - 250) < 50
    for split in few:  # number i of the few is number 2 i of the many
        assert set(2 * few[split]) <= set(many[split])


def test_a_sources_own_splits(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        os.makedirs(tmp_path / "in" / split)
        for i in range(count):
            Image.fromarray(noise(4, 4, seed=i)).save(tmp_path / "in" / split / f"{i}.png")
    made = pack(tmp_path / "in", tmp_path / "set", resolution=4, progress=False)
    assert made.splits == {"train": 3, "validation": 2}
    assert [shard.name for shard in made.shards] == ["train-000000.tar", "validation-000000.tar"]
    assert pack(tmp_path / "in", tmp_path / "one", resolution=4, splits="none", progress=False).splits == {"train": 5}


# Packing once


def test_many_processes_pack_once(tmp_path):
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_pack_digits, args=(str(tmp_path / "digits-8"),)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4
    assert os.listdir(tmp_path) == ["digits-8"]  # nothing left of those who came second


def _pack_digits(folder):
    pack_once("digits:", folder, resolution=8, progress=False)
    assert Index.load(Folder(folder)).count == 1797


def test_pack_once_in_a_folder_that_is_something_else(tmp_path):
    (tmp_path / "digits-8").mkdir()
    (tmp_path / "digits-8" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="remove it"):
        pack_once("digits:", tmp_path / "digits-8", resolution=8, progress=False)
    assert os.listdir(tmp_path) == ["digits-8"] and os.listdir(tmp_path / "digits-8") == ["thesis.txt"]


def photographs(folder, count=3):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(noise(6, 6, 3, seed=i)).save(folder / f"{i}.png")
    return folder


def test_no_folder_is_passed_over(tmp_path):
    photographs(tmp_path / "elsewhere")
    photographs(tmp_path / "photos" / "a")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(open_source(tmp_path / "photos", resolution=6)) == 6
    (tmp_path / "photos" / "a" / "circle").symlink_to(tmp_path / "photos")
    with pytest.raises(UserError, match="circle is a link to a folder that holds it"):
        open_source(tmp_path / "photos", resolution=6)


def test_links_that_go_round_over_two_folders(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        photographs(tmp_path / "photos" / name)
        (tmp_path / "photos" / name / "to").symlink_to(f"../{other}")
    with pytest.raises(UserError, match="to is a link to a folder that holds it"):
        open_source(tmp_path / "photos", resolution=6)


def test_a_link_to_nothing_is_a_bad_image(tmp_path):
    photographs(tmp_path / "photos")
    (tmp_path / "photos" / ".#0.png").symlink_to("user@host.1")
    assert len(open_source(tmp_path / "photos", resolution=6)) == 3
    (tmp_path / "photos" / "3.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match="3.png is missing"):
        pack(tmp_path / "photos", tmp_path / "set", resolution=6, progress=False)
    made = pack(tmp_path / "photos", tmp_path / "other", resolution=6, skip_bad=True, progress=False)
    assert made.count == 3 and made.skipped == ("3.png: is missing",)


def test_a_folder_that_cannot_be_read_stops_it(tmp_path, monkeypatch):
    photographs(tmp_path / "photos" / "a")
    locked = photographs(tmp_path / "photos" / "b")
    scan = os.scandir

    def refuse(path):  # as for a user who may not; tests may run as root, who may
        if os.fspath(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        open_source(tmp_path / "photos", resolution=6)


def test_the_source_is_no_destination(tmp_path):
    photographs(tmp_path / "photos")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for dest in ("photos", "photos/", "link"):
        with pytest.raises(UserError, match="is the source itself"):
            pack(tmp_path / "photos", f"{tmp_path}/{dest}", resolution=6, progress=False)
    assert sorted(os.listdir(tmp_path / "photos")) == ["0.png", "1.png", "2.png"]


def test_skipped_files_do_not_change_the_digest_of_equal_sets(tmp_path):
    photographs(tmp_path / "photos")
    (tmp_path / "photos" / "9.png").write_bytes(b"no image")
    made = [
        pack(tmp_path / "photos", tmp_path / name, resolution=6, skip_bad=True, progress=False) for name in ("a", "b")
    ]
    assert made[0].digest == made[1].digest and "0x" not in made[0].skipped[0]


def test_packing_to_memory_stays_in_this_process(tmp_path):
    photographs(tmp_path / "photos")
    url = f"memory://{tmp_path.name}"
    pack(tmp_path / "photos", url, resolution=6, num_workers=2, progress=False)
    assert len(ImageStream(url, batch_size=1).sample(range(3)).images) == 3


def test_a_full_disk_is_one_sentence(tmp_path):
    def full(*_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    photographs(tmp_path / "photos", 20)
    command = [sys.executable, "-m", "sivae", "pack", "photos", "set", "--resolution", "32", "--workers", "0"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), preexec_fn=full, capture_output=True, text=True, timeout=TIMEOUT_SEC
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1]
