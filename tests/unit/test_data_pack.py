"""Proves that what `pack` writes is what the sources hold: plain webdataset reads it with equal pixels,
packing twice gives the same bytes, every kind of image is converted rightly, and what cannot be packed is
refused with its name; that no index, however damaged or hostile, is taken, and that the error is UserError.

    python -m pytest tests/unit/test_data_pack.py
"""

import hashlib
import io
import json
import multiprocessing
import os
import random

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from sivae.data import ImageStream, decode, index
from sivae.data.index import Index
from sivae.data.pack import fit, pack, pack_once
from sivae.data.sources import natural_key, open_source, to_uint8
from sivae.errors import UserError


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
        _, image, label = source[i]
        assert np.array_equal(image[..., 0], expected[i, 0]) and label == digits.target[i]
    assert open_source("digits:", resolution=16, labels=False)[0][2] is None


def test_plain_webdataset_reads_the_shards(tmp_path):
    found = pack("digits:", tmp_path / "set", resolution=8, samples_per_shard=700, progress=False)
    assert [s.count for s in found.shards] == [700, 700, 397]
    source = open_source("digits:", resolution=8)
    tars = [str(tmp_path / "set" / shard.name) for shard in found.shards]
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode("l8")
    for i, sample in enumerate(samples):
        _, image, label = source[i]
        assert sample["__key__"] == found.key[i] == f"{i:08d}" and sample["cls"] == label == found.label[i]
        assert np.array_equal(np.asarray(sample["png"]), image[..., 0])
    assert i == 1796


