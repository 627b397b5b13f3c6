"""Judging a model gives what its parts give by hand, keeps the protocol beside every figure, and refuses in one sentence what
cannot be judged whole.

    python -m pytest tests/unit/test_evaluate.py
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sivae import inference, real_statistics
from sivae.cli import main
from sivae.data import open_stream
from sivae.errors import UserError
from sivae.evaluate import Evaluation, Protocol, keep
from sivae.images import to_float
from sivae.inference import load, weights_digest
from sivae.metrics import kid, precision_recall, reconstruction
from sivae.metrics.frechet import frechet_distance, moments
from sivae.storage import Folder
from tests.unit.judged import (
    ALONE,
    SIZE,
    Lpips,
    NanLpips,
    Net,
    export_model,
    make_model,
    pack_images,
    save_script,
    sha256,
)

ALL = (
    "frechet_pixels",
    "kernel_pixels",
    "precision_pixels",
    "recall_pixels",
    "density_pixels",
    "coverage_pixels",
    "mse",
    "psnr",
)
FEW = Protocol(("frechet_pixels",), num_fakes=80)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pack_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return save_script(Net(), tmp_path_factory.mktemp("net") / "net.pt")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SIVAE_DEBUG", "")


def judge(data, protocol=FEW, model=None, **settings):
    stream = open_stream(data, batch_size=1)
    evaluation = Evaluation(stream, protocol, ALONE, progress=False, **settings)
    return evaluation.run(model or make_model()), evaluation


def test_the_figures_are_those_of_their_parts(data, monkeypatch):
    monkeypatch.setitem(kid.kernel_distance.__kwdefaults__, "num_subsets", 5)  # a hundred take seconds
    figures, _ = judge(data, Protocol(ALL, num_fakes=1050, seed=3))
    model, stream = make_model(), open_stream(data, batch_size=1)
    real = stream.sample(range(len(stream))).images
    fake = model.to_uint8(model.sample(1050, seed=3))
    x, y = to_float(real).flatten(1), to_float(fake).flatten(1)
    again = to_float(model.to_uint8(model.reconstruct(real)))
    distance, deviation = kid.kernel_distance(x, y, seed=3)
    expected = {
        "frechet_pixels": frechet_distance(moments(y.numpy()), moments(x.numpy())),
        "kernel_pixels": distance, "kernel_pixels_deviation": deviation,
        **dict(zip(("precision_pixels", "recall_pixels"), precision_recall.precision_recall(x, y))),
        **dict(zip(("density_pixels", "coverage_pixels"), precision_recall.density_coverage(x, y))),
        "mse": reconstruction.mse(to_float(real), again).mean().item(),
        "psnr": reconstruction.psnr(to_float(real), again).mean().item(),
    }  # fmt: skip
    # Other batches choose other kernels, whose rounding can move a value to the next of 256.
    assert figures == pytest.approx(expected, rel=2e-4, abs=1e-5) and list(figures)[: len(ALL)] == list(ALL)


def test_networks_compute_in_float32_whatever_training_has_set(data):
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    model, seen = make_model(), set()
    model.decoder.register_forward_hook(lambda *_: seen.update(switch.allow_tf32 for switch in switches))
    try:
        for switch in switches:
            switch.allow_tf32 = True
        judge(data, Protocol(("frechet_pixels", "mse"), num_fakes=1050), model=model)
        assert seen == {False} and all(switch.allow_tf32 for switch in switches)
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def test_a_file_as_detector_and_lpips(data, net, tmp_path):
    lpips = save_script(Lpips(), tmp_path / "lpips.pt")
    protocol = Protocol(("frechet_mine", "lpips", "mse"), num_fakes=100)
    figures, evaluation = judge(data, protocol, detectors={"mine": net}, lpips=lpips)
    assert figures["lpips"] == pytest.approx(4 * figures["mse"], rel=1e-4)  # images reach from -1 to 1 there
    assert figures["frechet_mine"] > 0
    described = evaluation.describe()
    assert described["detectors"][0]["sha256"] == sha256(net) and described["lpips"]["sha256"] == sha256(lpips)


def test_what_the_protocol_says_is_done(data):
    first, _ = judge(data)
    assert judge(data)[0] == first
    for change in ({"seed": 1}, {"num_fakes": 90}, {"num_reals": 500}, {"rounding": "down"}):
        assert judge(data, replace(FEW, **change))[0] != first, change


def test_train_mode_takes_the_statistics_of_each_batch_and_changes_no_model(data):
    model = make_model(norm="batch")
    before = {k: v.clone() for k, v in (model.decoder.state_dict() | model.encoder.state_dict()).items()}
    plain = judge(data, FEW, model)[0]
    train = judge(data, replace(FEW, mode="train"), model)[0]
    assert train != plain and judge(data, FEW, model)[0] == plain
    after = model.decoder.state_dict() | model.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # By hand: two batches of 64 and 16.
    model.decoder.train()
    fake = torch.cat([model.sample(64, first=0), model.sample(16, first=64)])
    stream = open_stream(data, batch_size=1)
    real = to_float(stream.sample(range(len(stream))).images).flatten(1)
    made = to_float(model.to_uint8(fake)).flatten(1)
    assert train["frechet_pixels"] == pytest.approx(
        frechet_distance(moments(made.numpy()), moments(real.numpy())), rel=1e-6
    )


def test_the_published_protocol():
    plain = Protocol.published(("fid",), {"norm": "group"}, 70_000)
    assert (plain.num_fakes, plain.num_reals, plain.truncation) == (50_000, 50_000, 1.0)
    assert (plain.mode, plain.rounding, plain.name) == ("eval", "down", "published")
    batch = Protocol.published(("fid",), {"norm": "batch"}, 30_000)
    assert (batch.mode, batch.batch_size, batch.num_reals) == ("train", 32, 30_000)


# Statistics of the real images


@pytest.mark.parametrize("metric", ["frechet_pixels", "precision_pixels"])
def test_statistics_are_kept_and_used_again(data, tmp_path, monkeypatch, metric):
    protocol, kept = replace(FEW, metrics=(metric,)), Folder(str(tmp_path / "kept"))
    without, _ = judge(data, protocol)
    first, _ = judge(data, protocol, statistics=kept)
    monkeypatch.setattr("sivae.data.reader.ImageStream.sample", None)  # the images are not read again
    again, _ = judge(data, protocol, statistics=kept)
    assert without == first == again and len(kept.names()) == 1


def test_statistics_of_a_set_without_checksums_are_not_kept(data, tmp_path):
    """Nobody would see that its images were replaced."""
    found = open_stream(data, batch_size=1)
    found.index = replace(found.index, crc32=None)
    kept = Folder(str(tmp_path))
    Evaluation(found, FEW, ALONE, statistics=kept, progress=False).run(make_model())
    assert kept.names() == []


def test_statistics_of_another_protocol_are_not_used(data, tmp_path):
    kept = Folder(str(tmp_path / "kept"))
    judge(data, FEW, statistics=kept)
    judge(data, replace(FEW, num_reals=500), statistics=kept)
    other = pack_images(tmp_path / "other", seed=1)
    judge(other, FEW, statistics=kept)
    assert len(kept.names()) == 3
    # A file that was given the name of another protocol's
    evaluation = judge(data, replace(FEW, num_reals=600))[1]
    held = kept.names()[0]
    kept.write(kept.read(held), real_statistics.file_name(evaluation._real_protocol("pixels")))
    with pytest.raises(UserError, match=r"statistics of another protocol \(.* is .* there and .* here\); delete"):
        judge(data, replace(FEW, num_reals=600), statistics=kept)


def test_the_setting_says_where_statistics_are_kept_then_the_environment(monkeypatch):
    monkeypatch.setenv("SIVAE_CACHE", "/environment")
    assert real_statistics.default_folder("/setting").url == "/setting/statistics"
    assert real_statistics.default_folder().url == "/environment/statistics"


def test_damaged_statistics_are_made_again(data, tmp_path):
    kept = Folder(str(tmp_path / "kept"))
    expected, _ = judge(data, FEW, statistics=kept)
    (name,) = kept.names()
    whole = kept.read(name)
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    for damaged in (b"", whole[:50], whole[:-8], bytes(flipped)):
        kept.write(damaged, name)
        figures, evaluation = judge(data, FEW, statistics=kept)
        assert figures == expected
        assert real_statistics.load(kept, evaluation._real_protocol("pixels")) is not None


# The command


def test_the_command_keeps_the_figures_with_their_protocol(data, model_path, capsys):
    arguments = ["evaluate", model_path, "--data", data, "--metrics", "frechet_pixels,mse", "--num-fakes", "100"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    (path,) = (Path(model_path) / "evaluations").iterdir()
    held = json.loads(path.read_text())
    assert path.name.startswith("000000001234-") and str(path) in told
    assert f"frechet_pixels {held['figures']['frechet_pixels']:.6g}" in told
    protocol = held["protocol"]
    assert protocol["reals"] | {"digest": ""} == {
        "digest": "", "split": ["train"], "count": 1100, "of": 1100, "resolution": SIZE,
    }  # fmt: skip
    assert held["data"] == data
    assert protocol["fakes"]["count"] == 100 and protocol["weights"] == "average" and protocol["mode"] == "eval"
    assert protocol["uint8"] == "rounded to the nearest" and protocol["detectors"][0]["name"] == "pixels"
    assert held["weights_sha256"] == weights_digest(load(model_path))
    assert main(arguments) == 0 and len(list(path.parent.iterdir())) == 1


def test_figures_may_be_kept_elsewhere_and_what_cannot_be_written_is_known_before(
    data, model_path, tmp_path, capsys, monkeypatch
):
    arguments = ["evaluate", model_path, "--data", data, "--metrics", "mse", "--keep"]
    before = len(list(Path(model_path, "evaluations").iterdir())) if Path(model_path, "evaluations").exists() else 0
    assert main([*arguments, str(tmp_path / "kept")]) == 0
    assert len(list((tmp_path / "kept" / "evaluations").iterdir())) == 1
    assert before == (len(list(Path(model_path, "evaluations").iterdir())) if before else 0)
    (tmp_path / "file").touch()
    monkeypatch.setattr(Evaluation, "run", None)
    assert main([*arguments, str(tmp_path / "file")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_figures_of_another_model_have_a_file_of_their_own(tmp_path):
    """Exported models know no count of images that would tell them apart."""
    folder, models = Folder(str(tmp_path)), [make_model(), make_model(seed=1), make_model()]
    first, other, again = (keep(folder, "", {"mse": 1.0}, {"count": 3}, model, {}) for model in models)
    assert first == again != other
    assert keep(folder, "", {"mse": 1.0}, {"count": 4}, models[0], {}) != first


@pytest.mark.parametrize("weights", ["average", "plain", None])
def test_the_weights_kept_are_those_that_were_judged(data, tmp_path, capsys, weights):
    path = export_model(tmp_path / "model", weights=weights)
    arguments = ["evaluate", path, "--data", data, "--metrics", "mse"]
    assert main(arguments) == 0
    (kept,) = (tmp_path / "model" / "evaluations").iterdir()
    assert json.loads(kept.read_text())["protocol"]["weights"] == (weights or "unknown")
    if weights == "plain":
        assert main([*arguments, "--weights", "average"]) == 1
        assert "holds plain weights alone" in capsys.readouterr().err
        assert main([*arguments, "--protocol", "published"]) == 0
        assert "takes averaged weights; there are none" in capsys.readouterr().out


class TwoRows(torch.nn.Module):
    """What a file traced with two images can do with more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).float()[:2]


