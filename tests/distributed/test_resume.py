"""A run that is killed, stopped or moved goes on as if nothing had happened. Real processes, really killed.

pytest tests/distributed/test_resume.py
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sivae.checkpoint import list_names
from sivae.cli import EXIT_INTERRUPTED
from sivae.storage import Folder
from tests.processes import ROOT, TIMEOUT_SEC, environment, run_sivae, sivae_command

TOTAL_IMAGES, EVERY_IMAGES = 960, 96


@pytest.fixture(scope="session")
def arguments(cache_dir):
    """A small run on digits: seconds long, ten checkpoints."""

    def make(folder: Path, *overrides: str) -> list[str]:
        return [
            "train", "configs/digits.yaml", f"run.directory={folder}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "model.channels=[8,16]",
            "model.latent_dim=4", f"schedule.total_images={TOTAL_IMAGES}", f"run.checkpoint_images={EVERY_IMAGES}",
            f"tracking.log_images={EVERY_IMAGES}", "tracking.progress=false", "tracking.tensorboard=false",
            # So low that the slope of a leaky ReLU at zero, which is chance, stays far below 1e-5 in the weights;
            # a step with a lost or misplaced Adam moment changes them by as much as this.
            "encoder_optimizer.lr=5e-5", "decoder_optimizer.lr=5e-5", *overrides,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="session")
def undisturbed(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_sivae(arguments(folder))
    assert done.returncode == 0, done.stderr
    return last_tensors(folder)


def last_tensors(folder: Path, images: int = TOTAL_IMAGES) -> dict[str, torch.Tensor]:
    newest = folder / "checkpoints" / list_names(Folder(str(folder)))[-1]
    assert json.loads((newest / "state.json").read_text())["images_seen"] == images
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Bitwise, or the weights and their average to a tolerance."""
    assert set(found) == set(expected)
    if tolerance:
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("optimizer/")}
    for name, tensor in expected.items():
        assert (
            torch.equal(found[name], tensor)
            if not tolerance
            else torch.allclose(found[name], tensor, rtol=0, atol=tolerance)
        ), name


def start_and_wait_for_images(command: list[str], folder: Path, images: int) -> subprocess.Popen:
    """Start a run and return when a checkpoint of at least so many images is there."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + TIMEOUT_SEC
    while process.poll() is None and time.monotonic() < deadline:
        names = [path.parent.name for path in (folder / "checkpoints").glob("*/manifest.json")]
        if any(int(name.partition(".")[0]) >= images for name in names):
            return process
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"the run ended before {images} images: {process.communicate()}")


def test_killed_run_ends_bitwise_equal(arguments, undisturbed, tmp_path):
    """SIGKILL at random points, twice, then run the same command to its end."""
    chance = random.Random()
    for images in sorted(chance.sample(range(EVERY_IMAGES, TOTAL_IMAGES - EVERY_IMAGES, EVERY_IMAGES), 2)):
        process = start_and_wait_for_images(sivae_command(arguments(tmp_path)), tmp_path, images)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run_sivae(arguments(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming at [\d,]+ images", done.stderr)
    assert_equal(last_tensors(tmp_path), undisturbed)
    images = [json.loads(line)["images_seen"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert images == list(range(EVERY_IMAGES, TOTAL_IMAGES + 1, EVERY_IMAGES)), (
        "each interval is logged once, also those that were redone"
    )


@pytest.mark.parametrize("stage, ranks", [(3, 2), (1, 1), (2, 2)])
def test_goes_on_with_other_ranks_and_stage(arguments, undisturbed, tmp_path, stage, ranks):
    """One rank at stage 0, then the last six steps elsewhere. Rounding grows to a few 1e-7 there (through Adam, which divides by
    small moments, and at the kinks of leaky ReLUs); a lost or misplaced moment shows as 1e-4."""
    done = run_sivae(arguments(tmp_path, f"schedule.total_images={TOTAL_IMAGES - EVERY_IMAGES}"))
    assert done.returncode == 0, done.stderr
    done = run_sivae(arguments(tmp_path, f"engine.zero_stage={stage}", "engine.micro_batch_size=4"), ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert_equal(last_tensors(tmp_path), undisturbed, tolerance=1e-5)


def test_two_ranks_from_the_start_learn_the_same(arguments, tmp_path):
    few = [
        f"schedule.total_images={EVERY_IMAGES}",
        f"tracking.picture_images={EVERY_IMAGES}",
        "tracking.tensorboard=true",
    ]
    for ranks in (1, 2):
        done = run_sivae(arguments(tmp_path / str(ranks), *few), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / str(ranks) / "pictures" / f"samples-{EVERY_IMAGES:012d}.png").exists()
    one, two = (last_tensors(tmp_path / str(ranks), EVERY_IMAGES) for ranks in (1, 2))
    assert_equal(two, one, tolerance=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_with_its_own_code(arguments, undisturbed, tmp_path, number):
    process = start_and_wait_for_images(sivae_command(arguments(tmp_path)), tmp_path, EVERY_IMAGES)
    process.send_signal(number)
    output, errors = process.communicate(timeout=TIMEOUT_SEC)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert "run the same command to go on" in errors and "Traceback" not in errors
    assert run_sivae(arguments(tmp_path)).returncode == 0
    assert_equal(last_tensors(tmp_path), undisturbed)


def test_run_directory_in_an_object_store(arguments, tmp_path, monkeypatch):
    """Everything that a run leaves behind, on S3 as spoken by moto's server on loopback; resumed from there."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "hidden-secret",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("runs")
        for total in (EVERY_IMAGES, 2 * EVERY_IMAGES):
            done = run_sivae(
                arguments("s3://runs/digits", f"schedule.total_images={total}", "tracking.tensorboard=true")
            )
            assert done.returncode == 0, done.stderr
        assert f"resuming at {EVERY_IMAGES} images" in done.stderr
        files = store.find("runs/digits")
        for part in (
            "config.yaml",
            "environment.json",
            "metrics.jsonl",
            "pictures/",
            "tensorboard/events",
            "checkpoints/000000000192/manifest.json",
        ):
            assert any(f"runs/digits/{part}" in file for file in files), part
        assert len(store.cat_file("runs/digits/metrics.jsonl").splitlines()) == 2
        assert not any(b"hidden-secret" in store.cat_file(file) for file in files)
    finally:
        server.stop()


