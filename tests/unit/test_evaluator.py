"""A run that is judged while it trains: figures in metrics.jsonl, TensorBoard and evaluations/; its best checkpoint stays, also
when the run is killed or started again.

    python -m pytest tests/unit/test_evaluator.py
"""

import json
from pathlib import Path

import pytest
import torch

import sivae
from sivae import checkpoint, config, inference, trainer
from sivae.data import ImageStream, open_stream
from sivae.errors import UserError
from sivae.evaluate import Evaluation, Protocol
from sivae.storage import Folder
from tests.unit.judged import ALONE, NanLpips, save_script


@pytest.fixture
def train(cache_dir, tmp_path, monkeypatch):
    """Train a small model on digits; the figures of successive judgements are those of `values`, where given."""

    def run(*overrides, values=None):
        settings = config.load(
            "configs/digits.yaml",
            [
                f"run.directory={tmp_path / 'run'}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "model.channels=[8,16]",
                "model.latent_dim=4", "schedule.total_images=160", "run.checkpoint_images=1000", "run.keep_checkpoints=1",
                "tracking.log_images=80", "tracking.picture_images=10000", "tracking.progress=false", "tracking.tensorboard=false",
                "evaluate.every_images=32", "evaluate.metrics=[mse]", *overrides,
            ],
        )  # fmt: skip
        if values is not None:
            numbers = iter(values)
            monkeypatch.setattr(Evaluation, "run", lambda self, model: {self.figures[0].name: next(numbers)})
        return trainer.train(settings)

    run.folder = tmp_path / "run"
    return run


def lines(folder: Path):
    held = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["images_seen"]: line for line in held if any(key.startswith("evaluate/") for key in line)}


def names(folder: Path):
    return checkpoint.list_names(Folder(str(folder)))


def best(folder: Path):
    """Name, figure and value."""
    found = checkpoint.best(Folder(str(folder)))
    return found and {key: found[key] for key in ("name", "figure", "value")}


def test_the_figures_are_those_of_the_averaged_weights(train, cache_dir):
    result = train("evaluate.metrics=[frechet_pixels,mse]", "evaluate.num_fakes=300", "run.checkpoint_images=32",
                   "run.keep_checkpoints=9", "tracking.tensorboard=true")  # fmt: skip
    held = lines(train.folder)
    assert list(held) == [32, 64, 96, 128, 160] and result.metrics["evaluate/mse"] == held[160]["evaluate/mse"]
    assert len(list((train.folder / "evaluations").iterdir())) == 5
    file = next((train.folder / "evaluations").glob("000000000064-*.json"))
    assert json.loads(file.read_text())["figures"]["mse"] == held[64]["evaluate/mse"]
    # As `sivae evaluate` gives for the same checkpoint afterwards
    stream = open_stream("digits:", resolution=16, batch_size=1, cache_dir=cache_dir)
    evaluation = Evaluation(stream, Protocol(("frechet_pixels", "mse"), 300), ALONE, progress=False)
    again = evaluation.run(sivae.load(f"{train.folder}/checkpoints/000000000064"))
    assert again == {name: held[64][f"evaluate/{name}"] for name in again}


def test_what_judges_may_fail_and_the_run_goes_on(train, tmp_path, capsys):
    path = save_script(NanLpips(), tmp_path / "lpips.pt")
    result = train("evaluate.metrics=[mse,lpips]", f"evaluate.lpips={path}", "evaluate.every_images=80")
    assert result.images_seen == 160 and not lines(train.folder) and best(train.folder) is None
    assert capsys.readouterr().err.count("lpips: is not a number for some of the real images") == 2


def test_a_run_is_judged_as_the_command_would_judge_it(train, cache_dir, monkeypatch, capsys):
    often = [
        "evaluate.metrics=[frechet_pixels]",
        "schedule.total_images=64",
        "model.norm=batch",
        "evaluate.every_images=64",
    ]
    stream = open_stream("digits:", resolution=16, batch_size=1, cache_dir=cache_dir)

    def held():
        (file,) = (train.folder / "evaluations").iterdir()
        found = json.loads(file.read_text())
        file.unlink()
        return found

    train(*often, "evaluate.num_fakes=300", "evaluate.mode=train", "evaluate.seed=3", "evaluate.batch_size=50")
    evaluation = Evaluation(
        stream, Protocol(("frechet_pixels",), 300, seed=3, mode="train", batch_size=50), ALONE, progress=False
    )
    found = held()
    assert found["figures"] == pytest.approx(evaluation.run(sivae.load(str(train.folder))), rel=1e-9)
    kept = found["protocol"]
    assert (kept["mode"], kept["fakes"]["seed"], kept["batch_size"], kept["weights"]) == ("train", 3, 50, "average")
    # As published, but for the number of samples
    monkeypatch.setattr("sivae.evaluate.PUBLISHED_IMAGES", 300)
    train(*often, "evaluate.protocol=published", "schedule.total_images=128", "ema.halflife_images=0")
    told = capsys.readouterr().err
    assert "takes averaged weights; there are none" in told and "real images" not in told
    kept = held()["protocol"]
    assert (kept["name"], kept["mode"], kept["batch_size"], kept["weights"]) == ("published", "train", 32, "plain")
    assert kept["uint8"] == "rounded down" and kept["fakes"]["count"] == 300