class OneRow(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).float()[:1]


class AlwaysTwo(torch.nn.Module):
    """A file that was traced with two images and makes as many rows of one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).float().mean(dim=0).expand(2, 192)


class NanOnReals(torch.nn.Module):
    """NaN for an image that has a large value, which a new model's samples do not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = x.flatten(1).float()[:, :8]
        return torch.where(x.flatten(1).float().amax(dim=1, keepdim=True) > 250, features / 0 * 0, features)


class LpipsOfTwo(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).square().flatten(1).mean(dim=1)[:2]


def test_a_detector_must_give_a_row_for_each_image(data, tmp_path):
    nets = OneRow(), TwoRows(), AlwaysTwo()
    one, two, always = (save_script(net, tmp_path / f"{i}.pt") for i, net in enumerate(nets))
    with pytest.raises(UserError, match=r"returns \(2, 192\) for images \(1, 1, 8, 8\), not features \[1, D\]"):
        judge(data, Protocol(("frechet_mine",), num_fakes=300), detectors={"mine": always})
    with pytest.raises(UserError, match=r"returns \(1, 192\) for images \(2, 1, 8, 8\), not features \[2, D\]"):
        judge(data, Protocol(("frechet_mine",), num_fakes=300), detectors={"mine": one})
    with pytest.raises(UserError, match=r"detector mine: returns \(2, 192\) for 64 images, not \[64, 192\]"):
        judge(data, Protocol(("frechet_mine",), num_fakes=300), detectors={"mine": two})