def test_packing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        pack("digits:", tmp_path / name, resolution=8, samples_per_shard=1000, progress=False)
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == ["index.json", "shard-000000.tar", "shard-000001.tar"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = [Index.load(tmp_path / name) for name in ("a", "b")]
    assert (
        loaded[0].digest
        == loaded[1].digest
        != pack("digits:", tmp_path / "c", resolution=8, samples_per_shard=999, progress=False).digest
    )


def test_index_survives_dump_and_load(tmp_path):
    folder, made = packed(tmp_path, noise(10, 6, 6, 3), licence="mine")
    loaded = Index.load(folder)
    assert loaded._content() == made._content() and loaded.digest == made.digest
    assert (loaded.num_channels, loaded.resolution, loaded.licence, loaded.label) == (3, 6, "mine", None)
    assert loaded.shard.tolist() == [0] * 4 + [1] * 4 + [2] * 2


def test_shards_end_by_size(tmp_path):
    _, made = packed(tmp_path, noise(10, 16, 16, 3), samples_per_shard=None, shard_size_bytes=2000)
    assert [s.count for s in made.shards] == [3, 3, 3, 1]  # noise of 768 bytes an image does not compress


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


def test_an_interrupted_pack_is_no_set_and_is_overwritten(tmp_path):
    data = np.full((10, 4, 4), 0.5)
    data[9] = 2
    with pytest.raises(UserError, match="sample 9"):
        packed(tmp_path, data)
    assert sorted(os.listdir(tmp_path / "set")) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(UserError, match="sivae pack"):
        ImageStream(tmp_path / "set", batch_size=1)
    data[9] = 0.5
    folder, made = packed(tmp_path, data)
    assert Index.load(folder).digest == made.digest


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
    assert Index.load(folder).count == 1797


def test_pack_once_in_a_folder_that_is_something_else(tmp_path):
    (tmp_path / "digits-8").mkdir()
    (tmp_path / "digits-8" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="remove it"):
        pack_once("digits:", tmp_path / "digits-8", resolution=8, progress=False)
    assert os.listdir(tmp_path) == ["digits-8"] and os.listdir(tmp_path / "digits-8") == ["thesis.txt"]


# Decoding


@pytest.mark.parametrize("channels", [1, 3])
def test_decoders_agree(channels, monkeypatch):
    pytest.importorskip("imagecodecs")
    image = noise(9, 9, channels)
    buffer = io.BytesIO()
    fit(image, 9, channels).save(buffer, "PNG")
    assert decode.png_decoder() is not decode.png_pillow
    fast = decode.decode_png(buffer.getvalue(), 9, channels, "x")
    monkeypatch.setattr(decode, "png_decoder", lambda: decode.png_pillow)
    assert np.array_equal(fast, decode.decode_png(buffer.getvalue(), 9, channels, "x"))
    assert np.array_equal(fast, image.transpose(2, 0, 1))


@pytest.mark.parametrize("pillow", [False, True])
def test_decode_refuses(pillow, monkeypatch):
    if pillow:
        monkeypatch.setattr(decode, "png_decoder", lambda: decode.png_pillow)
    buffer = io.BytesIO()
    Image.fromarray(noise(9, 9, 3)).save(buffer, "PNG")
    data = buffer.getvalue()
    huge = data[:16] + b"\x00\x01\x00\x00" * 2 + data[24:]
    for encoded, resolution, channels, message in [
        (data, 8, 3, "9x9 pixels where the index says 8x8"),
        (data, 9, 1, "RGB image"),
        (b"", 9, 3, "no PNG"),
        (b"x" * 99, 9, 3, "no PNG"),
        (data[:-60], 9, 3, "cannot be decoded"),
        (huge, 9, 3, "65536x65536"),
    ]:
        with pytest.raises(UserError, match=f"sample 7 .*{message}"):
            decode.decode_png(encoded, resolution, channels, "sample 7")


# Hostile indexes


def rewrite(folder, change):
    """Apply `change` to the parsed index.json and make its digest fit again, as an attacker would."""
    path = os.path.join(folder, "index.json")
    with open(path) as file:
        content = json.load(file)
    content.pop("digest")
    content = change(content) or content
    if isinstance(content, dict):
        content["digest"] = hashlib.sha256(index._canonical(content)).hexdigest()
    with open(path, "w") as file:
        json.dump(content, file)


def test_every_mutated_field_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(6, 4, 4), labels=np.arange(6))
    pack(tmp_path / "a.npz", tmp_path / "set", resolution=4, samples_per_shard=3, progress=False)
    path, folder = tmp_path / "set" / "index.json", str(tmp_path / "set")
    whole = path.read_text()
    rewrite(folder, lambda c: None)
    Index.load(folder)  # the helper itself is right

    nasty = [None, True, -1, 1.5, "", "x", [], {}, [None], 2**63, 10**30, float("nan"), "../../x"]
    fields = json.loads(whole)
    places = [(k,) for k in fields if k != "digest"]
    places += [("shards", 0, k) for k in fields["shards"][0]] + [("samples", k) for k in fields["samples"]]
    places += [("samples", k, 2) for k in fields["samples"]] + [("shards", 1)]
    refused = 0
    for place in places:
        for value in nasty:
            if place[-1] in ("source", "licence") and isinstance(value, str):
                continue  # any text is right there
            if place == ("samples", "key", 2) and isinstance(value, str) and value:
                continue  # a key is only a name: never a path that is opened
            if place == ("shards", 0, "name") and value == "x":
                continue
            path.write_text(whole)

            def change(content, place=place, value=value):
                *parents, last = place
                for parent in parents:
                    content = content[parent]
                content[last] = value

            rewrite(folder, change)
            with pytest.raises(UserError, match=r"index\.json"):
                Index.load(folder)
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["shards"][0].update(name="../shard-000000.tar"),
        lambda c: c["shards"][0].update(name="/etc/passwd"),
        lambda c: c["shards"][0].update(name=".."),
        lambda c: c["shards"][0].update(name="a\x00b"),
        lambda c: c["shards"][0].update(name="s3://elsewhere"),
        lambda c: c["shards"][0].update(name=c["shards"][1]["name"]),
        lambda c: c["shards"][0].update(size_bytes=100),
        lambda c: c["shards"][0].update(count=4),
        lambda c: c["samples"]["key"].__setitem__(0, c["samples"]["key"][1]),
        lambda c: c["samples"]["key"].__setitem__(0, "\ud800"),
        lambda c: c["samples"]["key"].__setitem__(0, "a\nb"),
        lambda c: c["samples"]["offset"].__setitem__(1, c["samples"]["offset"][0]),
        lambda c: c["samples"]["size"].__setitem__(2, 2**22),
        lambda c: c["samples"]["label"].__setitem__(0, 99),
        lambda c: c.update(num_classes=None),
        lambda c: c.update(extra=1),
        lambda c: c.pop("licence") and None,
        lambda c: c.update(version=2),
        lambda c: c.update(resolution=10**6),
        lambda c: c.update(shards=[], samples={k: [] for k in c["samples"]}, count=0),
        lambda c: [c],
    ],
)
def test_hostile_indexes_are_refused(tmp_path, change):
    np.savez(tmp_path / "a.npz", images=noise(6, 4, 4), labels=np.arange(6))
    pack(tmp_path / "a.npz", tmp_path / "set", resolution=4, samples_per_shard=3, progress=False)
    rewrite(str(tmp_path / "set"), change)
    with pytest.raises(UserError, match=r"index\.json"):
        Index.load(tmp_path / "set")


def test_mutated_bytes_of_an_index_are_refused(tmp_path):
    folder, made = packed(tmp_path, noise(6, 4, 4))
    path = tmp_path / "set" / "index.json"
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.2 else data)
        try:
            assert Index.load(folder).digest == made.digest  # a byte that was replaced by itself
        except UserError as error:
            assert "index.json" in str(error)
    path.write_text("[" * 100000)
    with pytest.raises(UserError, match="index.json"):
        Index.load(folder)
