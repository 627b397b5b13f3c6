"""Proves what a supervised process counts for: its own word, however it then ends, and a loss without it.

python -m pytest tests/launch/test_supervise.py
"""

import os
import signal
import sys
import threading
import time

import pytest

from launch.supervise import LOST, supervise

CHILD = """
import os, sys
from pathlib import Path
from launch.supervise import say_ended
count = Path(os.environ["COUNT"])
lives = [*(life.split(":") for life in sys.argv[1:]), ("0", "0")]
said, ends = lives[int(count.read_text())]
if said != "none":
    say_ended(count, int(said))
if int(ends) < 0:
    os.kill(os.getpid(), -int(ends))
sys.exit(int(ends))
"""


@pytest.mark.parametrize(
    "lives, code, failures",
    [
        (["75:75"], 75, 0),
        ([f"0:{-signal.SIGSEGV}"], 0, 0),  # crashed in its last moments: the work was done
        ([f"75:{-signal.SIGABRT}"], 75, 0),
        (["1:1"], 1, 0),
        ([f"{LOST}:{LOST}"], 0, 1),
        ([f"{LOST}:{-signal.SIGSEGV}"], 0, 1),
        ([f"none:{-signal.SIGKILL}"], 0, 1),
        (["none:1"], 0, 1),
        ([f"{LOST}:{LOST}", "none:3"], 0, 2),  # what the one before it said is not its word
    ],
)
def test_what_a_process_said_counts(tmp_path, lives, code, failures):
    """Each life is what it says, and how it ends; after the last it starts once more and ends well."""
    count, told = tmp_path / "failures", []
    count.write_text("0")
    command = [sys.executable, "-c", CHILD, *lives]
    assert supervise(command, count, failures, {"COUNT": str(count)}, say=told.append) == code
    assert int(count.read_text()) == len(told) == failures
    assert not count.with_name("ended").exists()


def test_a_loss_beyond_the_limit_is_final(tmp_path):
    count, told = tmp_path / "failures", []
    count.write_text("0")
    command = [sys.executable, "-c", CHILD, "none:3"]
    assert supervise(command, count, 0, {"COUNT": str(count)}, say=told.append) == 1
    assert told == ["error: the driver lost the cluster; gave up after 1 failures (--max-failures 0)"]


@pytest.mark.parametrize(
    "number, answer, code",
    [
        (signal.SIGTERM, "say_ended(count, 75), sys.exit(75)", 75),
        (signal.SIGINT, "say_ended(count, 75), sys.exit(75)", 75),
        (signal.SIGTERM, "os._exit(3)", 3),  # no loss: it was asked to end
    ],
)
def test_a_signal_before_it_can_be_answered_waits(tmp_path, number, answer, code):
    program = f"""
import os, signal, sys, time
from pathlib import Path
from launch.supervise import hear, say_ended
count = Path(os.environ["COUNT"])
count.with_name("begun").touch()
while not count.with_name("sent").exists():
    time.sleep(0.01)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: ({answer}))
hear()
time.sleep(60)
"""
    count = tmp_path / "failures"
    count.write_text("0")

    def ask() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        time.sleep(0.1)  # until it is handed on
        (tmp_path / "sent").touch()

    asking = threading.Thread(target=ask)
    asking.start()
    assert supervise([sys.executable, "-c", program], count, -1, {"COUNT": str(count)}, say=print) == code
    asking.join()
    assert count.read_text() == "0"