def test_features_that_are_not_finite_are_not_kept_for_later(data, tmp_path):
    kept, net = Folder(str(tmp_path / "kept")), save_script(NanOnReals(), tmp_path / "net.pt")
    with pytest.raises(UserError, match="detector mine: its features of the real images are not finite"):
        judge(data, Protocol(("frechet_mine",), num_fakes=80), detectors={"mine": net}, statistics=kept)
    assert kept.names() == []


def test_an_lpips_that_is_not_a_number_is_no_figure(data, tmp_path):
    lpips = save_script(NanLpips(), tmp_path / "lpips.pt")
    with pytest.raises(UserError, match="lpips: is not a number for some of the real images; nothing is judged"):
        judge(data, Protocol(("mse", "lpips")), lpips=lpips)


def test_an_lpips_must_give_a_distance_for_each_pair(data, tmp_path):
    lpips = save_script(LpipsOfTwo(), tmp_path / "lpips.pt")
    with pytest.raises(UserError, match=r"lpips: returns \(2,\) for 64 pairs of images, not a distance for each"):
        judge(data, Protocol(("lpips",)), lpips=lpips)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--metrics", "fidd"], "did you mean fid"),
        (["--metrics", "frechet_pixels", "--num-fakes", "64"], "frechet_pixels: needs more images than the 64 features"),
        (["--metrics", "frechet_pixels", "--num-reals", "64"], "there are 64 real ones"),
        (["--metrics", "fid"], "fid: needs more images than the 2,048 features"),  # and fetches nothing
        (["--metrics", "frechet_pixels", "--num-reals", "1101"], "has 1,100"),
        (["--metrics", "kernel_pixels", "--num-fakes", "999"], "subsets of 1,000 images"),
        (["--metrics", "precision_pixels", "--num-fakes", "3"], "3 neighbours"),
        (["--metrics", "ms_ssim"], "ms_ssim: needs images of at least 176 pixels, these have 8"),
        (["--metrics", "ssim"], "ssim: needs images of at least 11 pixels"),
        (["--metrics", "lpips"], "lpips: needs its weights"),
        (["--metrics", "frechet_mine"], "detector mine: where is its file"),
        (["--metrics", "mse", "--detector", "mine=x.pt"], "no figure names it"),
        (["--metrics", "mse", "--detector", "x.pt"], "--detector: is written NAME=FILE"),
        (["--metrics", "mse", "--split", "test"], "there is no split 'test'"),
        (["--metrics", "mse", "--mode", "train"], "mode: train is for models with BatchNorm"),
        (["--metrics", "frechet_pixels", "--truncation", "0.7"], "truncation: only the style family has it"),
        (["--metrics", "mse", "--protocol", "published", "--num-fakes", "10"], "--num-fakes: the published protocol"),
        (["--metrics", "mse", "--protocol", "published", "--weights", "plain"], "averaged weights"),
        (["--metrics", "mse", "--batch-size", "0"], "batch_size: 0"),
        (["--metrics", "mse", "--truncation-layers", "-1"], "truncation_layers: -1 is negative"),
        (["--metrics", "frechet_pixels", "--truncation-layers", "2"], "truncation_layers: without a truncation"),
        (["--metrics", "mse", "--truncation", "nan"], "truncation: nan is not a number"),
        (["--metrics", "mse", "--seed", "-1"], "--seed: -1 is negative"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_one_sentence_and_leaves_nothing(
    data, model_path, capsys, arguments, sentence, tmp_path
):
    before = sorted(Path(model_path).rglob("*"))
    assert main(["evaluate", model_path, "--data", data, *arguments]) == 1
    told = capsys.readouterr()
    assert sentence in told.err and told.err.startswith("sivae: error: ") and told.err.count("\n") == 1
    assert told.out == "" and sorted(Path(model_path).rglob("*")) == before


def test_a_model_of_cut_images_is_judged_on_the_middle_of_larger_ones(tmp_path, capsys):
    larger = pack_images(tmp_path / "larger", 40, resolution=SIZE + 4)
    model = make_model()
    for name, crops in (("cut", True), ("whole", False)):
        model.info = {"data": {"random_crop": crops}}
        inference.export(model, str(tmp_path / name))
    arguments = ["--data", larger, "--metrics", "mse"]
    assert main(["evaluate", str(tmp_path / "cut"), *arguments]) == 0
    told = capsys.readouterr().out
    middle = open_stream(larger, batch_size=1).sample(range(40)).images[:, :, 2:-2, 2:-2]
    again = to_float(model.to_uint8(model.reconstruct(middle)))
    found = next(float(line.split()[1]) for line in told.splitlines() if line.startswith("mse "))
    assert found == pytest.approx((again - to_float(middle)).square().mean().item(), rel=1e-3)
    assert main(["reconstruct", str(tmp_path / "cut"), larger, "--output", str(tmp_path / "again.png")]) == 0
    assert main(["evaluate", str(tmp_path / "whole"), *arguments]) == 1
    assert "is packed at resolution 12 and the model takes 8" in capsys.readouterr().err


def test_models_and_sets_that_do_not_fit(data, tmp_path, capsys):
    colour = export_model(tmp_path / "colour", num_channels=3)
    large = export_model(tmp_path / "large", resolution=16)
    classes = export_model(tmp_path / "classes", num_classes=3)
    points = export_model(tmp_path / "points", family="mlp", sample_shape=[2], latent_dim=2)
    for path, metric, sentence in (
        (colour, "mse", "1 channels and the model takes 3"),
        (large, "mse", "resolution 8 and the model takes 16"),
        (classes, "mse", "need the labels of its 3 classes"),
        (points, "mse", "not one of images"),
    ):
        assert main(["evaluate", path, "--data", data, "--metrics", metric]) == 1
        assert sentence in capsys.readouterr().err


def test_a_model_that_makes_nan_is_not_judged(data):
    model = make_model()
    with torch.no_grad():
        model.decoder.head.bias += torch.nan
    with pytest.raises(UserError, match="80 samples of this model hold NaN"):
        judge(data, FEW, model)
    with pytest.raises(UserError, match="1,100 reconstructions"):
        judge(data, Protocol(("mse",)), model)


def test_features_of_too_many_values_are_refused(data, monkeypatch):
    monkeypatch.setattr("sivae.metrics.features.MAX_DIM", 63)
    with pytest.raises(UserError, match="its features have 64 values, and figures take at most 63"):
        judge(data)
