"""The shipped sbatch scripts under a real Slurm of two nodes: pre-empted in mid-run they save, requeue, and end with the same bits;
cancelled they save and end.

pytest tests/launch/test_slurm.py        as root, with Debian's slurm-wlm and munge; skipped without
"""

import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.launch import slurm as local
from tests.launch.conftest import EVERY_IMAGES, TOTAL_IMAGES, assert_equal, newest_images, tensors
from tests.processes import ROOT

pytestmark = [
    pytest.mark.skipif(
        bool(local.missing()),
        reason=f"needs Slurm: apt-get install slurm-wlm munge ({', '.join(local.missing())} missing)",
    ),
    pytest.mark.skipif(os.getuid() != 0, reason="needs root to start Slurm's daemons"),
]
LIMIT_SEC = 240


@pytest.fixture(scope="module")
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path may have 108 characters
    cluster = local.Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(slurm, tmp_path):
    """Submit a shipped script on both nodes; returns the job's number and its log."""

    def run(script: str, arguments: list[str]) -> tuple[str, Path]:
        log = tmp_path / "job.log"
        variables = {"SIVAE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        command = [
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--partition=low",
            f"--output={log}",
            f"cluster/slurm/{script}",
            *arguments,
        ]
        before = dict(slurm.environment)
        slurm.environment |= variables
        try:
            return slurm.run(*command, cwd=ROOT).strip(), log
        finally:
            slurm.environment = before

    return run


def wait(slurm, log: Path, true, what: str):
    deadline = time.monotonic() + LIMIT_SEC
    while not (found := true()):
        assert time.monotonic() < deadline, f"no {what}: {log.read_text() if log.exists() else 'no log'}\n{slurm.run('squeue')}{slurm.logs()}"  # fmt: skip
        time.sleep(0.2)
    return found


def state(slurm, job: str) -> str:
    return re.search(r"JobState=(\w+)", slurm.run("scontrol", "show", "job", job))[1]


def finish(slurm, job: str, log: Path) -> str:
    wait(slurm, log, lambda: state(slurm, job) in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"), "end of the job")
    assert state(slurm, job) == "COMPLETED", log.read_text()
    return log.read_text()


def test_torchrun_is_preempted_and_goes_on(slurm, submit, small, undisturbed, tmp_path):
    """A job of a higher partition takes the nodes away: Slurm's own pre-emption."""
    run = tmp_path / "run"
    job, log = submit("torchrun.sbatch", small(run))
    wait(slurm, log, lambda: newest_images(run) >= 480, "480 images")
    other = slurm.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1").strip()  # fmt: skip
    wait(slurm, log, lambda: state(slurm, other) == "COMPLETED", "end of the job that pre-empts")
    text = finish(slurm, job, log)
    assert (
        "signalled, saving a checkpoint" in text and "stopped with a checkpoint saved; back into the queue" in text
    ), text
    assert "2 nodes x 1 processes" in text and "start 2" in text and "resuming at" in text
    assert_equal(tensors(run), undisturbed())
    assert not list(ROOT.glob(".sivae-stopped-*"))


@pytest.mark.parametrize(
    "commands, ends, said",
    [
        (["scancel JOB"], "CANCELLED", "stopped with a checkpoint saved; the job was cancelled"),
        (["scontrol update JobId=JOB Requeue=0", "scancel --batch --signal=USR1 JOB"], "FAILED", "Slurm refused"),
    ],
    ids=["scancel", "with time to save"],
)
def test_torchrun_saves_and_ends_for_good(slurm, submit, small, tmp_path, commands, ends, said):
    """The two ways in the script's header."""
    run = tmp_path / "run"
    job, log = submit("torchrun.sbatch", small(run, total=99 * TOTAL_IMAGES))
    wait(slurm, log, lambda: newest_images(run) >= EVERY_IMAGES, "checkpoint")
    for command in commands:
        slurm.run(*command.replace("JOB", job).split())
    # (A job that was requeued is pending, for as long as its old credential lasts.)
    wait(slurm, log, lambda: state(slurm, job) not in ("RUNNING", "COMPLETING"), "end of the job")
    assert state(slurm, job) == ends and said in log.read_text(), log.read_text()
    assert not list(ROOT.glob(".sivae-stopped-*"))


def test_ray_is_signalled_and_goes_on(slurm, submit, small, undisturbed, tmp_path):
    """The signal that comes before the time limit. Two raylets of this machine, of a Ray of the job's own."""
    run = tmp_path / "run"
    job, log = submit("ray.sbatch", small(run))
    wait(slurm, log, lambda: newest_images(run) >= 480, "480 images")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    text = finish(slurm, job, log)
    assert "asked to stop: saving a checkpoint first" in text and "back into the queue" in text, text
    assert "start 2" in text and text.count("2 workers on") == 2
    assert_equal(tensors(run), undisturbed())


def test_an_error_ends_the_job_and_is_not_requeued(slurm, submit, small, tmp_path):
    job, log = submit("torchrun.sbatch", [*small(tmp_path / "run"), "data.url=/no/where"])
    wait(slurm, log, lambda: state(slurm, job) in ("FAILED", "COMPLETED"), "end of the job")
    assert state(slurm, job) == "FAILED" and "sivae pack" in log.read_text() and "back into" not in log.read_text()
