"""A style model trains through the trainer like any other: killed on 2 ranks it ends with the same bits, with per-pixel
noise, style mixing and augmentation; without the noise, which belongs to a rank, the number of ranks and passes changes only rounding.

pytest tests/distributed/test_style.py
"""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml

import sivae
from tests.distributed.test_resume import assert_equal, last_tensors, start_and_wait_for_images
from tests.processes import run_sivae, sivae_command

TOTAL_IMAGES, EVERY_IMAGES = 160, 32


@pytest.fixture(scope="module")
def arguments(cache_dir, tmp_path_factory):
    """A tiny run on digits."""
    adam = {"lr": 1.5e-3, "betas": [0.0, 0.99], "eps_hat": True}
    settings = {
        "run": {"directory": "unset", "cpu_threads": 1, "checkpoint_images": EVERY_IMAGES},
        "data": {"url": "digits:", "num_workers": 0, "cache_dir": cache_dir},
        "model": {
            "family": "style", "num_channels": 1, "resolution": 16, "base_channels": 4, "max_channels": 8, "latent_dim": 8,
            "num_mapping_layers": 2,
        },
        "objective": {"name": "soft_intro_vae", "style_mixing": 0.9, "gamma_r": 1e-8, "augment": ["translation", "cutout"]},
        "encoder_optimizer": adam, "decoder_optimizer": adam,
        "schedule": {"total_images": TOTAL_IMAGES, "batch_size": 8},
        "tracking": {"log_images": EVERY_IMAGES, "tensorboard": False, "progress": False, "picture_count": 4},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "style.yaml"
    path.write_text(yaml.safe_dump(settings))
    return lambda folder, *overrides: ["train", str(path), f"run.directory={folder}", *overrides]


def test_a_killed_run_ends_bitwise_equal(arguments, tmp_path):
    ranks = 2
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run_sivae(arguments(whole), ranks=ranks)
    assert done.returncode == 0, done.stderr
    process = start_and_wait_for_images(sivae_command(arguments(parts), ranks), parts, 2 * EVERY_IMAGES)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run_sivae(arguments(parts), ranks=ranks)
    assert done.returncode == 0, done.stderr
    expected = last_tensors(whole, TOTAL_IMAGES)
    assert_equal(last_tensors(parts, TOTAL_IMAGES), expected)
    # What truncation uses has moved, and the running average has one of its own.
    style, average = expected["weights/decoder.average_style"], expected["average/decoder.average_style"]
    assert style.any() and average.any() and not torch.equal(style, average)
    assert sivae.load(str(whole)).sample(2, truncation=0.7).isfinite().all()
    losses = [json.loads(line) for line in Path(whole / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == TOTAL_IMAGES // EVERY_IMAGES


def test_without_noise_ranks_and_passes_change_only_rounding(arguments, tmp_path):
    """The learning rate is so low that a unit whose slope is chance stays far below the tolerance; a lost moment does not."""
    few = [
        "model.noise=none", f"schedule.total_images={EVERY_IMAGES}", "encoder_optimizer.lr=2e-5", "decoder_optimizer.lr=2e-5",
    ]  # fmt: skip
    runs = {"one": (1, []), "two": (2, []), "sharded": (2, ["engine.zero_stage=3", "engine.micro_batch_size=2"])}
    for name, (ranks, overrides) in runs.items():
        done = run_sivae(arguments(tmp_path / name, *few, *overrides), ranks=ranks)
        assert done.returncode == 0, done.stderr
    expected = last_tensors(tmp_path / "one", EVERY_IMAGES)
    for name in list(runs)[1:]:
        assert_equal(last_tensors(tmp_path / name, EVERY_IMAGES), expected, tolerance=1e-5)
    style = {name: last_tensors(tmp_path / name, EVERY_IMAGES)["weights/decoder.average_style"] for name in runs}
    assert style["one"].abs().max() > 1e-2
    assert all(torch.allclose(value, style["one"], atol=1e-6) for value in style.values())
