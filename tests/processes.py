"""Starting real processes in tests: `python -m sivae`, torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT_SEC = 300
SLACK_SEC = 4  # longer than a busy machine stands still; what a test must see not waited for takes longer yet
# `torchrun` itself, without the seconds that garbage collection takes while torch is imported and when the process ends.
TORCHRUN = "import gc; gc.disable(); from torch.distributed.run import main; gc.freeze(); gc.enable(); main()"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def finished(command: list[str], **options) -> subprocess.CompletedProcess:
    """Run it to its end. What a failed one said is printed whole, for pytest to show where that fails a test."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_SEC, **options
    )
    if done.returncode:
        print(f"exit code {done.returncode} of {' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done


def torchrun_command(ranks: int, arguments: list[str]) -> list[str]:
    # A free port of its own for each group, so that tests can run beside each other.
    return [
        sys.executable,
        "-c",
        TORCHRUN,
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        f"--nproc-per-node={ranks}",
        *arguments,
    ]


def run_torchrun(ranks: int, arguments: list[str]) -> subprocess.CompletedProcess:
    return finished(torchrun_command(ranks, arguments))


def sivae_command(arguments: list[str], ranks: int = 1) -> list[str]:
    if ranks > 1:
        return torchrun_command(ranks, ["-m", "sivae", *arguments])
    return [sys.executable, "-m", "sivae", *arguments]


def run_sivae(arguments: list[str], ranks: int = 1, **options) -> subprocess.CompletedProcess:
    return finished(sivae_command(arguments, ranks), **options)
