"""Proves, with real processes that are really killed, that a pack which was killed goes on where it stopped: the same
digest, nothing finished made again, no process and no temporary file left; that it stops at once when asked to; that
two at once do no harm; on a disk and on S3.

    python -m pytest tests/distributed/test_pack.py
"""

import contextlib
import os
import signal
import subprocess
import time

import pytest

from sivae.data import Index
from sivae.data.check import check
from sivae.data.pack import pack
from sivae.storage import Folder
from tests.processes import ROOT, TIMEOUT_SEC, environment, sivae_command

SETTINGS = {"resolution": 64, "samples_per_shard": 50, "splits": "validation=10%"}  # 37 shards, seconds
COMMAND = ["--resolution", "64", "--samples-per-shard", "50", "--splits", "validation=10%"]


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    """Of the set that one process makes without a stop."""
    return pack("digits:", tmp_path_factory.mktemp("whole") / "set", progress=False, **SETTINGS).digest


def start(dest, workers=2, **extra):
    command = sivae_command(["pack", "digits:", str(dest), *COMMAND, "--workers", str(workers)])
    return subprocess.Popen(
        command, cwd=ROOT, env=environment() | extra, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process=None):
    end = time.monotonic() + TIMEOUT_SEC
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def finished(dest):
    """The shards of a local folder that have a record."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(n[:-5] for n in os.listdir(dest / ".packing") if n.endswith(".json") and n != "plan.json")
    return []


def tree(pid):
    """All processes below one, as long as it lives."""
    parents = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = open(f"/proc/{name}/stat").read()
            parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found - {pid}


def alive(pid):
    with contextlib.suppress(OSError):
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("workers, stops", [(0, [3]), (2, [3, 15])])
def test_killed_and_run_again(tmp_path, digest, workers, stops):
    dest = tmp_path / "set"
    kept = {}
    for stop in stops:
        process = start(dest, workers)
        wait_for(lambda stop=stop: len(finished(dest)) >= stop, process)
        children = tree(process.pid)
        assert workers == 0 or len(children) >= workers
        process.kill()
        process.communicate()
        wait_for(lambda children=children: not any(map(alive, children)))
        assert not os.path.exists(dest / "index.json")
        for name in finished(dest):
            stat = os.stat(dest / f"{name}.tar")
            assert kept.setdefault(name, (stat.st_ino, stat.st_mtime_ns)) == (stat.st_ino, stat.st_mtime_ns)
    (dest / ".packing" / "64-train-000000.1-x.part").write_bytes(b"left by a kill in the midst of writing")
    process = start(dest, workers)
    output, errors = process.communicate(timeout=TIMEOUT_SEC)
    assert process.returncode == 0 and "data.url=" in output, errors
    index = Index.load(Folder(dest))
    assert index.digest == digest and index.count == 1797 and len(kept) >= stops[-1]
    for name, (inode, mtime_ns) in kept.items():
        stat = os.stat(dest / f"{name}.tar")
        assert (stat.st_ino, stat.st_mtime_ns) == (inode, mtime_ns)
    assert sorted(os.listdir(dest)) == sorted(["index.json", *(shard.name for shard in index.shards)])
    assert check(dest, progress=False).findings.count == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_asked_to(tmp_path, number):
    process = start(tmp_path / "set")
    wait_for(lambda: finished(tmp_path / "set"), process)
    children = tree(process.pid)
    process.send_signal(number)
    asked_sec = time.monotonic()
    output, errors = process.communicate(timeout=TIMEOUT_SEC)
    assert process.returncode == 130 and time.monotonic() - asked_sec < 10
    assert "sivae: stopped" in errors and "Traceback" not in errors
    wait_for(lambda: not any(map(alive, children)))
    assert finished(tmp_path / "set")
    assert not [name for name in os.listdir(tmp_path / "set" / ".packing") if name.endswith(".part")]


def test_a_killed_worker_is_one_sentence(tmp_path, digest):
    process = start(tmp_path / "set")
    wait_for(lambda: finished(tmp_path / "set"), process)
    # the forkserver's children are the workers
    workers = {pid for child in tree(process.pid) for pid in tree(child)}
    os.kill(sorted(workers)[-1], signal.SIGKILL)
    output, errors = process.communicate(timeout=TIMEOUT_SEC)
    lines = [line for line in errors.splitlines() if "error" in line]
    assert process.returncode == 1 and len(lines) == 1, errors
    assert "memory ran out" in lines[0] and "--workers" in lines[0] and "Traceback" not in errors
    assert pack("digits:", tmp_path / "set", progress=False, **SETTINGS).digest == digest


def test_two_at_once(tmp_path, digest):
    processes = [start(tmp_path / "set", workers=1) for _ in range(2)]
    outcomes = [process.communicate(timeout=TIMEOUT_SEC) for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes, outcomes
    for code, (_, errors) in zip(codes, outcomes):
        assert code == 0 or "already holds" in errors, errors  # it began when the other had finished
    index = Index.load(Folder(tmp_path / "set"))
    assert index.digest == digest and check(tmp_path / "set", progress=False).findings.count == 0
    assert sorted(os.listdir(tmp_path / "set")) == sorted(["index.json", *(shard.name for shard in index.shards)])


def test_killed_on_the_way_to_s3(tmp_path, digest):
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    options = {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": url}}
    s3fs.S3FileSystem(**options).mkdir("packs")
    (tmp_path / "tmp").mkdir()
    extra = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": url}
    extra["TMPDIR"] = str(tmp_path / "tmp")
    dest = Folder("s3://packs/set", options)
    try:
        process = start(dest.url, **extra)
        wait_for(lambda: len(dest.names(".packing")) > 5, process)
        children = tree(process.pid)
        process.kill()
        process.communicate()
        wait_for(lambda: not any(map(alive, children)))
        done = {name[:-5] for name in dest.names(".packing")} - {"plan"}
        before = {name: dest.fs.info(dest.join(f"{name}.tar"))["LastModified"] for name in done}
        time.sleep(1)  # S3's clock has seconds
        process = start(dest.url, **extra)
        _, errors = process.communicate(timeout=TIMEOUT_SEC)
        assert process.returncode == 0, errors
        index = Index.load(dest)
        assert index.digest == digest
        assert dest.names() == sorted(["index.json", *(shard.name for shard in index.shards)])
        dest.fs.invalidate_cache()
        assert before == {name: dest.fs.info(dest.join(f"{name}.tar"))["LastModified"] for name in done}
        left = [name for _, _, names in os.walk(tmp_path / "tmp") for name in names if "train" in name]
        assert left == []
        assert check(dest.url, storage_options=options, progress=False).findings.count == 0
    finally:
        server.stop()
