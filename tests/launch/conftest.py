"""A real Ray on loopback, of one or several raylets, and small runs on digits. Everything that a test starts it ends."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sivae.checkpoint import list_names
from sivae.storage import Folder
from tests.processes import ROOT, environment, run_sivae

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]  # needs the extra sivae[cluster]

TOTAL_IMAGES, EVERY_IMAGES = 1440, 96
LIMIT_SEC = 180
NICENESS = 0  # of Ray's workers; by default everything else on the machine comes first
MARK = "SIVAE_TEST_MARK"
RAY_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every port on 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
    # A dead node is noticed after 1.5 seconds instead of 15.
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    # A lost head is noticed after 3 seconds instead of 60.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3",
    "RAY_prestart_worker_first_driver": "false",
}

# Before the first import of Ray, which reads them then.
os.environ |= RAY_ENVIRONMENT
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def kept():
    """The cluster that one test leaves to the next, if there is one."""
    clusters = []
    yield clusters
    for cluster in clusters:
        cluster.shutdown()


@pytest.fixture
def raylets(kept):
    """`raylets(2)`: a cluster of so many raylets on this machine, with one CPU slot each; the first is the head."""
    from ray.cluster_utils import Cluster

    def make(count: int) -> Cluster:
        if kept and "gcs_server" not in dict(kept[0].head_node.live_processes()):
            kept.pop().shutdown()
        if not kept:
            head = {"num_cpus": 1, "include_dashboard": False, "_system_config": {"worker_niceness": NICENESS}}
            kept.append(Cluster(initialize_head=True, head_node_args=head))
        (cluster,) = kept
        others = list(cluster.worker_nodes)
        for node in others[count - 1 :]:
            cluster.remove_node(node)
        for _ in range(count - 1 - len(others)):
            cluster.add_node(num_cpus=1)
        return cluster

    return make


@pytest.fixture(scope="session")
def head(tmp_path_factory):
    """A head with two CPU slots and a dashboard, for all tests that leave it as it is."""
    with ray_head(tmp_path_factory, "--num-cpus=2", "--num-gpus=0") as found:
        yield found


@contextmanager
def ray_head(tmp_path_factory, *options: str, port: int | None = None, **variables: str):
    """`ray start --head` on loopback, as a user starts it: where it listens, and the URL of its dashboard."""
    port, dashboard = port or free_port(), free_port()
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options, f"--port={port}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={tmp_path_factory.mktemp('r')}", "--disable-usage-stats",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "head.log"
    with open(log, "wb") as file:
        own = {
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
            "RAY_worker_niceness": str(NICENESS),
        }
        process = subprocess.Popen(
            command, env=environment() | own | variables, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
        )
    try:
        deadline = time.monotonic() + LIMIT_SEC
        while True:
            try:
                socket.create_connection(("127.0.0.1", dashboard), timeout=0.1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:  # in order it would take half a minute
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait(timeout=60)


class Head(NamedTuple):
    address: str
    url: str


@pytest.fixture(scope="session")
def small(cache_dir):
    """Arguments of a small run on digits, seconds long, fifteen checkpoints. The learning rate is so low that rounding, which
    through Adam grows to about one step's length in the weights, stays below 1e-5 when the number of ranks changes; after a
    lost Adam moment ten steps would differ."""

    def make(folder: Path | str, *overrides: str, total: int = TOTAL_IMAGES) -> list[str]:
        return [
            "configs/digits.yaml", f"run.directory={folder}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "model.channels=[8,16]",
            "model.latent_dim=4", f"schedule.total_images={total}", f"run.checkpoint_images={EVERY_IMAGES}", "tracking.picture_images=960",
            f"tracking.log_images={EVERY_IMAGES}", "tracking.progress=false", "tracking.tensorboard=false",
            "encoder_optimizer.lr=3e-6", "decoder_optimizer.lr=3e-6", *overrides,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="session")
def undisturbed(small, tmp_path_factory):
    """`undisturbed(images)`: what torchrun has on two ranks after so many images, with nothing in its way."""
    folder = tmp_path_factory.mktemp("torchrun")
    done = run_sivae(["train", *small(folder, "run.keep_checkpoints=99", total=3 * TOTAL_IMAGES)], ranks=2)
    assert done.returncode == 0, done.stderr
    return lambda images=TOTAL_IMAGES: read_tensors(folder / "checkpoints" / f"{images:012d}")


class Process:
    """A command whose output goes to a file, that can be waited for."""

    def __init__(self, command: list[str], log: Path, **variables: str):
        self.log, self.command = log, command
        with open(log, "wb") as file:
            self.popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment() | {MARK: str(os.getpid())} | variables,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = LIMIT_SEC) -> int:
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.text}") from None

    def until(self, true, what: str, timeout: float = LIMIT_SEC):
        """Wait for `true()` and return it; fails when the process ends before."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := true():
                return found
            assert self.popen.poll() is None, f"ended with {self.popen.returncode} before {what}:\n{self.text}"
            time.sleep(0.02)
        raise AssertionError(f"no {what} after {timeout} s:\n{self.text}")

    def family(self) -> list[psutil.Process]:
        """All processes that came of it and live."""
        try:
            return psutil.Process(self.popen.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@pytest.fixture
def start(tmp_path):
    """Start `python -m MODULE ARGUMENTS`; whatever still runs in the end is killed."""
    started: list[Process] = []

    def run(module: str, arguments: list[str], **variables: str) -> Process:
        process = Process([sys.executable, "-m", module, *arguments], tmp_path / f"{len(started)}.log", **variables)
        started.append(process)
        return process

    yield run
    for process in started:
        family = process.family()
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait()
        for member in family:
            if member.is_running():
                member.kill()


@pytest.fixture
def nothing_left():
    """Fails when anything that came of a command of this test still lives some seconds after it."""
    yield
    deadline = time.monotonic() + 20
    while (left := marked_processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


def marked_processes() -> list[psutil.Process]:
    """Processes that descend from `start`, however far: the mark is in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(os.getpid()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def refused(process: Process, module: str) -> str:
    """The one sentence of a command that was refused."""
    assert process.wait() == 1, process.text
    assert "Traceback" not in process.text, process.text
    lines = [line for line in process.text.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith(f"{module}: error: "), process.text
    return lines[0]


def newest_images(folder: Path) -> int:
    names = [path.parent.name for path in (folder / "checkpoints").glob("*/manifest.json")]
    return max((int(name.partition(".")[0]) for name in names), default=0)


def worker_pids(text: str) -> dict[int, int]:
    """Process of each rank, from the last table that `launch.train` printed."""
    found = {}
    for line in text.splitlines():
        if ": ranks " in line:
            ranks, _, rest = line.partition(": ranks ")[2].partition(", processes ")
            ranks = ranks.partition(" on GPUs")[0]
            pids = rest.partition(", caches")[0]
            found |= dict(zip(map(int, ranks.split(", ")), map(int, pids.split(", "))))
    return found


def tensors(folder: Path, images: int = TOTAL_IMAGES) -> dict[str, torch.Tensor]:
    """Of a run's newest checkpoint, which must be of so many images."""
    newest = folder / "checkpoints" / list_names(Folder(str(folder)))[-1]
    assert json.loads((newest / "state.json").read_text())["images_seen"] == images
    return read_tensors(newest)


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Bitwise, or the weights and their average to a tolerance."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if tolerance and name.startswith("optimizer/"):
            continue
        same = (
            torch.allclose(found[name], tensor, rtol=0, atol=tolerance)
            if tolerance
            else torch.equal(found[name], tensor)
        )
        assert same, f"{name}: {(found[name].float() - tensor.float()).abs().max()}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def logged_images(folder: Path) -> list[int]:
    return [json.loads(line)["images_seen"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
