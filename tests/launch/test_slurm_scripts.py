"""What the sbatch scripts decide, where a real Slurm takes minutes to bring it about: stand-ins for its commands tell the scripts
how the job is and write down what they are asked. tests/launch/test_slurm.py has the real Slurm.

pytest tests/launch/test_slurm_scripts.py
"""

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from launch import train
from tests.launch.conftest import free_port
from tests.processes import ROOT

SCRIPTS = ROOT / "cluster" / "slurm"
LIMIT_SEC = 60
# Every one writes its call down. `scontrol requeue` ends the job's script as Slurm does.
PROGRAMS = {
    "scontrol": """case $1-$2 in
show-job) cat "$STAND_INS/job" ;;
show-hostnames) printf 'n1\\nn2\\n' ;;
requeue-*) [[ ! -e $STAND_INS/refuse ]] && kill -TERM "$(cat "$STAND_INS/pid")" ;;
esac""",
    "squeue": "printf '7.batch\\n7.extern\\n7.0\\n7.1\\n'",
    "scancel": '[[ $1 != --signal=TERM ]] || touch "$STAND_INS/asked"',
    "srun": 'echo "cpus ${SRUN_CPUS_PER_TASK:-}" >>"$STAND_INS/calls"; [[ $* == *hostname* ]] && "${@: -2}" || eval "$SRUN"',
    "hostname": "echo 10.0.0.1",
    "python": 'eval "$PYTHON"',
}
# As `scontrol show job` of Slurm 22.05 has them, seen at the SIGTERM of each.
STATES = {
    "running": "JobState=RUNNING Reason=None Restarts=0 PreemptTime=None",
    "cancelled": "JobState=COMPLETING Reason=None Restarts=0 PreemptTime=None",
    "at the limit": "JobState=COMPLETING Reason=TimeLimit Restarts=0 PreemptTime=None",
    "grace is over": "JobState=COMPLETING Reason=None Restarts=0 PreemptTime=2026-11-26T13:12:53",
    "requeued by Slurm": "JobState=COMPLETING Reason=None Restarts=1",
}


class Job:
    """Bash in the environment of a job, with the stand-ins first on PATH."""

    def __init__(self, folder: Path):
        self.folder = folder / "stand-ins"
        self.folder.mkdir()
        for name, body in PROGRAMS.items():
            program = self.folder / name
            program.write_text(
                f'#!/bin/bash\nprintf "%s|" {name} "$@" >>"$STAND_INS/calls"; echo >>"$STAND_INS/calls"\n{body}\n'
            )
            program.chmod(0o755)
        self.describe()
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SIVAE_"))}
        self.environment = outside | {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "STAND_INS": str(self.folder), "SRUN": "", "PYTHON": "",
            "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
        }  # fmt: skip

    def describe(self, state: str = "running", command: str = f"{SCRIPTS}/torchrun.sbatch configs/digits.yaml") -> None:
        (self.folder / "job").write_text(
            f"JobId=7 JobName=sivae\n   {STATES[state]}\n   Command={command}\n   WorkDir=/\n"
        )

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        """The command to its end, and an end to all that it started."""
        start = ["bash", "-c", 'echo $$ >"$STAND_INS/pid"; exec "$@"', "-", *command]
        output = self.folder / "output"
        with open(output, "wb") as file:
            process = subprocess.Popen(
                start, env=self.environment | variables, stdout=file, stderr=file, start_new_session=True
            )
        try:
            code = process.wait(LIMIT_SEC)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return subprocess.CompletedProcess(command, code, output.read_text())

    def calls(self, program: str) -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [words[1:-1] for words in (line.split("|") for line in lines) if words[0] == program]

    @property
    def was_requeued(self) -> bool:
        return ["requeue", "7"] in self.calls("scontrol")


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


# A run that asks for the signal itself, until it is heard, and then ends with a code.
SIGNALLED = """
here=$1
source "$here/common.sh"
trap : USR1 TERM
bash -c 'until [[ -e $STAND_INS/asked ]]; do kill -USR1 "$PPID"; sleep 0.1; done; {then}; exit "$0"' "$2" &
run=$!
has_ended() {{ until [[ ! -e /proc/$run || $(</proc/$run/stat) == *") Z "* ]]; do sleep 0.05; done; }}
wait_and_requeue "$run" "touch $STAND_INS/asked; {answer}"
"""
SAVED = "stopped with a checkpoint saved"
BROKEN = "ended with code 3 before a checkpoint could be saved"


