"""Scores equal their closed forms for a model whose posterior is known; thresholds are kept with the model and judge one image.

python -m pytest tests/unit/test_outliers.py
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sivae
from sivae import outliers
from sivae.cli import main
from sivae.data import ImageStream, open_stream
from sivae.errors import UserError
from sivae.storage import Folder
from tests.unit.judged import SIZE, export_model, make_model, pack_images


class Linear:
    """x | z is normal around a z with precision 2 w, in one dimension, and q its posterior, exactly or `off` from it."""

    value_range, device, latent_dim, num_classes = (0.0, 1.0), torch.device("cpu"), 1, 0

    def __init__(self, a=1.5, w=2.0, off=0.0):
        self.a, self.w, self.off = a, w, off
        self.info = {"objective": {"beta_rec": w / 2, "beta_kl": 0.5, "reconstruction": "mse"}}
        self.variance = 1 / (1 + 2 * w * a**2)

    def encode(self, images):
        x = images.float().flatten(1) / 255
        return 2 * self.w * self.a * x * self.variance + self.off, torch.full_like(x, math.log(self.variance))

    def decode(self, z):
        return (self.a * z).reshape(-1, 1, 1, 1)

    def exact(self, x):
        """-log p(x) without the likelihood's constant: x is normal around 0 with variance a^2 + 1 / 2w."""
        variance = self.a**2 + 1 / (2 * self.w)
        constant = 0.5 * math.log(math.pi / self.w)  # of the likelihood
        return 0.5 * (x**2 / variance + math.log(2 * math.pi * variance)) - constant


X = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)


@pytest.mark.parametrize("num_samples", [1, 7])
def test_with_the_exact_posterior_importance_weights_give_the_likelihood(num_samples):
    model = Linear()
    found = outliers.score(model, X, range(3), num_samples=num_samples)
    expected = model.exact(X.flatten().double().numpy() / 255)
    np.testing.assert_allclose(found["importance_weighted"], expected, atol=1e-5)  # draws are float32


def test_the_negative_elbo_and_its_parts():
    model = Linear()
    found = outliers.score(model, X, range(3), num_samples=4000)
    x = X.flatten().double().numpy() / 255
    mu, variance = 2 * model.w * model.a * x * model.variance, model.variance
    divergence = 0.5 * (mu**2 + variance - 1 - math.log(variance))
    np.testing.assert_allclose(found["kl"], divergence, rtol=1e-5)
    np.testing.assert_allclose(found["reconstruction"], (x - model.a * mu) ** 2, rtol=1e-4, atol=1e-9)
    expected = model.w * ((x - model.a * mu) ** 2 + model.a**2 * variance) + divergence
    np.testing.assert_allclose(found["negative_elbo"], expected, atol=0.05)  # 4,000 draws
    np.testing.assert_allclose(found["negative_elbo"], model.exact(x), atol=0.05)  # tight for the exact posterior


def test_more_draws_near_the_likelihood_where_the_posterior_is_off():
    model, x = Linear(off=0.5), X.flatten().double().numpy() / 255
    gaps = []
    for num_samples in (1, 30, 3000):
        runs = [
            outliers.score(model, X, range(3), num_samples=num_samples, seed=s)["importance_weighted"]
            for s in range(10)
        ]
        gaps.append(float((np.mean(runs, axis=0) - model.exact(x)).mean()))
    assert gaps[0] > gaps[1] > 0 and abs(gaps[2]) < 0.05
    elbo = outliers.score(model, X, range(3), num_samples=3000)["negative_elbo"]
    assert (elbo - model.exact(x)).mean() == pytest.approx(0.5 * 0.25 / model.variance, rel=0.1)  # KL(q || posterior)


def test_the_draws_belong_to_the_images():
    model, images = make_model(), torch.randint(0, 256, (6, 1, SIZE, SIZE), dtype=torch.uint8)
    whole = outliers.score(model, images, range(6))
    part = outliers.score(model, images[2:4], range(2, 4))
    for name in outliers.SCORES:
        np.testing.assert_allclose(part[name], whole[name][2:4], rtol=1e-5)
    assert not np.array_equal(outliers.score(model, images, range(6), seed=1)["negative_elbo"], whole["negative_elbo"])


@pytest.mark.parametrize(
    "below, told, is_outlier", [(25, "about 75% of them", False), (80, "about 20%", False), (100, "less than 1%", True)]
)
def test_the_sentence_says_how_many_inliers_score_as_high(below, told, is_outlier):
    model, image = make_model(), torch.full((1, 1, SIZE, SIZE), 90, dtype=torch.uint8)
    value = float(outliers.score(model, image, range(1), num_samples=2)["negative_elbo"][0])
    # Percentiles of the inliers, one apart: so many lie below the image's score.
    held = {"threshold": value + 95.5 - below, "quantiles": (value - below + np.arange(101)).tolist()}
    inliers = {"name": "digits", "count": 200}
    calibration = {"num_samples": 2, "seed": 0, "kept": 0.95, "inliers": inliers, "scores": {"negative_elbo": held}}
    verdict = outliers.judge(model, image, calibration)
    assert told in verdict.sentence and verdict.is_outlier == is_outlier
    held["threshold"] = value
    assert not outliers.judge(model, image, calibration).is_outlier, "the last inlier that is kept is none"


