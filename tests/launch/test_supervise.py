"""Proves what a supervised process counts for: its own word, however it then ends, and a loss without it.

python -m pytest tests/launch/test_supervise.py
"""

import signal
import sys

import pytest

from launch.supervise import LOST, supervise

CHILD = """
import os, sys
from pathlib import Path
from launch.supervise import say_ended
count = Path(os.environ["COUNT"])
first = count.read_text() == "0"
said, ends = sys.argv[1:3] if first else ("0", "0")
if said != "none":
    say_ended(count, int(said))
if int(ends) < 0:
    os.kill(os.getpid(), -int(ends))
sys.exit(int(ends))
"""


@pytest.mark.parametrize(
    "said, ends, code, failures",
    [
        (75, 75, 75, 0),
        (0, -signal.SIGSEGV, 0, 0),  # crashed in its last moments: the work was done
        (75, -signal.SIGABRT, 75, 0),
        (1, 1, 1, 0),
        (LOST, LOST, 0, 1),
        (LOST, -signal.SIGSEGV, 0, 1),
        ("none", -signal.SIGKILL, 0, 1),
        ("none", 1, 0, 1),
    ],
)
def test_what_a_process_said_counts(tmp_path, said, ends, code, failures):
    count = tmp_path / "failures"
    count.write_text("0")
    found = supervise(
        [sys.executable, "-c", CHILD, str(said), str(int(ends))],
        count,
        -1,
        {"COUNT": str(count)},
        say=lambda line: None,
    )
    assert (found, int(count.read_text())) == (code, failures)
