"""Starting real processes in tests: `python -m sivae`, torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT_SEC = 300
# `torchrun` itself, without the seconds that garbage collection takes while torch is imported and when the process ends.
TORCHRUN = "import gc; gc.disable(); from torch.distributed.run import main; gc.freeze(); gc.enable(); main()"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


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
    return subprocess.run(
        torchrun_command(ranks, arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SEC,
    )


def sivae_command(arguments: list[str], ranks: int = 1) -> list[str]:
    if ranks > 1:
        return torchrun_command(ranks, ["-m", "sivae", *arguments])
    return [sys.executable, "-m", "sivae", *arguments]


def run_sivae(arguments: list[str], ranks: int = 1, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        sivae_command(arguments, ranks),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SEC,
        **options,
    )
