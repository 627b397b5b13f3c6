"""Proves that a whole set is encoded to what the model makes of each image, in order, under its name and label; that an encoding
that was interrupted never looks whole and goes on where it stopped; and that latents of another model or set are refused. Then
the commands that use latents. The model is a real MLP with weights chosen so that latents are pixels: answers are known.

    python -m pytest tests/unit/test_encoded.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import sivae
from sivae import encoded, figures, images, inference
from sivae.cli import main
from sivae.config import parse_model
from sivae.data import open_stream
from sivae.data.pack import pack
from sivae.distributed import Group
from sivae.encoded import EncodedSet, encode, encode_set
from sivae.errors import UserError
from sivae.latents import Direction, Separation
from sivae.storage import Folder

SIZE, COUNT, CLASSES = 4, 60, 3
ALONE = Group(0, 1, torch.device("cpu"), None)


def pixel_model(size=SIZE, num_classes=0):
    """mu of an image is its pixels, 0 to 255, logvar is -mu / 255, and the decoder turns mu into the image again."""
    dim = size * size
    tree = {"family": "mlp", "sample_shape": [1, size, size], "latent_dim": dim, "num_hidden": 2 * dim, "num_layers": 1}
    model = inference.Model(parse_model(tree | {"num_classes": num_classes}).model_dump())
    one = torch.eye(dim)
    (first, middle, last), (up, between, down) = (
        [layer for layer in network.layers if isinstance(layer, torch.nn.Linear)]
        for network in (model.encoder, model.decoder)
    )
    for layer in (first, middle, last, up, between, down):
        layer.weight.zero_()
        layer.bias.zero_()
    first.weight[:dim, :dim] = one  # pixels are not negative, so that a ReLU lets them through
    up.weight[:, :dim] = torch.cat([one, -one])  # latents may be: one half for each sign
    middle.weight.copy_(torch.eye(2 * dim))
    between.weight.copy_(torch.eye(2 * dim))
    last.weight[:, :dim] = torch.cat([255 * one, -one])
    down.weight.copy_(torch.cat([one, -one], dim=1) / 255)
    return model


@pytest.fixture(scope="module")
def pixels():
    """uint8 [N, 4, 4, 1]; images of class c are lighter by 40 c in their first row."""
    drawn = np.random.default_rng(0).integers(0, 120, (COUNT, SIZE, SIZE, 1))
    drawn[:, 0] += 40 * (np.arange(COUNT) % CLASSES)[:, None, None]
    return drawn.astype(np.uint8)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, pixels):
    folder = tmp_path_factory.mktemp("set")
    np.savez(folder / "a.npz", images=pixels, labels=np.arange(COUNT) % CLASSES)
    settings = {"resolution": SIZE, "samples_per_shard": 25, "num_workers": 0, "progress": False}
    pack(str(folder / "a.npz"), str(folder / "set"), labels=True, splits="train=0:50,test=50:", **settings)
    pack(str(folder / "a.npz"), str(folder / "unlabelled"), labels=False, **settings)
    return folder


@pytest.fixture
def model():
    return pixel_model()


def opened(packed, split="all", name="set"):
    return open_stream(str(packed / name), split=split, batch_size=1)


def encode_all(model, packed, dest, split="all", **settings):
    return encode_set(model, opened(packed, split), Folder(dest), ALONE, split=split, **settings)


def whole(found, labels=True):
    parts = list(found.read())
    names = ("number", "mu", "logvar", "label")[: 3 + labels]
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return columns | {"name": [name for part in parts for name in part.name]}, [len(part) for part in parts]


@pytest.fixture(params=["safetensors", "parquet"])
def file_format(request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return request.param


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_image_is_encoded_in_order(model, packed, pixels, tmp_path, monkeypatch, file_format, batch_size):
    monkeypatch.setattr(encoded, "PART_SAMPLES", 16)
    encode_all(model, packed, tmp_path, file_format=file_format, batch_size=batch_size)
    found = EncodedSet(Folder(tmp_path))
    columns, sizes = whole(found)
    assert sizes == [16, 16, 16, 12] and len(found) == COUNT and found.num_classes == CLASSES
    assert columns["number"].tolist() == list(range(COUNT))
    assert columns["name"] == opened(packed).index.key
    assert columns["label"].tolist() == [number % CLASSES for number in range(COUNT)]
    mu = torch.from_numpy(pixels).float().flatten(1)
    assert columns["mu"].dtype == columns["logvar"].dtype == torch.float32
    torch.testing.assert_close(columns["mu"], mu, atol=1e-4, rtol=0)
    torch.testing.assert_close(columns["logvar"], -mu / 255, atol=1e-6, rtol=0)


def test_images_of_a_folder_keep_their_names(model, pixels, tmp_path, file_format, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.fromarray(pixels[number, :, :, 0]).save(tmp_path / "photos" / f"IMG {number}.png")
    pack(str(tmp_path / "photos"), str(tmp_path / "set"), resolution=SIZE, num_workers=0, progress=False)
    found = encode_all(model, tmp_path, tmp_path / "latents", split="all", file_format=file_format)
    assert whole(found, labels=False)[0]["name"] == [f"IMG {number}.png" for number in range(4)]
    inference.export(model, str(tmp_path / "model"))
    picked = ["neighbours", str(tmp_path / "model"), f"{tmp_path}/set#2", "--data", f"{tmp_path}/set", "--count", "1"]
    assert main([*picked, "--output", str(tmp_path / "neighbours.png")]) == 0
    assert "#2, IMG 2.png, sample 00000002 of " in capsys.readouterr().out


def test_a_split_is_numbered_by_itself_and_goes_to_any_url(model, packed, pixels, tmp_path):
    url = f"memory://{tmp_path.name}/latents"
    encode_all(model, packed, url, split="test")
    columns, _ = whole(EncodedSet(Folder(url)))
    assert columns["number"].tolist() == list(range(10))
    torch.testing.assert_close(columns["mu"], torch.from_numpy(pixels[50:]).float().flatten(1), atol=1e-4, rtol=0)


def test_others_read_the_files_without_sivae(model, packed, pixels, tmp_path, file_format):
    part = tmp_path / encode_all(model, packed, tmp_path, file_format=file_format).parts[0]["name"]
    if file_format == "parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(part).to_pydict()
        assert set(table) == {"number", "name", "label", "mu", "logvar"} and table["label"][4] == 1
        assert table["mu"][4] == pytest.approx(pixels[4].flatten().tolist(), abs=1e-4)
        return
    with safe_open(part, "pt") as file:
        assert set(file.keys()) == {"number", "label", "mu", "logvar"}
        assert json.loads(file.metadata()["name"]) == opened(packed).index.key


def test_an_interrupted_encoding_is_not_whole_and_goes_on(model, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "PART_SAMPLES", 16)
    expected, _ = whole(encode_all(model, packed, tmp_path / "expected"))
    broken, dest = tmp_path / "data", tmp_path / "dest"
    shutil.copytree(packed, broken)
    shard = broken / "set" / "train-000001.tar"  # samples 25 to 49: the second part holds the first of them
    data = shard.read_bytes()
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="sample"):
        encode_all(model, broken, dest)
    assert len(list(dest.iterdir())) == 1
    with pytest.raises(UserError, match="holds no whole encoded set"):
        EncodedSet(Folder(dest))
    shard.write_bytes(data)

    seen, plain = [], encoded.encode
    monkeypatch.setattr(encoded, "encode", lambda m, s, samples, b: seen.extend(samples) or plain(m, s, samples, b))
    found, _ = whole(encode_all(model, broken, dest))
    assert seen == list(range(16, COUNT))  # what was done is not done again
    assert found["name"] == expected["name"]
    assert all(torch.equal(found[name], expected[name]) for name in ("number", "mu", "logvar", "label"))

    seen.clear()
    encode_all(model, broken, dest)
    assert not seen
    lost = sorted(dest.glob("part-00002*"))[0]
    lost.unlink()
    with pytest.raises(UserError, match="part-00002"):
        whole(EncodedSet(Folder(dest)))
    encode_all(model, broken, dest)
    assert seen == list(range(32, 48)) and lost.exists()


def test_a_damaged_part_is_found(model, packed, tmp_path, monkeypatch, file_format):
    monkeypatch.setattr(encoded, "PART_SAMPLES", 16)
    encode_all(model, packed, tmp_path, file_format=file_format)
    part = sorted(tmp_path.glob("part-00001*"))[0]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    found = EncodedSet(Folder(tmp_path)).read()
    assert len(next(found)) == 16
    with pytest.raises(UserError, match=f"{part.name}: does not match its checksum"):
        next(found)
    # And when it is to be made part of the whole.
    (tmp_path / "encoded.json").unlink()
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{part.name}: is damaged"):
        encode_all(model, packed, tmp_path, file_format=file_format)
    other = sorted(tmp_path.glob("part-00000*"))[0]
    shutil.copy(other, part)
    with pytest.raises(UserError, match=f"{part.name}: does not hold the samples that it should"):
        encode_all(model, packed, tmp_path, file_format=file_format)
    assert not (tmp_path / "encoded.json").exists()


def test_the_folder_of_something_else_is_left_alone(model, packed, tmp_path):
    encode_all(model, packed, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = pixel_model()
    other.encoder.layers[0].bias += 1
    for attempt in (
        lambda: encode_all(other, packed, tmp_path),
        lambda: encode_all(model, packed, tmp_path, split="test"),
    ):
        with pytest.raises(UserError, match="holds an encoded set already"):
            attempt()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "encoded.json").unlink()
    with pytest.raises(UserError, match="holds parts of another encoding"):
        encode_all(other, packed, tmp_path)


def test_an_index_that_is_none_is_refused(model, packed, tmp_path):
    encode_all(model, packed, tmp_path)
    path = tmp_path / "encoded.json"
    text = path.read_text()
    for bad in ("", "[]", "{}", text.replace("encoded-1", "encoded-9"), text.replace('"count": 60', '"count": 61', 1),
                text.replace("part-00000", "../part-00000")):  # fmt: skip
        assert bad != text
        path.write_text(bad)
        with pytest.raises(UserError, match="is no index of an encoded set"):
            EncodedSet(Folder(tmp_path))


def test_bad_input_writes_nothing(model, packed, tmp_path, monkeypatch):
    conditional = pixel_model(num_classes=2)
    broken = pixel_model()
    broken.encoder.layers[-1].bias[3] = float("nan")
    for attempt, sentence in (
        (
            lambda: encode_all(model, packed, tmp_path, file_format="csv"),
            "format: 'csv' is none of safetensors, parquet",
        ),
        (lambda: encode_all(model, packed, tmp_path, batch_size=0), "batch_size: 0 is not a number of images"),
        (lambda: encode_all(conditional, packed, tmp_path), "has 3 classes, and this model knows 2"),
        (
            lambda: encode_set(conditional, opened(packed, name="unlabelled"), Folder(tmp_path), ALONE, split="all"),
            "has no labels, and this model is conditional on 2 classes",
        ),
        (lambda: encode_all(broken, packed, tmp_path), "the model encodes sample 00000000 of .* not finite"),
    ):
        with pytest.raises(UserError, match=sentence):
            attempt()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="the format parquet needs pyarrow, which is not installed"):
        encode_all(model, packed, tmp_path, file_format="parquet")
    assert not list(tmp_path.iterdir())


def test_a_conditional_model_is_given_the_labels(packed):
    conditional = pixel_model(num_classes=CLASSES)
    conditional.encoder.layers[0].weight[0, -CLASSES:] = torch.arange(
        CLASSES
    ).float()  # label c adds c to the first value
    plain, stream = pixel_model(), opened(packed)
    for a, b in zip(encode(conditional, stream, range(6)), encode(plain, stream, range(6))):
        torch.testing.assert_close((a.mu - b.mu)[:, 0], 255.0 * (torch.arange(6) % CLASSES))


# Figures


def test_neighbours_are_those_of_the_pixels(model, packed, pixels, tmp_path):
    stream = opened(packed)
    query = torch.from_numpy(pixels[7:8]).permute(0, 3, 1, 2)
    differences = pixels.astype(float).reshape(COUNT, -1) - pixels[7].astype(float).reshape(1, -1)
    expected = np.sqrt((differences**2).sum(axis=1))
    order = np.argsort(expected)[:5]
    for kept in (None, encode_all(model, packed, tmp_path)):
        figure, numbers, distances = figures.neighbours(model, query, stream, 5, encoded=kept)
        assert numbers.tolist() == order.tolist() and numbers[0] == 7
        np.testing.assert_allclose(distances, expected[order], atol=1e-3)
        shown = torch.from_numpy(pixels[[7, 7, *order]]).permute(0, 3, 1, 2)
        assert torch.equal(
            figure.tiles, shown
        )  # the image, its reconstruction (of this model the same), the neighbours
        assert figure.columns == ["real", "rec", *(f"#{n}\n{expected[n]:.2f}" for n in order)]
    for count in (0, COUNT + 1):
        with pytest.raises(UserError, match=f"{count} neighbours are asked for, and .* has 60 images"):
            figures.neighbours(model, query, stream, count)


def test_an_attribute_is_added_by_the_strength(model, pixels):
    real = torch.from_numpy(pixels[:20]).permute(0, 3, 1, 2)  # more than are decoded at once
    along = torch.zeros(16)
    along[5] = 1
    direction = Direction(along, 30.0, "fifth", "", None)
    figure = figures.attribute(model, real, direction, [-1.0, 0.0, 2.0])
    assert figure.columns == ["real", "-1", "0", "+2"] and len(figure.rows) == 20
    tiles = figure.tiles.unflatten(0, (20, 4)).flatten(2).int()
    assert torch.equal(tiles[:, 0], real.flatten(1).int()) and torch.equal(tiles[:, 2], tiles[:, 0])
    for column, change in ((1, -30), (3, 60)):
        expected = tiles[:, 0].clone()
        expected[:, 5] = (expected[:, 5] + change).clamp(0, 255)
        assert torch.equal(tiles[:, column], expected)


def test_interpolation_on_a_sphere_keeps_its_ends(model, pixels):
    real = torch.from_numpy(pixels[:4]).permute(0, 3, 1, 2)
    straight = model.interpolate(real[:2], real[2:], 5)
    round_ = model.interpolate(real[:2], real[2:], 5, spherical=True)
    torch.testing.assert_close(round_[:, [0, -1]], straight[:, [0, -1]])
    ends, middle = round_[:, [0, -1]].flatten(2).norm(dim=2).mean(dim=1), round_[:, 2].flatten(1).norm(dim=1)
    torch.testing.assert_close(middle, ends)  # of this model images are latents
    assert (straight[:, 2].flatten(1).norm(dim=1) < ends * 0.98).all()


def test_digits_lie_near_their_like(cache_dir, tmp_path):
    model = pixel_model(size=8)
    stream = open_stream("digits:", resolution=8, split="all", batch_size=1, cache_dir=cache_dir)
    found = encode_set(model, stream, Folder(tmp_path), ALONE, split="all")
    batch = stream.sample(range(0, 1797, 90))
    right = 0
    for image, label in zip(batch.images, batch.labels):
        _, numbers, distances = figures.neighbours(model, image[None], stream, 2, encoded=found)
        assert distances[0] == 0
        right += int(stream.index.label[numbers[1]] == label)
    assert right >= 19  # of 20: the nearest other digit is of the same class for about 98% of them


# Commands


@pytest.fixture
def here(tmp_path, monkeypatch, packed, pixels):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIVAE_DEBUG", "")
    inference.export(pixel_model(), "model")
    inference.export(pixel_model(size=8), "larger")
    inference.export(pixel_model(num_classes=CLASSES), "conditional")
    other = pixel_model()
    other.encoder.layers[0].bias += 1
    inference.export(other, "other")
    for name in ("set", "unlabelled"):
        Path(name).symlink_to(packed / name)
    for label in range(CLASSES):
        np.save(f"class{label}.npy", pixels[label::CLASSES])
    np.save("few.npy", pixels[:3])
    return tmp_path


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def drawn(figure):
    return images.table(figure.tiles, figure.rows, figure.columns)


def test_the_commands(here, capsys, packed, pixels):
    assert main(["encode", "model", "set", "latents"]) == 0
    assert "latents: 60 images, 16 latent dimensions, 1 parts" in capsys.readouterr().out
    model, stream = sivae.load("model"), opened(packed)
    found = EncodedSet(Folder("latents"))
    query = torch.from_numpy(pixels[7:8]).permute(0, 3, 1, 2)
    for extra in ([], ["--encoded", "latents"]):
        assert main(["neighbours", "model", "set#7", "--data", "set", "--count", "3", *extra]) == 0
        figure, numbers, distances = figures.neighbours(model, query, stream, 3, encoded=found)
        assert np.array_equal(picture("neighbours.png"), drawn(figure))
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == ["0.0000", "#7,", "sample", "00000007", "of", "train-000000.tar,", "label", "1"]
        assert lines[2].split()[0] == f"{distances[1]:.4f}" and lines[2].split()[1] == f"#{numbers[1]},"

    ways = (
        (["--data", "set", "--label", "2"], "label 2"),
        (["--encoded", "latents", "--label", "2", "--data", "set"], "label 2"),
        (["--encoded", "latents", "--label", "2", "--images", "class0.npy"], "label 2"),
    )
    for arguments, name in ways:
        assert main(["attribute", "model", *arguments, "--count", "2", "--steps", "3", "--reach", "2"]) == 0
        direction = Direction.load(Folder("."), "attribute.safetensors")
        assert f"{name}: {direction.separation.sentence()}" in capsys.readouterr().out
        # Class 2 has a first row that is lighter by 80 than class 0's, by 40 than class 1's, and nothing else.
        assert direction.vector[:4].norm() > 0.9 and direction.separation.auroc > 0.9
        assert direction.separation.held_out == (4, 8)
    real = torch.from_numpy(pixels[0::CLASSES][:2]).permute(0, 3, 1, 2)
    expected = drawn(figures.attribute(model, real, direction, [-2.0, 0.0, 2.0]))
    assert np.array_equal(picture("attribute.png"), expected)
    again = [
        "--direction",
        "attribute.safetensors",
        "--steps",
        "3",
        "--reach",
        "2",
        "--count",
        "2",
        "--output",
        "b.png",
    ]
    assert main(["attribute", "model", "--images", "class0.npy", *again]) == 0
    assert np.array_equal(picture("b.png"), expected)

    folders = ["--positives", "class2.npy", "--negatives", "class0.npy", "--save", "new/two.safetensors"]
    assert main(["attribute", "model", "--images", "class0.npy", *folders]) == 0
    two = Direction.load(Folder("new"), "two.safetensors")
    difference = pixels[2::CLASSES].reshape(20, -1), pixels[0::CLASSES].reshape(20, -1)
    kept = np.arange(20) % 5 != 4
    expected = difference[0][kept].astype(float).mean(axis=0) - difference[1][kept].astype(float).mean(axis=0)
    np.testing.assert_allclose(two.vector, expected / np.linalg.norm(expected), atol=1e-5)


def test_latents_that_cannot_be_written_are_not_made(here, capsys):
    Path("file").write_text("")
    assert main(["encode", "model", "set", "file/latents"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sivae: error: file/latents/") and "cannot write" in error and "encoding" not in error


@pytest.mark.parametrize(
    "examples", [["--positives", "class0.npy", "--negatives", "few.npy"], ["--label", "1", "--data", "set", "--split", "test"]]
)  # fmt: skip
def test_too_few_examples_are_known_before_any_is_encoded(here, capsys, examples):
    assert main([*FIND, *examples]) == 1
    error = capsys.readouterr().err
    assert "there are 3 examples with" in error and "encoding" not in error


@pytest.mark.parametrize("option", ["output", "save"])
def test_what_cannot_be_written_is_known_before_a_set_is_encoded(here, capsys, option):
    Path("file").write_text("")
    suffix = ".png" if option == "output" else ""
    arguments = ["--data", "set", "--label", "2", f"--{option}", f"file/x{suffix}"]
    assert main(["attribute", "model", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sivae: error: file/") and "cannot write" in error and "encoding" not in error


def test_unlabelled_images_of_a_conditional_model_are_given_a_label(here, capsys):
    arguments = ["--label", "1", "--data", "set", "--images", "few.npy", "--image-label", "2"]
    assert main(["attribute", "conditional", *arguments]) == 0 and Path("attribute.png").exists()


@pytest.mark.parametrize("split, number", [("all", 57), ("train", 7), ("test", 57)])
def test_the_numbers_of_neighbours_pick_the_same_images(here, capsys, pixels, split, number):
    """Whatever split they were looked for in, `SET#N` takes them of the whole set."""
    find = ["neighbours", "model", f"set#{number}", "--data", "set", "--split", split, "--count", "2"]
    assert main(find) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines[0][:2] == ["0.0000", f"#{number},"]
    picks = [int(line[1].strip("#,")) for line in lines]
    query, *found = torch.from_numpy(pixels[[number, *picks]]).permute(0, 3, 1, 2)
    names = [f"#{pick}\n{float(line[0]):.2f}" for pick, line in zip(picks, lines)]
    figure = figures.Figure(torch.stack([query, query, *found]), [""], ["real", "rec", *names])
    assert np.array_equal(picture("neighbours.png"), drawn(figure))


def test_the_numbers_of_neighbours_among_drawn_images_pick_them_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIVAE_CACHE", str(tmp_path / "cache"))
    tree = {"family": "conv", "num_channels": 3, "resolution": 8, "channels": [8], "latent_dim": 4}
    inference.export(inference.Model(parse_model(tree).model_dump()), "model")
    for number in (57, 60):  # of the splits train and test
        assert main(["neighbours", "model", f"shapes:#{number}", "--data", "shapes:", "--count", "1"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["0.0000", f"#{number},"]


def test_interpolate_on_a_sphere(here, pixels):
    assert main(["interpolate", "model", "set#0", "set#1", "--steps", "3", "--spherical"]) == 0
    model = sivae.load("model")
    ends = torch.from_numpy(pixels[:2]).permute(0, 3, 1, 2)
    path = model.to_uint8(model.interpolate(ends[:1], ends[1:], 3, spherical=True)[0])
    straight = model.to_uint8(model.interpolate(ends[:1], ends[1:], 3)[0])
    assert np.array_equal(picture("interpolation.png"), images.grid(torch.cat([ends[:1], path, ends[1:]]), 5))
    assert not torch.equal(path, straight)


FIND = ["attribute", "model", "--images", "few.npy"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["encode", "model", "set", "x", "--batch-size", "0"], "--batch-size: 0 is not a number of images"),
        (["encode", "model", "set", "x", "--split", "dev"], "set: there is no split 'dev'"),
        (["encode", "larger", "set", "x"], "SET is packed at resolution 4 and the model takes 8"),
        (["encode", "conditional", "unlabelled", "x"], "UNLABELLED: has no labels, and this model is conditional"),
        (["neighbours", "model", "few.npy", "--data", "set"], "few.npy: has more than one image, and one is to be picked; write few.npy#N"),
        (["neighbours", "model", "few.npy#0", "--data", "set", "--count", "61"], "--count: 61 is not in 1 .. 60, the images of"),
        (["neighbours", "model", "few.npy#0", "--data", "set", "--encoded", "x"], "x: holds no whole encoded set"),
        (["neighbours", "other", "few.npy#0", "--data", "set", "--encoded", "latents"], "latents: was encoded with other weights"),
        (["neighbours", "model", "few.npy#0", "--data", "unlabelled", "--encoded", "latents"], "latents: holds the latents of other images"),
        (["neighbours", "model", "few.npy#0", "--data", "set", "--encoded", "latents", "--split", "test"], "--split: latents holds the split all"),
        (["attribute", "larger", "--images", "few.npy", "--encoded", "latents", "--label", "1"], "latents: holds latents of 16 dimensions, and this model has 64"),
        (FIND, "give the attribute once: as --label"),
        ([*FIND, "--label", "1"], "--label: of which set? give its --data, or --encoded"),
        ([*FIND, "--label", "1", "--data", "set", "--direction", "x"], "give the attribute once"),
        ([*FIND, "--positives", "few.npy"], "--positives and --negatives go together"),
        ([*FIND, "--positives", "class0.npy", "--negatives", "few.npy"], "class0.npy against few.npy: there are 3 examples without it"),
        ([*FIND, "--label", "3", "--data", "set"], "--label: 3 is not in 0 .. 2, the labels of"),
        ([*FIND, "--label", "1", "--data", "set", "--split", "test"], "label 1: there are 3 examples with it; give 10 or more"),
        ([*FIND, "--label", "0", "--data", "unlabelled"], "--label: UNLABELLED has no labels"),
        (["attribute", "model", "--encoded", "latents", "--label", "1"], "give the --images to change, or --data"),
        ([*FIND, "--direction", "x.safetensors"], "./x.safetensors: cannot read, there is no such file"),
        (["attribute", "other", "--images", "few.npy", "--direction", "found.safetensors"], "found.safetensors: was found with other weights"),
        (["attribute", "larger", "--images", "few.npy", "--direction", "found.safetensors"], "found.safetensors: is a direction among 16 latent dimensions"),
        (["attribute", "conditional", "--images", "few.npy", "--label", "1", "--data", "set"], "--images: have no labels, and this model is conditional on 3 classes; give theirs as --image-label"),
        (["attribute", "model", "--label", "1", "--data", "set", "--image-label", "1"], "--image-label: goes with --images"),
        ([*FIND, "--label", "1", "--data", "set", "--steps", "1"], "--steps: 1 is too few, give 2 or more"),
        ([*FIND, "--label", "1", "--data", "set", "--reach", "0"], "--reach: 0.0 is not a distance above 0"),
    ],
)  # fmt: skip
def test_wrong_questions_get_one_sentence(here, packed, arguments, sentence, capsys):
    encode_all(sivae.load("model"), packed, "latents")
    vector = torch.nn.functional.one_hot(torch.tensor(0), 16).float()
    digest = inference.weights_digest(sivae.load("model"))
    Direction(vector, 1.0, "one", digest, Separation(1.0, 0.9, 0.9, 8, 8, (2, 2))).save(
        Folder("."), "found.safetensors"
    )
    capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    sentence = sentence.replace("UNLABELLED", "unlabelled").replace("SET", "set")
    assert error.startswith(f"sivae: error: {sentence}"), error
    assert not list(here.glob("*.png")) and not Path("x").exists() and not Path("attribute.safetensors").exists()
