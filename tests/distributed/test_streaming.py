"""Proves on real runs of `sivae train` that a set streams from S3, through the cache and workers, as from the disk; that
samples which are damaged stop a run with one sentence, or are substituted and counted over ranks and restarts; that no
credential lies in what a run leaves or says; and that a killed run leaves no data worker behind.

    python -m pytest tests/distributed/test_streaming.py
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from sivae.checkpoint import list_names
from sivae.data.index import Index
from sivae.data.pack import pack
from sivae.storage import Folder
from tests.processes import ROOT, TIMEOUT_SEC, environment, run_sivae, sivae_command
from tests.proxy import address, object_store

COUNT, TOTAL = 64, 256  # images in the set, and of a run: four epochs
SECRET, SECRET_KEY = "wJalrXUtnFEMIK7MDENG", "AKIAIOSFODNN7EXAMPLE"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("streaming")
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16), dtype=np.uint8)
    np.save(path / "a.npy", images)
    pack(path / "a.npy", path / "set", resolution=16, samples_per_shard=16, progress=False)
    return path / "set"


@pytest.fixture(scope="module")
def s3(folder):
    with object_store("streaming") as options:
        Folder("s3://streaming", options).fs.put(str(folder), "streaming/set", recursive=True)
        yield options


@pytest.fixture
def damaged(folder, tmp_path):
    """The set with a flipped bit in three samples, and the samples."""
    path, index, draw = tmp_path / "damaged", Index.load(Folder(folder)), random.Random(0)
    path.mkdir()
    for name in os.listdir(folder):
        (path / name).write_bytes((folder / name).read_bytes())
    for sample in (3, 20, 62):
        shard = path / index.shards[index.shard[sample]].name
        data = bytearray(shard.read_bytes())
        data[index.offset[sample] + draw.randrange(index.size[sample])] ^= 1 << draw.randrange(8)
        shard.write_bytes(data)
    return path, [index.name(sample) for sample in (3, 20, 62)]


def arguments(url, run, *overrides: str) -> list[str]:
    return [
        "train", "configs/digits.yaml", f"run.directory={run}", f"data.url={url}", "data.num_workers=0",
        "model.channels=[8,16]", "model.latent_dim=4", "schedule.batch_size=16", f"schedule.total_images={TOTAL}",
        "run.checkpoint_images=64", "tracking.log_images=64", f"tracking.picture_images={TOTAL}", "tracking.progress=false",
        *overrides,
    ]  # fmt: skip


def metrics(run: Path) -> list[dict]:
    """What a run told, but for what no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", "speed", "memory"))} for line in lines]


def done(process):
    assert process.returncode == 0, process.stderr
    return process


def test_substitutes_are_counted_over_a_restart(damaged, tmp_path):
    (path, names), run = damaged, tmp_path / "run"
    settings = ["data.on_corrupt=substitute", "tracking.progress=true"]
    first = done(run_sivae(arguments(path, run, *settings, "schedule.total_images=128")))
    assert [line["data/substituted"] for line in metrics(run)] == [3, 6]
    assert all(first.stderr.count(name) >= 1 for name in names) and first.stderr.count("another sample stands in") == 6
    assert "substituted=6" in first.stderr
    done(run_sivae(arguments(path, run, *settings)))
    assert [line["data/substituted"] for line in metrics(run)] == [3, 6, 9, 12]
    newest = list_names(Folder(run))[-1]
    assert json.loads(Folder(run).read("checkpoints", newest, "state.json"))["substituted"] == 12


def test_substitutes_are_counted_over_ranks(damaged, tmp_path):
    (path, _), run = damaged, tmp_path / "run"
    two = done(run_sivae(arguments(path, run, "data.on_corrupt=substitute", "data.num_workers=1"), ranks=2))
    assert [line["data/substituted"] for line in metrics(run)] == [3, 6, 9, 12]
    assert two.stderr.count("another sample stands in") == 12


def test_what_reads_ends_with_the_training_even_if_a_frame_is_kept(damaged, tmp_path):
    """A report of substitutes leaves the loop's frame alive. Who reads would then live on, and hold up the end by half a minute."""
    path, _ = damaged
    settings = arguments(path, tmp_path / "run", "data.on_corrupt=substitute", "data.num_workers=1")
    code = "import multiprocessing, sys, sivae.cli; sivae.cli.main(sys.argv[1:]); print('left:', multiprocessing.active_children())"
    process = subprocess.run([sys.executable, "-c", code, *settings], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_SEC)  # fmt: skip
    assert "left: []" in done(process).stdout, process.stdout