# The command


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    inlier = pack_images(folder / "in", 300, splits="test=50%")
    dark = np.random.default_rng(1).integers(0, 60, (150, SIZE, SIZE, 1)).astype(np.uint8)
    (folder / "out").mkdir()
    np.save(folder / "out" / "images.npy", dark)
    from sivae.data.pack import pack

    pack(
        str(folder / "out" / "images.npy"), str(folder / "out" / "set"), resolution=SIZE, num_workers=0, progress=False
    )
    return inlier, str(folder / "out" / "set")


def test_a_set_in_batches_is_scored_as_its_images_at_once(sets):
    model, stream = make_model(), ImageStream(sets[0], batch_size=1, split="test")
    assert 70 > outliers.BATCH
    found = outliers.score_set(model, stream, count=70, num_samples=2, seed=3)
    expected = outliers.score(model, stream.sample(range(70)).images, range(70), num_samples=2, seed=3)
    for name in outliers.SCORES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)  # float32 in batches of other sizes


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIVAE_DEBUG", "")


def arguments(model, sets, *more):
    return [
        "ood",
        model,
        "--inlier",
        sets[0],
        "--outlier",
        sets[1],
        "--outlier-split",
        "train",
        "--samples",
        "2",
        *more,
    ]


def test_the_command_tells_draws_calibrates_and_judges(sets, tmp_path, capsys):
    model = export_model(tmp_path / "model")
    assert main(arguments(model, sets)) == 0
    told = capsys.readouterr().out
    assert all(f"| {name} | " in told for name in outliers.SCORES) and "AUROC" in told
    with Image.open("ood.png") as picture:
        assert picture.size[0] > 500
    loaded = sivae.load(model)
    held = json.loads(Path(model, outliers.calibration_file(loaded)).read_text())
    stream = open_stream(sets[0], split="test", batch_size=1)
    assert held["inliers"] == {"name": f"{sets[0]} test", "digest": stream.digest, "count": len(stream)}
    (kept,) = Path(model, "evaluations").iterdir()
    written = json.loads(kept.read_text())
    assert f"| kl | {written['figures']['kl']['auroc']['value']:.3f} (" in told and str(kept) in told
    assert written["protocol"]["sets"]["inlier"]["digest"] == stream.digest
    assert written["protocol"]["sets"]["outlier"]["count"] == 150 and written["protocol"]["num_samples"] == 2
    found = outliers.score_set(loaded, stream, count=None, num_samples=2, seed=0)
    kept = (found["kl"] <= held["scores"]["kl"]["threshold"]).mean()
    assert 0.95 <= kept < 0.97
    # An inlier in the middle, and an image far from all
    middle = int(np.argsort(found["kl"])[len(stream) // 2])
    pixels = stream.sample([middle]).images[0, 0].numpy()
    Image.fromarray(pixels).save("inlier.png")
    assert main(["ood", model, "--judge", "inlier.png", "--score", "kl"]) == 0
    assert "inlier.png: inlier; kl is " in (told := capsys.readouterr().out) and "about 50% of them" in told
    assert f"95% of {len(stream)} inliers ({sets[0]} test) stay below" in told
    Image.fromarray(np.full((SIZE, SIZE), 255, np.uint8)).save("white.png")
    limit = held["scores"]["reconstruction"]["threshold"]
    value = outliers.score(loaded, torch.full((1, 1, SIZE, SIZE), 255, dtype=torch.uint8), range(1))["reconstruction"][
        0
    ]
    assert main(["ood", model, "--judge", "white.png", "--score", "reconstruction"]) == 0
    assert ("outlier;" if value > limit else "inlier;") in capsys.readouterr().out


def test_thresholds_of_other_inliers_are_replaced_and_it_says_so(sets, tmp_path, capsys):
    model = export_model(tmp_path / "model")
    assert main(arguments(model, sets)) == 0 and main(arguments(model, sets)) == 0
    assert "in place of" not in capsys.readouterr().out
    assert main(arguments(model, sets, "--inlier-split", "train")) == 0
    assert f"thresholds of {sets[0]} train, in place of those of {sets[0]} test;" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_loses_nothing_else(sets, tmp_path, capsys):
    model = export_model(tmp_path / "model")
    Path("taken.png").mkdir()
    assert main(arguments(model, sets, "--output", "taken.png")) == 1
    assert "cannot write" in capsys.readouterr().err
    assert Path(model, "evaluations").exists() and Path(model, outliers.calibration_file(sivae.load(model))).exists()


def test_figures_and_thresholds_may_be_kept_elsewhere(sets, tmp_path, capsys, monkeypatch):
    """A published model may lie where nobody can write."""
    model = export_model(tmp_path / "model")
    assert main(arguments(model, sets, "--keep", "kept")) == 0
    assert f"sivae ood {model} --judge IMAGE --keep kept" in capsys.readouterr().out
    (figures, thresholds) = sorted(Path("kept").iterdir())
    assert figures.name == "evaluations" and thresholds.name == outliers.calibration_file(sivae.load(model))
    assert sorted(path.name for path in Path(model).iterdir()) == ["README.md", "model.safetensors", "sivae.json"]
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save("black.png")
    assert main(["ood", model, "--judge", "black.png", "--keep", "kept"]) == 0
    capsys.readouterr()
    # What cannot be written is known before the work.
    monkeypatch.setattr(outliers, "score_set", None)
    Path("file").touch()
    assert main(arguments(model, sets, "--keep", "file")) == 1 and "cannot write" in capsys.readouterr().err


def test_a_threshold_of_other_weights_is_not_used(sets, tmp_path, capsys):
    model = export_model(tmp_path / "model")
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save("image.png")
    assert main(["ood", model, "--judge", "image.png"]) == 1
    assert "no threshold is calibrated for these weights" in capsys.readouterr().err
    assert main(arguments(model, sets)) == 0
    assert main(["ood", model, "--judge", "image.png"]) == 0
    assert main(["export", model, str(tmp_path / "copy")]) == 0
    assert main(["ood", str(tmp_path / "copy"), "--judge", "image.png"]) == 0
    export_model(tmp_path / "model", seed=1)
    assert main(["ood", model, "--judge", "image.png"]) == 1
    assert "no threshold is calibrated for these weights" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["num_samples", "seed", "kept", "inliers", "scores", "weights_sha256", None])
def test_damaged_thresholds_are_refused(sets, tmp_path, capsys, key):
    model = export_model(tmp_path / "model")
    loaded = sivae.load(model)
    stream = open_stream(sets[0], split="test", batch_size=1)
    found = outliers.score_set(loaded, stream, count=None, num_samples=1, seed=0)
    held = outliers.calibrate(loaded, found, stream, "set test", 1, 0)
    path = Path(outliers.write_calibration(Folder(model), loaded, held))
    assert outliers.read_calibration(Folder(model), loaded) == held
    path.write_text(json.dumps({name: value for name, value in held.items() if name != key}) if key else "{")
    with pytest.raises(UserError, match="is damaged; run sivae ood"):
        outliers.read_calibration(Folder(model), loaded)


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--outlier-split", "test"], "out/set: there is no split 'test'"),
        (["--samples", "0"], "--samples: 0"),
        (["--count", "200"], "200 images are asked for"),
        (["--count", "0"], "--count: 0"),
        (["--count", "160"], "out/set has 150"),
        (["--count", "99"], "too few for a threshold"),
        (["--judge", "x.png"], "--inlier: goes without --judge"),
    ],
)
def test_what_cannot_be_told_is_one_sentence(sets, tmp_path, capsys, more, sentence):
    model = export_model(tmp_path / "model")
    assert main(arguments(model, sets, *more)) == 1
    told = capsys.readouterr().err
    assert sentence in told and told.count("sivae: error: ") == 1
    assert (
        not list(Path(model).glob("outliers-*"))
        and not Path(model, "evaluations").exists()
        and not Path("ood.png").exists()
    )