@pytest.mark.parametrize(
    "code, state, variables, ends, said, requeued",
    [
        (75, "running", {}, 75, f"{SAVED}; back into the queue", True),
        (75, "at the limit", {}, 75, f"{SAVED}; back into the queue", True),
        (75, "grace is over", {}, 75, f"{SAVED}; back into the queue", True),
        (75, "cancelled", {}, 75, f"{SAVED}; the job was cancelled", False),
        (75, "requeued by Slurm", {}, 75, f"{SAVED}; Slurm has put the job back", False),
        # Of the second life: that it was requeued once is no news.
        (75, "requeued by Slurm", {"SLURM_RESTART_COUNT": "1"}, 75, f"{SAVED}; the job was cancelled", False),
        (75, "running", {"SLURM_RESTART_COUNT": "2", "SIVAE_MAX_REQUEUES": "2"}, 75, f"{SAVED}; not requeued again", False),
        (3, "running", {}, 75, f"{BROKEN}; back into the queue", True),
        (3, "cancelled", {}, 3, f"{BROKEN}; the job was cancelled", False),
        (3, "running", {"SLURM_RESTART_COUNT": "2", "SIVAE_MAX_REQUEUES": "2"}, 3, f"{BROKEN}; not requeued again", False),
        (0, "running", {}, 0, "", False),
    ],
)  # fmt: skip
def test_what_becomes_of_a_signalled_job(job, tmp_path, code, state, variables, ends, said, requeued):
    job.describe(state)
    done = job.run("bash", "-c", SIGNALLED.format(then="sleep 0.2", answer=":"), "-", str(SCRIPTS), str(code), **variables)  # fmt: skip
    assert (done.returncode, job.was_requeued) == (ends, requeued), done.stdout
    assert "signalled, saving a checkpoint" in done.stdout and said in done.stdout
    assert not list(tmp_path.glob(".sivae-stopped-*"))


@pytest.mark.parametrize("code, said", [(75, SAVED), (3, "code 3"), (0, "")])
def test_the_code_of_a_run_that_ends_while_the_signal_is_answered(job, code, said):
    done = job.run("bash", "-c", SIGNALLED.format(then=":", answer="has_ended"), "-", str(SCRIPTS), str(code))
    assert said in done.stdout and job.was_requeued == (code != 0), done.stdout
    assert done.returncode == (75 if code else 0)


@pytest.mark.parametrize("state, said", [("running", "back into the queue"), ("cancelled", "the job was cancelled")])
@pytest.mark.parametrize("script", ["torchrun", "ray"])
def test_signalled_while_the_first_nodes_address_is_looked_up(job, script, state, said):
    job.describe(state, f"{SCRIPTS}/{script}.sbatch CONFIG")
    (job.folder / "hostname").write_text('#!/bin/bash\nkill -USR1 "$(cat "$STAND_INS/pid")"; echo 10.0.0.1\n')
    done = job.run("bash", f"{SCRIPTS}/{script}.sbatch", "CONFIG", SRUN="sleep 30")
    assert f"signalled before the run had started; {said}" in done.stdout, done.stdout
    assert (done.returncode, job.was_requeued) == (75, state == "running")
    assert len(job.calls("srun")) == 1, "nothing was started"


def test_a_job_that_slurm_does_not_requeue_ends(job):
    """As after `scontrol update Requeue=0`, the way to save at leisure and end."""
    (job.folder / "refuse").touch()
    done = job.run("bash", "-c", SIGNALLED.format(then=":", answer=":"), "-", str(SCRIPTS), "75")
    assert done.returncode == 75 and "Slurm refused" in done.stdout


# What `srun torchrun_node.sh` stands for. It signals the script once that waits for it, and saves when a step of it is signalled.
STEP = """
sleep 2
until [[ -e $STAND_INS/asked ]]; do kill -USR1 "$PPID"; sleep 0.1; done
touch "$SIVAE_STOPPED"
exit 1
"""


def test_torchrun_signals_its_step_whatever_its_number(job, tmp_path):
    """The look-up of the first node's address is step 0."""
    done = job.run("bash", f"{SCRIPTS}/torchrun.sbatch", "CONFIG", SRUN=STEP)
    assert done.returncode == 75 and f"{SAVED}; back into the queue" in done.stdout, done.stdout
    signalled = [call[1] for call in job.calls("scancel") if call[0] == "--signal=TERM"]
    assert set(signalled) == {"7.0", "7.1"} and not list(tmp_path.glob(".sivae-stopped-*"))


