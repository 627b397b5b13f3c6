"""Proves that the commands make the pictures and folders they promise, of the right size and content, and that bad input ends
with exit code 1 and one sentence, with a traceback only for `--debug`.

    python -m pytest tests/unit/test_commands.py
"""

import json
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import sivae
from sivae import checkpoint, commands, figures, inference
from sivae.cli import main
from sivae.config import parse_model
from sivae.data.pack import pack
from sivae.doctor import product_speeds
from sivae.errors import UserError
from sivae.images import grid, pixels
from sivae.storage import Folder
from tests.proxy import FileServer

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"


def export(folder, **fields):
    tree = {"family": "conv", "num_channels": 1, "resolution": 16, "channels": [8, 8], "latent_dim": 4} | fields
    inference.export(inference.Model(parse_model(tree).model_dump()), str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    mlp = {"family": "mlp", "sample_shape": [1, 16, 16], "latent_dim": 4, "num_hidden": 8}
    two = {"family": "mlp", "sample_shape": [2], "latent_dim": 2, "num_hidden": 8}
    for name, tree in {"mlp": mlp, "points": two}.items():
        inference.export(inference.Model(parse_model(tree).model_dump()), str(folder / name))
    return {
        "grey": export(folder / "grey"),
        "colour": export(folder / "colour", num_channels=3),
        "conditional": export(folder / "conditional", num_classes=10),
        "mlp": str(folder / "mlp"),
        "points": str(folder / "points"),
    }


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test in a folder of its own, with the environment as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIVAE_DEBUG", "")
    monkeypatch.setenv("SIVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


def picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def size_of_grid(count, columns, size=64, padding=2):
    return (-(-count // columns) * (size + padding) + padding, columns * (size + padding) + padding, 3)


def save_image(path, channels=3, size=(20, 30), seed=0):
    data = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    Image.fromarray(data if channels == 3 else data[..., 0]).save(path)
    return str(path)


@pytest.mark.parametrize("kind", ["grey", "colour", "mlp", "conditional"])
def test_sample(models, kind, here, capsys):
    assert main(["sample", models[kind], "--count", "10", "--seed", "3"]) == 0
    found = picture("samples.png")
    assert found.shape == size_of_grid(10, 3)
    model = sivae.load(models[kind])
    assert np.array_equal(found, grid(model.to_uint8(model.sample(10, seed=3)), 3))
    assert capsys.readouterr().out.strip() == "samples.png"


def test_sample_into_a_folder_and_a_new_place(models, here):
    command = ["sample", models["colour"], "--count", "3", "--output", "new/place/a.png", "--folder", "each"]
    assert main(command) == 0
    assert picture("new/place/a.png").shape == size_of_grid(3, 2)
    assert sorted(path.name for path in Path("each").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    model = sivae.load(models["colour"])
    assert np.array_equal(picture("each/000001.png"), pixels(model.to_uint8(model.sample(3))[1]))


def sizes_of(monkeypatch, name):
    """How many images each call of a model's method is given or asked for."""
    sizes, method = [], getattr(inference.Model, name)

    def spy(model, images, *rest, **settings):
        sizes.append(images if isinstance(images, int) else len(images))
        return method(model, images, *rest, **settings)

    monkeypatch.setattr(inference.Model, name, spy)
    return sizes


def test_many_samples_are_made_and_written_in_parts(models, here, monkeypatch, capsys):
    model = sivae.load(models["conditional"])
    expected = model.to_uint8(model.sample(10, seed=1))
    monkeypatch.setattr(commands.pictures, "SAMPLE_BATCH", 4)
    monkeypatch.setattr(commands.pictures, "NUM_SHOWN", 6)
    sizes = sizes_of(monkeypatch, "sample")
    for extra, num_shown in (([], 10), (["--folder", "each"], 6)):
        assert main(["sample", models["conditional"], "--count", "10", "--seed", "1", *extra]) == 0
        columns = round(num_shown**0.5)
        assert np.array_equal(picture("samples.png"), grid(expected[:num_shown], columns))
    assert sizes == 2 * [4, 4, 2]
    for number, image in enumerate(expected):
        assert np.array_equal(picture(f"each/{number:06d}.png"), pixels(image))
    assert capsys.readouterr().out.endswith("each: 10 images; the picture shows the first 6\n")


def test_a_folder_keeps_no_samples_of_an_earlier_call(models, here, capsys):
    def sample(count, seed):
        return ["sample", models["grey"], "--count", str(count), "--seed", str(seed), "--folder", "each"]

    assert main(sample(6, seed=0)) == 0
    capsys.readouterr()
    Path("samples.png").unlink()
    before = {path: path.read_bytes() for path in Path("each").iterdir()}
    told = failed(sample(2, seed=1), capsys)
    assert told.startswith("--folder: each holds 4 images that these 2 would not replace, the first is 000002.png")
    assert before == {path: path.read_bytes() for path in Path("each").iterdir()} and not Path("samples.png").exists()
    Path("each/notes.png").touch()  # no sample
    assert main(sample(6, seed=1)) == 0
    assert all(path.read_bytes() != data for path, data in before.items())


def test_sample_to_an_absolute_path(models, here):
    assert main(["sample", models["grey"], "--count", "1", "--output", str(here / "a.png")]) == 0
    assert picture(here / "a.png").shape == size_of_grid(1, 1)


def test_a_picture_in_no_folder_is_refused(models, here, capsys):
    sentence = "memory://s.png: lies in no folder; give one, as in memory://folder/s.png"
    assert failed(["sample", models["grey"], "--output", "memory://s.png"], capsys) == sentence
    assert not list(here.iterdir())
    assert main(["sample", models["grey"], "--output", "memory://folder/s.png"]) == 0
    assert Folder("memory://folder").read("s.png").startswith(b"\x89PNG")


def test_a_picture_for_a_web_server_is_sent_there_alone(models, here, capsys, monkeypatch):
    server = FileServer(here)  # which takes none
    monkeypatch.setattr(Folder, "_pause", lambda self, attempt: None)
    try:
        told = failed(["sample", models["grey"], "--output", f"{server.url}/s.png"], capsys)
    finally:
        server.kill()
    assert told.startswith(f"{server.url}/s.png: cannot write")


def test_sample_of_one_class(models, here):
    assert main(["sample", models["conditional"], "--count", "4", "--label", "7"]) == 0
    model = sivae.load(models["conditional"])
    samples = model.to_uint8(model.sample(4, labels=torch.full((4,), 7)))
    assert np.array_equal(picture("samples.png"), grid(samples, 2))


def size_of_panels(count, columns):
    height, width, _ = size_of_grid(count, columns)
    return (2 * (18 + height), width, 3)


@pytest.mark.parametrize("kind", ["grey", "colour", "mlp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_reconstruct_an_image_file(models, kind, channels, here, capsys):
    """Of any size, grey or colour: it is fitted to the model."""
    assert main(["reconstruct", models[kind], save_image(here / "a.png", channels)]) == 0
    assert picture("reconstructions.png").shape == size_of_panels(1, 1)
    assert "mean squared error" in capsys.readouterr().out


def test_reconstruct_digits(models, here, capsys):
    assert main(["reconstruct", models["grey"], "digits:", "--count", "6"]) == 0
    found = picture("reconstructions.png")
    assert found.shape == size_of_panels(6, 2)
    from sivae.data.sources import open_source

    digits = torch.stack([torch.from_numpy(open_source("digits:", resolution=16)[i].pixels) for i in range(6)])
    digits = digits.permute(0, 3, 1, 2)
    assert np.array_equal(found[18 : len(found) // 2], grid(digits, 2))
    model = sivae.load(models["grey"])
    again = model.to_uint8(model.reconstruct(digits))
    assert np.array_equal(found[len(found) // 2 + 18 :], grid(again, 2))
    # The printed number has five digits after the point.
    error = float(((again.double() - digits.double()) / 255).square().mean())
    assert f"mean squared error {error:.5f} over 6 images" in capsys.readouterr().out


def test_reconstruct_a_folder_an_array_and_a_packed_set(models, here):
    (here / "folder").mkdir()
    for index in range(3):
        save_image(here / "folder" / f"{index}.png", channels=1 + 2 * (index % 2), seed=index)
    assert main(["reconstruct", models["colour"], "folder"]) == 0
    assert picture("reconstructions.png").shape == size_of_panels(3, 2)
    np.save("a.npy", np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8))
    assert main(["reconstruct", models["grey"], "a.npy", "--count", "4"]) == 0
    assert picture("reconstructions.png").shape == size_of_panels(4, 2)
    array = picture("reconstructions.png")
    pack("a.npy", "packed", resolution=16, progress=False)
    assert main(["reconstruct", models["grey"], "packed", "--count", "4"]) == 0
    found = picture("reconstructions.png")
    half = len(found) // 2
    assert np.array_equal(found[:half], array[:half])
    # Float32 rounding (another memory layout) may fall on the two sides of a half: one level of 256.
    assert np.abs(found[half:].astype(int) - array[half:]).max() <= 1


@pytest.mark.parametrize("name", ["Größe 日本 #1.png", "a#7"])
def test_reconstruct_what_has_a_number_sign_in_its_name(models, here, name):
    if name.endswith(".png"):
        save_image(here / name)
    else:
        (here / name).mkdir()
        for index in range(2):
            save_image(here / name / f"{index}.png", seed=index)
    assert main(["reconstruct", models["colour"], name]) == 0
    assert picture("reconstructions.png").shape == size_of_panels(*(1, 1) if name.endswith(".png") else (2, 1))
    assert main(["reconstruct", models["colour"], f"{name}#0"]) == 0
    assert picture("reconstructions.png").shape == size_of_panels(1, 1)


def test_many_images_are_reconstructed_in_parts(models, here, monkeypatch, capsys):
    assert main(["reconstruct", models["conditional"], "digits:", "--count", "10"]) == 0
    whole, told = picture("reconstructions.png"), capsys.readouterr().out
    monkeypatch.setattr(figures, "BATCH", 4)
    sizes = sizes_of(monkeypatch, "reconstruct")
    assert main(["reconstruct", models["conditional"], "digits:", "--count", "10"]) == 0
    assert sizes == [4, 4, 2]
    # Batches of another size round differently: one level of 256 at most.
    assert np.abs(picture("reconstructions.png").astype(int) - whole).max() <= 1
    before, after = (float(re.search(r"error (\S+) over 10 images", out)[1]) for out in (told, capsys.readouterr().out))
    assert after == pytest.approx(before, abs=1e-4)


def test_reconstruct_what_lies_at_a_url_with_a_query(models, here):
    save_image(here / "odd.png")
    shutil.copy("odd.png", "copy")
    np.save("a.npy", np.zeros((5, 16, 16, 1), np.uint8))
    assert main(["reconstruct", models["colour"], "odd.png"]) == 0
    expected = picture("reconstructions.png")
    server = FileServer(here)
    try:
        for url in ("odd.png?x=1", "odd.png?x=a/b.c", "copy?x=a.png", "odd.png?x=1#0"):
            assert main(["reconstruct", models["colour"], f"{server.url}/{url}", "--output", "b.png"]) == 0
            assert np.array_equal(picture("b.png"), expected)
        assert main(["reconstruct", models["grey"], f"{server.url}/a.npy?x=1#4"]) == 0
    finally:
        server.kill()


def test_reconstruct_images_of_every_split(models, here):
    np.save("a.npy", np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8))
    for name, splits in (("parted", "test=0:3,train=3:"), ("held_out", "test=0:5")):
        pack("a.npy", name, resolution=16, splits=splits, progress=False)
        for number in ("1", "4"):
            assert main(["reconstruct", models["grey"], f"a.npy#{number}"]) == 0
            expected = picture("reconstructions.png")
            assert main(["reconstruct", models["grey"], f"{name}#{number}"]) == 0
            assert np.array_equal(picture("reconstructions.png")[:84], expected[:84])


def test_reconstruct_images_of_a_pyramid(models, here, capsys):
    np.save("a.npy", np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1), dtype=np.uint8))
    pack("a.npy", "pyramid", resolution=32, pyramid=True, progress=False)
    for source in ("pyramid/16#3", "pyramid#3"):
        assert main(["reconstruct", models["grey"], source, "--output", f"{len(source)}.png"]) == 0
    assert np.array_equal(picture("12.png"), picture("9.png"))
    shutil.rmtree("pyramid/16")
    told = failed(["reconstruct", models["grey"], "pyramid#3"], capsys)
    assert told.startswith("pyramid has the resolutions 4, 8, 32, and not 16")


def test_reconstruct_with_the_labels_of_the_set(models, here):
    assert main(["reconstruct", models["conditional"], "digits:#13"]) == 0
    assert picture("reconstructions.png").shape == size_of_panels(1, 1)


def test_interpolate(models, here):
    assert main(["interpolate", models["grey"], "digits:#3", "digits:#1796", "--steps", "5"]) == 0
    found = picture("interpolation.png")
    assert found.shape == size_of_grid(7, 7)
    from sivae.data.sources import open_source

    source = open_source("digits:", resolution=16)
    ends = [torch.from_numpy(source[i].pixels).permute(2, 0, 1)[None] for i in (3, 1796)]
    model = sivae.load(models["grey"])
    path = model.to_uint8(model.interpolate(*ends, 5)[0])
    assert np.array_equal(found, grid(torch.cat([ends[0], path, ends[1]]), 7))


def test_interpolate_between_files(models, here):
    first, second = save_image(here / "a.png"), save_image(here / "b.jpg", seed=1)
    assert main(["interpolate", models["colour"], first, second, "--output", "x.png"]) == 0
    assert picture("x.png").shape == size_of_grid(12, 12)


def golden(name):
    data = np.load(GOLDEN / f"{name}.npz")
    return {n.removeprefix("init/"): torch.from_numpy(data[n]) for n in data.files if n.startswith("init/")}


@pytest.mark.parametrize("name, kind", [("conv_bootstrap", "bootstrap"), ("mlp_soft_intro_vae", "2D")])
def test_import(name, kind, here, capsys):
    torch.save({"epoch": 1, "model": golden(name)}, "published.pth")
    assert main(["import", "published.pth", "ours"]) == 0
    assert f"{kind} model" in capsys.readouterr().out
    model = sivae.load("ours")
    assert model.info == {"imported_from": "published.pth", "kind": kind}
    assert (here / "ours" / "target_decoder.safetensors").exists() == (kind == "bootstrap")
    mu, _ = model.encode(torch.rand(2, *model.sample_shape))
    assert mu.shape == (2, model.latent_dim)


def test_an_export_has_the_target_decoder_of_its_own_model_alone(models, here):
    torch.save({"model": golden("conv_bootstrap")}, "published.pth")
    assert main(["import", "published.pth", "ours"]) == 0
    assert main(["export", "ours", "copy"]) == 0
    there, here_too = inference.read_target("ours"), inference.read_target("copy")
    assert there and all(torch.equal(here_too[name], value) for name, value in there.items())
    Path("ours/target_decoder.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="ours/target_decoder.safetensors: is damaged"):
        inference.read_target("ours")
    assert main(["export", models["grey"], "copy"]) == 0
    assert inference.read_target("copy") == {}


def test_import_of_an_intro_vae(here, capsys):
    torch.save({"model": golden("conv_intro_vae")}, "published.pth")
    assert main(["import", "published.pth", "ours", "--residual", "intro_vae"]) == 0
    assert "IntroVAE model" in capsys.readouterr().out
    assert json.loads(Path("ours/sivae.json").read_text())["model"]["residual"] == "intro_vae"


def test_export(models, here, capsys):
    assert main(["export", models["grey"], "copy"]) == 0
    assert torch.equal(sivae.load("copy").sample(2), sivae.load(models["grey"]).sample(2))
    assert "parameters" in capsys.readouterr().out


CONFIG = """
run: {directory: runs/x}
data: {url: "digits:"}
model: {family: conv, num_channels: 1, resolution: 16, channels: [8], latent_dim: 4}
objective: {name: soft_intro_vae}
schedule: {total_images: 1000, batch_size: 10}
"""


def test_doctor_without_a_config(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in out and "deepspeed" in out and "nothing stands in the way" in out


@pytest.mark.parametrize(
    "bfloat16, part", [(5e10, "0.5 times as fast in bfloat16"), (1e11, "no time"), (3e11, "worth trying")]
)
def test_doctor_says_which_precision_is_faster(capsys, monkeypatch, bfloat16, part):
    monkeypatch.setattr("sivae.doctor.product_speeds", lambda device: {"float32": 1e11, "bfloat16": bfloat16})
    assert main(["doctor"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "products run" in line]
    assert part in line and ("costs time" in line) == (bfloat16 < 1e11)


class SlowInBfloat16(TorchDispatchMode):
    """Every product of bfloat16 takes a twentieth of a second longer, and the first of float32 a fifth."""

    num_slow = num_float32 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.bfloat16:
            time.sleep(0.05)
            self.num_slow += 1
        elif func is torch.ops.aten.mm.default:
            time.sleep(0 if self.num_float32 else 0.2)
            self.num_float32 += 1
        return func(*args, **(kwargs or {}))


def test_speeds_of_products_are_measured_in_short_time():
    with SlowInBfloat16() as mode:
        speeds = product_speeds(torch.device("cpu"))
    assert 1 <= mode.num_slow <= 2  # a tenth of a second is enough
    assert speeds["bfloat16"] < 2 * 256**3 / 0.05 < speeds["float32"]


def test_settings_may_stand_behind_options(here, capsys):
    Path("a.yaml").write_text(CONFIG)
    assert main(["doctor", "a.yaml", "--debug", "schedule.batch_size=7", "data.url=nowhere"]) == 1
    assert "global batch 7" in capsys.readouterr().out
    for wrong in ("--nothing=3", "nothing", "=3"):
        with pytest.raises(SystemExit):
            main(["doctor", "a.yaml", "--debug", wrong])
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", "model", "--count", "3", "data.url=nowhere"])


def test_doctor_with_a_config_that_works(here, capsys):
    Path("a.yaml").write_text(CONFIG)
    np.save("a.npy", np.zeros((20, 16, 16), np.uint8))
    pack("a.npy", "packed", resolution=16, progress=False)
    assert main(["doctor", "a.yaml", "data.url=packed"]) == 0
    out = capsys.readouterr().out
    assert "a.yaml: valid" in out and "no checkpoint yet" in out and "20 images" in out and "BAD" not in out
    assert not [path for path in here.rglob("*doctor*")]  # the probe is gone


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["a.yaml", "schedule.batch_sise=3"], "did you mean `batch_size`?"),
        (["a.yaml", "data.url=nowhere"], "data.url: "),
        (["a.yaml", "data.url=packed", "run.directory=a.yaml"], "run.directory: "),
        (["a.yaml", "data.url=packed", "model.resolution=8"], "data.url: "),
        (["a.yaml", "data.url=packed", "model.num_classes=9"], "model.num_classes: is 9, but packed has no classes"),
        (["a.yaml", "data.url=packed", "run.init_from=nowhere"], "run.init_from: nowhere: holds no model"),
        (
            ["a.yaml", "data.url=packed", "run.directory=other"],
            "run.directory: other: holds checkpoints of another model",
        ),
        (["a.yaml", "data.url=packed", "run.directory=exported"], "run.directory: exported: holds an exported model"),
        (["a.yaml", "data.url=packed", "evaluate.every_images=9", "evaluate.metrics=[fidd]"], "fidd"),
        (
            ["a.yaml", "data.url=packed", "evaluate.every_images=9", "evaluate.data=/no/where"],
            "evaluate: there is no packed image set",
        ),
        (["a.yaml", "data.url=packed", "evaluate.every_images=9", "evaluate.split=validation"], "there is no split"),
        (["a.yaml", "data.url=packed", "run.device=cuda"], "run.device: cuda is asked for"),
    ],
)
def test_doctor_says_what_is_wrong_and_exits_with_1(here, capsys, arguments, part):
    Path("a.yaml").write_text(CONFIG)
    np.save("a.npy", np.zeros((20, 16, 16), np.uint8))
    pack("a.npy", "packed", resolution=16, progress=False)
    checkpoint.save(Folder("other"), {"images_seen": 16, "model": {"family": "mlp"}}, {})
    Folder("exported").write(b"{}", "sivae.json")
    if "run.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = main(["doctor", *arguments])
    out = capsys.readouterr().out
    assert any(line.startswith("BAD") and part in line for line in out.splitlines()), out
    assert "1 things to mend" in out and "nothing stands in the way" not in out
    assert code == 1


# Bad input


def failed(arguments, capsys):
    """The one sentence that a command ends with."""
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 1
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sivae: error: "), captured.err
    assert "Traceback" not in captured.err + captured.out
    return lines[0].removeprefix("sivae: error: ")


BAD = [
    (["sample", "nowhere"], "nowhere: holds no model"),
    (["sample", "GREY", "--count", "-1"], "--count: -1"),
    (["sample", "GREY", "--count", "0"], "--count: 0"),
    (["sample", "GREY", "--seed", "-1"], "--seed"),
    (["sample", "GREY", "--label", "1"], "not conditional"),
    (["sample", "CONDITIONAL", "--label", "10"], "--label: 10 is not in 0 .. 9"),
    (["sample", "CONDITIONAL", "--label", "-1"], "--label: -1 is not in 0 .. 9"),
    (["sample", "POINTS"], "not one of images"),
    (["sample", "GREY", "--output", "text.txt/a.png"], "cannot write"),
    (["sample", "GREY", "--output", "a.jpg"], "--output: a.jpg is written as .png; name it like that"),
    (["ood", "GREY", "--output", "a"], "--output: a is written as .png"),
    (["ood", "GREY", "--judge", "digits:#0", "--samples", "4"], "--samples: goes without --judge"),
    (["ood", "GREY", "--judge", "digits:#0", "--inlier-split", "all"], "--inlier-split: goes without --judge"),
    (["ood", "GREY", "--inlier", "digits:", "--outlier", "packed", "--score", "kl"], "--score: goes with --judge"),
    (["sample", "GREY", "--truncation-layers", "2"], "truncation_layers: without a truncation"),
    (
        ["sample", "GREY", "--truncation-sweep", "3", "--truncation", "1"],
        "--truncation: goes without --truncation-sweep",
    ),
    (["sample", "GREY", "--truncation-sweep", "3", "--folder", "f"], "--folder: goes without --truncation-sweep"),
    (["interpolate", "GREY", "digits:#0", "digits:#1", "--frames", "5"], "--frames: goes with --gif"),
    (
        ["attribute", "GREY", "--images", "digits:", "--direction", "a", "--save", "b"],
        "--save: goes without --direction",
    ),
    (
        ["attribute", "GREY", "--images", "digits:", "--positives", "a", "--negatives", "b", "--encoded", "c"],
        "--encoded: goes with --label",
    ),
    (
        ["attribute", "GREY", "--images", "digits:", "--positives", "a", "--negatives", "b", "--split", "test"],
        "--split: goes with --data",
    ),
    (["interpolate", "GREY", "digits:#0", "digits:#1", "--gif", "a.png"], "--gif: a.png is written as .gif"),
    (["reconstruct", "POINTS", "digits:"], "not one of images"),
    (["reconstruct", "GREY", "nowhere.png"], "nowhere.png"),
    (["reconstruct", "GREY", "broken.png"], "broken.png: cannot be read as an image"),
    (["reconstruct", "GREY", "text.txt"], "text.txt"),
    (["reconstruct", "GREY", "nowhere"], "nowhere"),
    (["reconstruct", "GREY", "empty"], "no images"),
    (["reconstruct", "GREY", "digits:", "--count", "-1"], "--count: -1"),
    (["reconstruct", "GREY", "digits:", "--count", "0"], "--count: 0"),
    (["reconstruct", "GREY", "digits:#1797"], "images 0 to 1796"),
    (["reconstruct", "GREY", "digits:#x"], "#x"),
    (["reconstruct", "GREY", "digits:#-1"], "#-1"),
    (["reconstruct", "GREY", "digits:#²"], "#²"),
    (["reconstruct", "GREY", "image.png#1"], "images 0 to 0"),
    (["reconstruct", "CONDITIONAL", "image.png"], "labels"),
    (["interpolate", "GREY", "digits:#0", "digits:#1797"], "images 0 to 1796"),
    (["interpolate", "GREY", "digits:#0", "nowhere.png"], "nowhere.png"),
    (["interpolate", "GREY", "digits:#0", "digits:"], "digits:: has more than one image"),
    (["interpolate", "GREY", "digits:", "digits:#0"], "digits:: has more than one image"),
    (["ood", "GREY", "--judge", "digits:"], "digits:: has more than one image"),
    (["interpolate", "GREY", "digits:#0", "digits:#1", "--steps", "1"], "--steps: 1"),
    (["import", "nowhere.pth", "ours"], "there is no such file"),
    (["import", "text.txt", "ours"], "text.txt: is not a PyTorch file, such as a published .pth"),
    (["import", "empty", "ours"], "empty: cannot be read (Is a directory); give a published .pth file"),
    (["import", "s3://bucket/a.pth", "ours"], "no such file on this machine; what is at a URL is to be fetched first"),
    (["sample", "empty/checkpoints/best"], "empty/checkpoints/best: there is no best checkpoint"),
    (["export", "empty", "ours"], "holds no model"),
    (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    (["train", "text.txt"], "text.txt"),
]


@pytest.mark.parametrize("arguments, part", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_sentence(models, here, capsys, arguments, part):
    (here / "empty").mkdir()
    (here / "text.txt").write_text("- not a config\n")
    save_image(here / "image.png")
    (here / "broken.png").write_bytes((here / "image.png").read_bytes()[:200])
    arguments = [models.get(argument.lower(), argument) if argument.isupper() else argument for argument in arguments]
    assert part in failed(arguments, capsys)
    assert not Path("ours").exists() and not list(here.glob("*ations.png")) and not Path("samples.png").exists()


def test_doctor_does_not_call_emulated_bfloat16_supported(capsys, monkeypatch):
    """torch does, and asks the current GPU alone."""
    made = [SimpleNamespace(name=name, total_memory=2**34, major=major) for name, major in (("V100", 7), ("A100", 8))]
    for name, value in (
        ("is_available", lambda: True), ("is_bf16_supported", lambda: True), ("device_count", lambda: len(made)),
        ("get_device_properties", made.__getitem__),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("sivae.doctor.product_speeds", lambda device: {"float32": 1e11, "bfloat16": 1e11})
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "V100, 16 GiB, bfloat16 False" in told and "A100, 16 GiB, bfloat16 True" in told


def test_a_gpu_that_is_not_there_is_told_of_by_the_commands_option(models, here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["sample", models["grey"]], ["evaluate", models["grey"], "--data", "set", "--metrics", "mse"]):
        told = failed([*arguments, "--device", "cuda"], capsys)
        assert told.startswith("cuda is asked for (by --device, or run.device of a config), but torch sees no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    told = failed([*arguments, "--device", "cuda"], capsys)
    assert "this process is shown 1" in told and "show each of them all" in told


@pytest.mark.parametrize("network", ["encoder", "decoder"])
def test_images_that_are_not_finite_are_not_drawn(models, here, capsys, network):
    model = sivae.load(models["grey"])
    next(getattr(model, network).parameters()).fill_(float("nan"))
    inference.export(model, "damaged")
    commands_of_images = (
        ["reconstruct", "digits:"],
        ["interpolate", "digits:#0", "digits:#1"],
        ["traverse", "digits:"],
    )
    of_prior = [["sample"]] if network == "decoder" else []
    for command, *rest in (*commands_of_images, *of_prior):
        told = failed([command, "damaged", *rest], capsys)
        assert told == "damaged: makes images that are not finite; take an earlier checkpoint"
    assert [path.name for path in here.iterdir()] == ["damaged"]


def test_debug_shows_the_traceback(models, here):
    with pytest.raises(UserError, match="holds no model"):
        main(["sample", "nowhere", "--debug"])


def test_the_process_prints_a_traceback_for_debug_alone(here):
    for arguments, expected in (([], False), (["--debug"], True)):
        done = subprocess.run(
            [sys.executable, "-m", "sivae", "export", "nowhere", "x", *arguments],
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == expected and "holds no model" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["dance"], ["sample"], ["sample", "x", "--count", "many"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: sivae" in capsys.readouterr().err


def test_help_and_version(capsys):
    for arguments, part in ((["--help"], "interpolate"), (["--version"], sivae.__version__), (["train", "-h"], "YAML")):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0 and part in capsys.readouterr().out


def test_only_rank_0_prints_what_all_ranks_found(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["export", "nowhere", "x"]) == 1
    assert capsys.readouterr().err.startswith("sivae: error (rank 1): nowhere")  # not known to be shared


@pytest.mark.parametrize(
    "command, advice", [("train", "micro_batch_size"), ("evaluate", "take fewer images at a time")]
)
@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_memory_that_ran_out_is_one_sentence(monkeypatch, capsys, command, advice, kind):
    monkeypatch.setenv("SIVAE_DEBUG", "")

    def ends(options):
        raise kind("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB")

    monkeypatch.setitem(commands.COMMANDS, command, ends)
    arguments = {"train": ["x.yaml"], "evaluate": ["model", "--data", "set", "--metrics", "mse"]}[command]
    told = failed([command, *arguments], capsys)
    assert "(CUDA out of memory); " in told and advice in told
    with pytest.raises(kind):
        main([command, *arguments, "--debug"])


def test_a_hosts_memory_that_ran_out_in_torch_is_one_sentence_too(models, capsys, monkeypatch):
    monkeypatch.setenv("SIVAE_DEBUG", "")

    def ends(options):
        torch.empty(2**50)

    monkeypatch.setitem(commands.COMMANDS, "sample", ends)
    told = failed(["sample", "model"], capsys)
    assert (
        "out of memory" in told and told.endswith("; take fewer images at a time") and "(can't allocate memory" in told
    )


def test_a_fault_of_the_program_is_not_taken_for_memory(monkeypatch):
    def ends(options):
        raise RuntimeError("a fault")

    monkeypatch.setitem(commands.COMMANDS, "train", ends)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["train", "x.yaml"])
