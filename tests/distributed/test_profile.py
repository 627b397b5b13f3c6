"""`sivae train --profile`: times of known spans, a table that adds up, a trace that opens, and a run that stays where it stood.

pytest tests/distributed/test_profile.py
"""

import gzip
import json
import re
import time
from pathlib import Path

import pytest
import torch

from sivae import config, profiling, trainer
from sivae.config import Config
from sivae.distributed import Group
from sivae.errors import UserError
from sivae.profiling import StepProfile, span
from sivae.storage import Folder
from tests.processes import run_sivae

CPU = Group(0, 1, torch.device("cpu"), None)
BATCH = 16


@pytest.fixture
def overrides(cache_dir):
    return [
        f"data.cache_dir={cache_dir}", "data.num_workers=0", "model.channels=[8,16]", "model.latent_dim=4",
        "run.checkpoint_images=64", "tracking.log_images=64", "tracking.progress=false", "tracking.tensorboard=false",
    ]  # fmt: skip


def settings_of(folder: Path, overrides: list[str], *more: str) -> Config:
    return config.load("configs/digits.yaml", [f"run.directory={folder}", *overrides, *more])


def shares(table: str) -> dict[str, float]:
    return {name: float(share) for name, share in re.findall(r"^(\w[\w ]*?) {2,}([\d.]+)%.*\d$", table, re.MULTILINE)}


def test_a_span_counts_for_itself_alone_and_memory_where_it_was_taken(tmp_path):
    profile, done = StepProfile(4, CPU), False
    while not done:
        with span("encoder phase"):
            time.sleep(0.02)
            with span("optimizer"):
                time.sleep(0.04)
                big = torch.ones(2**20)
            del big
            small = torch.ones(2**18)
        with span("data"):
            time.sleep(0.01)
        time.sleep(0.005)
        done = profile.step()
        del small
    found = profile.timed.seconds()
    expected = {"encoder phase": 0.02, "optimizer": 0.04, "data": 0.01, None: 0.005}
    assert set(found) == set(expected)
    for name, seconds in expected.items():
        # A sleep takes no less than asked for; how much more is the machine's.
        assert 4 * seconds <= found[name] < 4 * seconds + 0.1, name
    peaks = profile._peaks()
    assert 2**22 <= peaks["optimizer"] < 2**22 + 2**21 + 2**12, peaks
    assert 2**20 <= peaks["data"] < 2**21, peaks
    table = profile.report(Folder(str(tmp_path)), 160, BATCH)
    assert abs(sum(share for name, share in shares(table).items() if name in (*profiling.SPANS, "other")) - 100) < 0.5
    assert "not due in these steps: decoder phase" in table
    assert profiling._recorder is None


def test_a_profiled_run_stays_where_it_stood(tmp_path, overrides):
    settings = settings_of(tmp_path, overrides, "schedule.total_images=64")
    trainer.train(settings)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    longer = settings_of(tmp_path, overrides, "schedule.total_images=512")
    result = trainer.train(longer, profile_steps=4)
    assert result.images_seen == 64 + (3 + 4 + 2) * BATCH
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before
    names = {"encoder phase", "decoder phase", "optimizer", "averages", "data", "batch to device", "logging", "other"}
    assert names <= set(shares(result.profile)), result.profile
    steps, trace = sorted((tmp_path / "profile").iterdir())
    assert steps.read_text() == result.profile and f"profile/{trace.name}" in result.profile
    events = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"sivae: encoder phase", "sivae: decoder phase", "sivae: optimizer", "aten::mkldnn_convolution"} <= events
    # What was told while profiling is told again.
    trainer.train(longer)
    lines = [json.loads(line)["images_seen"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(64, 513, 64))


def test_too_few_images_left(tmp_path, overrides):
    with pytest.raises(UserError, match=r"takes 9 steps of 16 images, and 128 images are left"):
        trainer.train(settings_of(tmp_path, overrides, "schedule.total_images=128"), profile_steps=4)
    assert profiling._recorder is None


def test_two_ranks_and_a_run_directory_on_s3(overrides, monkeypatch):
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        variables = {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("profiled")
        command = ["train", "configs/digits.yaml", "run.directory=s3://profiled/run", *overrides]
        done = run_sivae([*command, "--profile", "--profile-steps", "3"], ranks=2)
        assert done.returncode == 0, done.stderr
        assert "mean of 3 steps and 2 ranks" in done.stdout and "images seen" not in done.stdout
        assert float(re.search(r"communication: ([\d.]+) ms", done.stdout)[1]) > 0
        files = {file.removeprefix("profiled/run/profile/") for file in store.find("profiled/run/profile")}
        assert files == {"steps-000000000128.txt", "trace-000000000128.json.gz"}
        assert not store.exists("profiled/run/checkpoints")
    finally:
        server.stop()