def test_torchrun_has_the_first_node_keep_the_rendezvous(job):
    for node, is_host in (("0", "1"), ("1", "0")):
        job.run(f"{SCRIPTS}/torchrun_node.sh", "--nnodes=2", SIVAE_PYTHON=str(job.folder / "python"), SLURM_NODEID=node)
        assert f"--rdzv-conf=is_host={is_host}" in job.calls("python")[-1]


@pytest.mark.parametrize("command", ["{}/torchrun.sbatch CONFIG run.directory=/my/run", "/var/spool/slurm_script"])
def test_scripts_are_found_in_a_checkout_whose_path_has_blanks(job, tmp_path, command):
    """From the job's command, and where that does not lead to them, from the folder in which sbatch was called."""
    checkout = tmp_path / "my own checkout"
    scripts = checkout / "cluster" / "slurm"
    shutil.copytree(SCRIPTS, scripts)
    job.describe(command=command.format(scripts))
    submitted = checkout if command.startswith("/var") else tmp_path
    done = job.run("bash", f"{scripts}/torchrun.sbatch", "CONFIG", "run.name=two words", SLURM_SUBMIT_DIR=str(submitted), SLURM_CPUS_PER_TASK="12")  # fmt: skip
    assert done.returncode == 0, done.stdout
    run = job.calls("srun")[-1]
    assert f"{scripts}/torchrun_node.sh" in run and run[-3:] == [f"{scripts}/worker.sh", "CONFIG", "run.name=two words"]
    # Each step has the cores that sbatch was asked for.
    assert (job.folder / "calls").read_text().count("cpus 12\n") == 2


def test_ray_leaves_the_last_word_to_the_user(job):
    with socket.create_server(("127.0.0.1", 0)) as head:
        variables = {"SIVAE_HEAD_IP": "127.0.0.1", "SIVAE_PORT": str(head.getsockname()[1]), "SRUN": "exec sleep 100"}
        job.describe(command=f"{SCRIPTS}/ray.sbatch")
        script = ["bash", f"{SCRIPTS}/ray.sbatch", "configs/digits.yaml"]
        job.run(*script, SIVAE_PROCESSES="3", **variables)
        job.run(*script, "--workers=2:4", "--wait", "7", **variables)
    default, own = (
        train.build_parser().parse_intermixed_args(call[2:])
        for call in job.calls("python")
        if call[:2] == ["-m", "launch.train"]
    )
    assert (default.workers, default.wait) == ("6", 300) and default.address == own.address
    assert (own.workers, own.wait) == ("2:4", 7)


def test_ray_says_why_its_head_did_not_start(job):
    job.describe(command=f"{SCRIPTS}/ray.sbatch")
    done = job.run("bash", f"{SCRIPTS}/ray.sbatch", "CONFIG", SIVAE_HEAD_IP="127.0.0.1", SIVAE_PORT=str(free_port()), SRUN="echo it has no memory; exit 1")  # fmt: skip
    assert done.returncode == 1 and "did not start" in done.stdout and "it has no memory" in done.stdout
    assert not any("launch.train" in call for call in job.calls("python"))


def test_ray_says_why_its_head_ended_when_something_else_has_the_port(job):
    job.describe(command=f"{SCRIPTS}/ray.sbatch")
    ends = (
        "echo $$ >$STAND_INS/head; until [[ -e $STAND_INS/asked ]]; do sleep 0.1; done; echo the port is taken; exit 1"
    )
    fails = "touch $STAND_INS/asked; while kill -0 $(<$STAND_INS/head); do sleep 0.1; done; exit 1"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = job.run("bash", f"{SCRIPTS}/ray.sbatch", "CONFIG", SIVAE_HEAD_IP="127.0.0.1", SIVAE_PORT=port, SRUN=ends, PYTHON=fails)  # fmt: skip
    assert done.returncode == 1 and "has ended" in done.stdout and "the port is taken" in done.stdout


def test_ray_ends_when_its_head_does_not_answer(job):
    # Two minutes of waiting, without the waiting.
    (job.folder / "sleep").write_text("#!/bin/bash\n")
    (job.folder / "sleep").chmod(0o755)
    job.describe(command=f"{SCRIPTS}/ray.sbatch")
    done = job.run("bash", f"{SCRIPTS}/ray.sbatch", "CONFIG", SIVAE_HEAD_IP="127.0.0.1", SIVAE_PORT=str(free_port()), SRUN="echo looking around; exec tail -f /dev/null")  # fmt: skip
    assert done.returncode == 1 and "did not start" in done.stdout and "looking around" in done.stdout
    assert ["--signal=KILL", "7.1"] in job.calls("scancel")