def test_the_best_checkpoint_stays(train):
    train(values=[5.0, 3.0, 4.0, 6.0, 7.0])
    assert names(train.folder) == ["000000000064", "000000000160"]
    assert best(train.folder) == {"name": "000000000064", "figure": "mse", "value": 3.0}
    loaded = sivae.load(f"{train.folder}/checkpoints/best")
    assert loaded.info["images_seen"] == 64
    assert sivae.load(str(train.folder)).info["images_seen"] == 160


def test_higher_is_better_for_some(train):
    train("evaluate.metrics=[psnr]", values=[5.0, 3.0, 6.0, 6.0, 2.0])
    assert best(train.folder) == {"name": "000000000096", "figure": "psnr", "value": 6.0}


def test_started_again_it_remembers_its_best(train):
    train("schedule.total_images=96", values=[5.0, 3.0, 4.0])
    train(values=[3.5, 3.2])
    assert best(train.folder)["name"] == "000000000064" and names(train.folder) == ["000000000064", "000000000160"]
    train("schedule.total_images=192", values=[1.0])
    assert best(train.folder)["name"] == "000000000192"
    assert names(train.folder) == ["000000000192"], "one that was the best is kept no more"
    assert list(lines(train.folder)) == [32, 64, 96, 128, 160, 192]


def test_killed_before_the_pointer_was_written_it_is_found_again(train):
    train("schedule.total_images=64", values=[5.0, 3.0])
    (train.folder / "checkpoints" / "best.json").unlink()
    assert best(train.folder) is None
    train(values=[4.0, 6.0, 7.0])
    assert best(train.folder) == {"name": "000000000064", "figure": "mse", "value": 3.0}


def test_a_figure_that_is_not_finite_is_never_the_best(train):
    train(values=[float("nan"), float("inf"), 5.0, float("nan"), 6.0])
    assert best(train.folder)["value"] == 5.0


def test_a_model_that_makes_nan_is_told_and_trains_on(train, monkeypatch, capsys):
    sample = inference.Model.sample
    monkeypatch.setattr(inference.Model, "sample", lambda self, *a, **k: sample(self, *a, **k) * torch.nan)
    result = train("evaluate.metrics=[frechet_pixels]", "evaluate.num_fakes=300")
    assert result.images_seen == 160 and best(train.folder) is None and not lines(train.folder)
    assert "300 samples of this model hold NaN" in capsys.readouterr().err


def test_another_deciding_figure_starts_anew(train):
    train("schedule.total_images=64", values=[5.0, 3.0])
    train("evaluate.metrics=[psnr]", values=[1.0, 0.5, 0.4])
    assert best(train.folder) == {"name": "000000000096", "figure": "psnr", "value": 1.0}


def test_another_protocol_starts_anew_and_says_so(train, capsys):
    train("schedule.total_images=64", values=[5.0, 3.0])
    train(
        "schedule.total_images=96", "evaluate.metrics=[mse,psnr]", values=[6.0]
    )  # one figure more changes nothing of mse
    assert best(train.folder)["value"] == 3.0 and "judged in another way" not in capsys.readouterr().err
    train("evaluate.num_reals=500", values=[7.0, 8.0])
    assert best(train.folder) == {"name": "000000000128", "figure": "mse", "value": 7.0}
    assert "(000000000064) was judged in another way" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_costs_a_judgement_and_not_the_run(train, monkeypatch, capsys):
    def fail(self, numbers):
        raise UserError("its bytes are damaged")

    sample = ImageStream.sample
    monkeypatch.setattr(
        ImageStream, "sample", lambda self, numbers: (fail if len(numbers) == 64 else sample)(self, numbers)
    )
    result = train()
    assert result.images_seen == 160 and best(train.folder) is None and not lines(train.folder)
    assert "its bytes are damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("evaluate.metrics=[banana]", "^evaluate.metrics: 'banana' is unknown"),
        ("evaluate.metrics=[ms_ssim]", "needs images of at least 176 pixels"),
        ("evaluate.split=test", "there is no split 'test'"),
        ("evaluate.num_reals=5000", "^evaluate.num_reals: 5,000 .* has 1,797"),
        (
            "evaluate={every_images: 32, protocol: published, split: all}",
            "the published protocol takes the training images",
        ),
        ("evaluate.mode=train", "^evaluate.mode: train is for models with BatchNorm"),
        ("evaluate.truncation=0.7", "^evaluate.truncation: only the style family has it, not conv"),
    ],
)
def test_what_cannot_be_judged_is_said_before_training(train, override, sentence):
    with pytest.raises(UserError, match=sentence):
        train(override)
    assert not (train.folder / "metrics.jsonl").exists()


def test_without_the_setting_nothing_changes(train):
    result = train("evaluate.every_images=null")
    assert not (train.folder / "evaluations").exists() and best(train.folder) is None
    assert not any(name.startswith("evaluate/") for name in result.metrics)