GROUP_PROGRAM = """
import signal, sys
from sivae.data import open_stream
signal.signal(signal.SIGTERM, lambda *_: None)
stream = open_stream("digits:", resolution=16, batch_size=8, num_workers=2, cache_dir=sys.argv[1])
for number, batch in enumerate(stream.batches()):
    print(number, flush=True)
    sys.stdin.readline()
"""


def test_data_workers_outlive_a_signal_to_the_whole_process_group(cache_dir):
    """Launchers signal every process of a job. The training process still needs batches to come to its next step."""
    process = subprocess.Popen(
        [sys.executable, "-c", GROUP_PROGRAM, cache_dir], cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        for number in range(20):  # more than was read ahead
            assert process.stdout.readline() == f"{number}\n"
            if number == 2:
                os.killpg(process.pid, signal.SIGTERM)
            process.stdin.write("\n")
            process.stdin.flush()
    finally:
        process.kill()


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(arguments, undisturbed, tmp_path):
    assert run_sivae(arguments(tmp_path, "schedule.total_images=480")).returncode == 0
    newest = tmp_path / "checkpoints" / "000000000480" / "weights.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    done = run_sivae(arguments(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "000000000480: is damaged" in done.stderr and "resuming at 384 images" in done.stderr
    assert_equal(last_tensors(tmp_path), undisturbed)


def test_bootstrap_and_batch_norm_resume_too(arguments, tmp_path_factory):
    """The target decoder and BatchNorm's buffers are part of the state. Two ranks, so buffers are synchronised as well."""
    overrides = ["objective.name=bootstrap", "objective.target_refresh_images=192", "model.norm=batch"]
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    assert run_sivae(arguments(whole, *overrides), ranks=2).returncode == 0
    assert run_sivae(arguments(parts, *overrides, "schedule.total_images=480"), ranks=2).returncode == 0
    done = run_sivae(arguments(parts, *overrides), ranks=2)
    assert done.returncode == 0, done.stderr
    assert_equal(last_tensors(parts), last_tensors(whole))
    assert any("target/" in name for name in last_tensors(parts))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_optimizer_learns_the_same(arguments, tmp_path, stage):
    """Compiles DeepSpeed's CPU Adam on first use. Resumes from a run without offload, as any stage does."""
    for name, overrides in (("plain", []), ("offloaded", ["engine.offload_optimizer=true"])):
        half = run_sivae(arguments(tmp_path / name, f"schedule.total_images={EVERY_IMAGES}"))
        assert half.returncode == 0, half.stderr
        done = run_sivae(
            arguments(
                tmp_path / name,
                f"schedule.total_images={2 * EVERY_IMAGES}",
                f"engine.zero_stage={stage}",
                "engine.micro_batch_size=8",
                *overrides,
            )
        )
        assert done.returncode == 0, done.stderr
    plain, offloaded = (last_tensors(tmp_path / name, 2 * EVERY_IMAGES) for name in ("plain", "offloaded"))
    assert_equal(offloaded, plain, tolerance=1e-5)