def test_models_and_sets_that_do_not_fit(sets, tmp_path, capsys):
    classes, colour = (
        export_model(tmp_path / "classes", num_classes=3),
        export_model(tmp_path / "colour", num_channels=3),
    )
    model = export_model(tmp_path / "model")
    for command, sentence in (
        (arguments(classes, sets), "conditional on classes"),
        (arguments(colour, sets), "1 channels and the model takes 3"),
        (["ood", model], "give both --inlier and --outlier"),
        (["ood", model, "--inlier", sets[1], "--inlier-split", "train", "--outlier", sets[1], "--outlier-split", "train"], "same set"),
    ):  # fmt: skip
        assert main(command) == 1
        assert sentence in capsys.readouterr().err


def test_scores_that_are_not_finite_are_not_judged(sets):
    model = make_model()
    with torch.no_grad():
        model.decoder.head.bias += torch.nan
    stream = open_stream(sets[0], split="test", batch_size=1)
    with pytest.raises(UserError, match="is not finite; nothing is judged"):
        outliers.score_set(model, stream, count=10, num_samples=1, seed=0)


def test_without_matplotlib_it_says_so_before_it_starts(sets, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(arguments(export_model(tmp_path / "model"), sets)) == 1
    assert "sivae[pictures]" in capsys.readouterr().err