def test_a_damaged_sample_stops_a_run_with_one_sentence(damaged, tmp_path):
    path, names = damaged
    stopped = run_sivae(arguments(path, tmp_path / "run"))
    lines = [line for line in stopped.stderr.splitlines() if "sivae: error" in line]
    assert stopped.returncode == 1 and len(lines) == 1 and "Traceback" not in stopped.stderr
    assert any(name in lines[0] for name in names) and "damaged" in lines[0]


def options(s3, section: str) -> list[str]:
    endpoint = s3["client_kwargs"]["endpoint_url"]
    given = {"key": SECRET_KEY, "secret": SECRET, "client_kwargs.endpoint_url": endpoint}
    return [f"{section}.storage_options.{key}={value}" for key, value in given.items()]


def secrets_in(text: str | bytes) -> bool:
    text = text if isinstance(text, bytes) else text.encode()
    return SECRET.encode() in text or SECRET_KEY.encode() in text


def test_a_set_on_s3_streams_as_from_the_disk_and_no_credential_is_left(s3, folder, tmp_path):
    on_disk, streamed, cache = tmp_path / "disk", tmp_path / "streamed", tmp_path / "cache"
    done(run_sivae(arguments(folder, on_disk)))
    settings = ["data.num_workers=2", f"data.cache_dir={cache}", "data.cache_bytes=1000000", *options(s3, "data")]
    run = done(run_sivae(arguments("s3://streaming/set", streamed, *settings)))
    assert metrics(streamed) == metrics(on_disk) and len(metrics(on_disk)) == 4
    assert len(list((cache / "blocks").glob("*/*"))) == 4
    assert not secrets_in(run.stderr + run.stdout)
    files = [path for path in [*streamed.rglob("*"), *cache.rglob("*")] if path.is_file()]
    assert {"config.yaml", "environment.json", "metrics.jsonl", "state.json"} <= {path.name for path in files}
    assert not [path for path in files if secrets_in(path.read_bytes())]
    assert "data.storage_options.secret=..." in (streamed / "environment.json").read_text()


def test_a_run_directory_on_s3_holds_no_credential(s3, folder):
    url = "s3://streaming/run"
    run = done(run_sivae(arguments(folder, url, *options(s3, "run"))))
    found = Folder("s3://streaming", s3).fs.find("streaming/run")
    assert {"config.yaml", "environment.json", "metrics.jsonl"} <= {path.split("/")[2] for path in found}
    assert not [path for path in found if secrets_in(Folder("s3://streaming", s3).fs.cat_file(path))]
    assert not secrets_in(run.stderr + run.stdout)


def test_credentials_from_the_environment_and_one_sentence_without_them(s3, tmp_path, monkeypatch):
    host, port = address(s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    done(run_sivae(arguments("s3://streaming/set", tmp_path / "run", "schedule.total_images=64")))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    given = arguments("s3://streaming/set", tmp_path / "other", *options(s3, "run"), "data.timeout_sec=0.5", "--debug")
    failed = run_sivae(given)
    assert failed.returncode == 1 and not secrets_in(failed.stderr + failed.stdout)
    assert "UserError: cannot read s3://streaming/set/index.json: TimeoutError" in failed.stderr


@pytest.mark.parametrize("where", ["local", "s3"])  # workers are forked, and started by a server
def test_data_workers_end_with_a_killed_run(folder, s3, tmp_path, where):
    url = folder if where == "local" else "s3://streaming/set"
    endless = ["data.num_workers=2", "schedule.total_images=16000000", "tracking.picture_images=16000000"]
    secret = [] if where == "local" else [f"data.storage_options={json.dumps(s3)}"]
    command = sivae_command(arguments(url, tmp_path / "run", *endless, *secret))
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) as run:
        try:
            deadline = time.monotonic() + TIMEOUT_SEC
            while (
                not (tmp_path / "run" / "metrics.jsonl").exists()
                or not (tmp_path / "run" / "metrics.jsonl").read_text()
            ):
                assert run.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            children = psutil.Process(run.pid).children(recursive=True)
            assert len(children) >= 2
        finally:
            run.kill()
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left
