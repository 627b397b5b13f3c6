"""Progressive growing on real digits, 4 to 16 pixels: killed five times, also in the midst of fades, it ends with the same
bits; it goes on and grows on other numbers of ranks, which need not divide the batch, and at other ZeRO stages.

pytest tests/distributed/test_grow.py
"""

import json
import math
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

import sivae
from sivae.checkpoint import list_names
from sivae.data.pack import pack
from sivae.storage import Folder
from tests.distributed.test_resume import assert_equal, last_tensors, start_and_wait_for_images
from tests.processes import run_sivae, sivae_command

EVERY_IMAGES, TOTAL_IMAGES = 32, 512
LEVELS = [
    {"resolution": 4, "images": 48, "batch_size": 16, "beta_neg_factor": 4.0},
    {"resolution": 8, "images": 192, "fade_images": 160, "batch_size": 16, "lr_factor": 0.75},
    {"resolution": 16, "fade_images": 192, "micro_batch_size": 4},
]
# Checkpoints in each fade. The first two levels take 15 passes and the third 2 a step, so that their count must start anew.
FADES = [range(96, 192, EVERY_IMAGES), range(288, 416, EVERY_IMAGES)]


@pytest.fixture(scope="module")
def arguments(cache_dir, tmp_path_factory):
    adam = {"lr": 1.5e-3, "betas": [0.0, 0.99], "eps_hat": True}
    settings = {
        "run": {"directory": "unset", "cpu_threads": 1, "checkpoint_images": EVERY_IMAGES, "keep_checkpoints": 100},
        "data": {"url": "digits:", "num_workers": 0, "cache_dir": cache_dir},
        "model": {
            "family": "style", "num_channels": 1, "resolution": 16, "base_channels": 4, "max_channels": 8, "latent_dim": 8,
            "num_mapping_layers": 2,
        },
        "objective": {"name": "soft_intro_vae", "beta_neg": 64.0, "style_mixing": 0.9},
        "encoder_optimizer": adam, "decoder_optimizer": adam,
        "schedule": {"total_images": TOTAL_IMAGES, "batch_size": 8, "levels": LEVELS},
        "tracking": {"log_images": EVERY_IMAGES, "tensorboard": False, "progress": False, "picture_count": 4},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "grow.yaml"
    path.write_text(yaml.safe_dump(settings))
    return lambda folder, *overrides: ["train", str(path), f"run.directory={folder}", *overrides]


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_sivae(arguments(folder))
    assert done.returncode == 0, done.stderr
    return folder


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest_state(folder: Path) -> dict:
    name = list_names(Folder(str(folder)))[-1]
    return json.loads((folder / "checkpoints" / name / "state.json").read_text())


def tensors_at(folder: Path, images: int) -> dict:
    found = sivae.checkpoint.read(Folder(str(folder)), f"{images:012d}").tensors
    return {f"{file}/{name}": value for file, tensors in found.items() for name, value in tensors.items()}


def test_a_run_grows_as_its_schedule_says(undisturbed):
    lines = {line["images_seen"]: line for line in logged(undisturbed)}
    assert list(lines) == list(range(EVERY_IMAGES, TOTAL_IMAGES + 1, EVERY_IMAGES))
    assert [line["schedule/resolution"] for line in lines.values()] == [4] + [8] * 6 + [16] * 9
    # Of the last step before each line, which is 16 or 8 images long: half of a cosine over 160 and 192 images.
    faded = {n: (n - 16 - 48) / 160 for n in (64, 96, 160)} | {n: (n - 8 - 240) / 192 for n in (256, 288, 416)}
    for images, share in faded.items():
        assert lines[images]["schedule/blend"] == pytest.approx(0.5 - 0.5 * math.cos(math.pi * share))
    assert lines[32]["schedule/blend"] == lines[224]["schedule/blend"] == lines[512]["schedule/blend"] == 1.0
    pictures = {path.name.partition("-")[0] for path in (undisturbed / "pictures").iterdir()}
    assert pictures == {"samples", "traversals", "interpolation", "stylemix", "truncation", "levels"}
    assert [lines[n]["schedule/batch_size"] for n in (32, 96, 288)] == [16, 16, 8]
    assert [lines[n]["optimizer/lr_encoder"] for n in (32, 96, 288)] == [1.5e-3, 1.5e-3 * 0.75, 1.5e-3]


def test_a_checkpoint_of_a_growing_run_samples_at_its_level(undisturbed):
    sizes = {}
    for images in (32, 128, 512):
        model = sivae.load(str(undisturbed / "checkpoints" / f"{images:012d}"))
        sizes[images] = model.sample_shape[-1]
        assert tuple(model.sample(2).shape[1:]) == model.sample_shape
        assert tuple(model.reconstruct(model.to_uint8(model.sample(2))).shape[1:]) == model.sample_shape
    assert sizes == {32: 4, 128: 8, 512: 16}


def test_a_new_level_starts_with_fresh_optimizers(undisturbed):
    def optimizer(images: int) -> dict:
        return sivae.checkpoint.read(Folder(str(undisturbed)), f"{images:012d}", ("optimizer",)).tensors["optimizer"]

    for network in ("encoder", "decoder"):
        assert [int(optimizer(images)[f"{network}.step"]) for images in (32, 64, 224, 256)] == [2, 1, 11, 2]
    assert optimizer(32)["decoder.exp_avg_sq.constant"].any()
    # With betas of 0 and 0.99 the moments of one step are those of its gradient alone.
    first = optimizer(64)
    for name, gradient in first.items():
        if ".exp_avg." in name:
            torch.testing.assert_close(first[name.replace("exp_avg", "exp_avg_sq")], 0.01 * gradient**2)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_layers_that_are_used_no_more_stand_still(arguments, tmp_path, stage):
    """From 208 images on the image is made at 8 pixels alone. Under ZeRO momentum would move the 4 pixels' layers on."""
    momentum = [f"{name}_optimizer.betas=[0.9,0.99]" for name in ("encoder", "decoder")]
    done = run_sivae(arguments(tmp_path, *momentum, f"engine.zero_stage={stage}", "schedule.total_images=240"))
    assert done.returncode == 0, done.stderr
    before, still, after = (tensors_at(tmp_path, images) for images in (192, 224, 240))
    faded = [name for name in after if ".to_rgb.0." in name or ".from_rgb.2." in name]
    moments = [name for name in faded if "exp_avg" in name]
    weights = [name for name in faded if name.startswith("weights/")]
    assert len(moments) == 2 * len(weights) == 8
    assert all(before[name].any() for name in moments) and not any(after[name].any() for name in moments)

    assert all(still[name].equal(after[name]) for name in weights)


def test_killed_five_times_it_ends_bitwise_equal(arguments, undisturbed, tmp_path):
    chance = random.Random()
    anywhere = [n for n in range(EVERY_IMAGES, TOTAL_IMAGES - EVERY_IMAGES, EVERY_IMAGES)]
    points = [chance.choice(fade) for fade in FADES]
    points = sorted([*points, *chance.sample([n for n in anywhere if n not in points], 3)])
    blends = []
    for images in points:
        process = start_and_wait_for_images(sivae_command(arguments(tmp_path)), tmp_path, images)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        blends.append(newest_state(tmp_path)["stage"]["blend"])
    assert sum(0 < blend < 1 for blend in blends) >= 2, (points, blends)
    done = run_sivae(arguments(tmp_path))
    assert done.returncode == 0, done.stderr
    assert_equal(last_tensors(tmp_path, TOTAL_IMAGES), last_tensors(undisturbed, TOTAL_IMAGES))


def test_other_ranks_and_stages_change_only_rounding(arguments, tmp_path):
    """Without per-pixel noise, which belongs to a rank. Three ranks share 16 and 8 images unevenly. The learning rate is so low
    that a unit whose slope is chance stays far below the tolerance; a lost moment, or one that was not reset, does not."""
    few = [
        "model.noise=none", "encoder_optimizer.lr=2e-5", "decoder_optimizer.lr=2e-5", "schedule.total_images=352",
    ]  # fmt: skip
    whole, moved, sharded = (tmp_path / name for name in ("whole", "moved", "sharded"))
    runs = [
        (whole, 1, []),
        (moved, 1, ["schedule.total_images=160"]),
        (moved, 3, ["engine.zero_stage=2"]),
        (sharded, 2, ["engine.zero_stage=3", "engine.micro_batch_size=2"]),
    ]
    for folder, ranks, overrides in runs:
        done = run_sivae(arguments(folder, *few, *overrides), ranks=ranks)
        assert done.returncode == 0, done.stderr
    expected = last_tensors(whole, 352)
    for folder in (moved, sharded):
        assert_equal(last_tensors(folder, 352), expected, tolerance=1e-5)
    one, three = logged(whole)[-1], logged(moved)[-1]
    for name in ("loss/loss_encoder", "loss/loss_decoder", "terms/kl_fake"):
        assert three[name] == pytest.approx(one[name], rel=1e-3), "the mean over ranks counts every image once"


def test_levels_from_a_pyramid_and_from_one_set(arguments, tmp_path):
    """A pyramid is read level by level; one set is shrunk on the device. A pyramid without a level is refused at the start."""
    pack("digits:", tmp_path / "pyramid", resolution=16, pyramid=True, progress=False)
    for number, url in enumerate([tmp_path / "pyramid", tmp_path / "pyramid" / "16"]):
        done = run_sivae(arguments(tmp_path / str(number), f"data.url={url}", "schedule.total_images=288"))
        assert done.returncode == 0, done.stderr
    rec = [[line["terms/rec"] for line in logged(tmp_path / str(number))] for number in (0, 1)]
    # The same images in the same order; what packing rounds to uint8 at each level is all that differs.
    assert rec[0] == pytest.approx(rec[1], rel=2e-2) and rec[0] != rec[1]
    (tmp_path / "pyramid" / "8" / "index.json").unlink()
    done = run_sivae(arguments(tmp_path / "refused", f"data.url={tmp_path / 'pyramid'}"))
    assert done.returncode == 1 and "has the resolutions 4, 16, and not 8" in done.stderr, done.stderr
    assert not (tmp_path / "refused" / "checkpoints").exists()
