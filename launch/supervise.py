"""A process that watches over another: hands signals on, starts it again when it is lost, takes it along when it dies itself."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launch.signals import ASKING

PR_SET_PDEATHSIG = 1
LOST = 70  # exit code of a process that lost what it stood on and may be started again


def supervise(
    command: list[str], count: Path, max_failures: int, environment: dict[str, str], say: Callable[[str], None]
) -> int:
    """Run `command` to its end and return its exit code.

    It has ended in its own way when it called `say_ended`: then that code counts, whatever becomes of the process in its last
    moments, in which Ray's compiled part may crash. Without, it counts as lost (that part ends the process when the cluster's head
    is gone), unless a signal came through here; and when it says so itself with code LOST. `count` is a file with
    the number of failures so far, which the command raises too; beyond `max_failures` (-1: never) the loss is final and 1 is
    returned. Signals wait until it calls `hear`: while it still imports it could not answer them.
    """
    child: subprocess.Popen | None = None
    asked = 0

    def hand_on(number, frame) -> None:
        nonlocal asked
        asked += 1
        if child is not None and child.poll() is None:
            child.send_signal(number)

    end_with_this = end_with(os.getpid())

    def arrange() -> None:
        end_with_this()
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)

    before = {number: signal.signal(number, hand_on) for number in ASKING}
    try:
        while True:
            # In a session of its own a Ctrl-C reaches it once, through here.
            child = subprocess.Popen(command, env=os.environ | environment, start_new_session=True, preexec_fn=arrange)
            if asked:
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            ended = _ended(count)
            if ended.exists():
                code = int(ended.read_text())
                ended.unlink()
                if asked or code != LOST:
                    return code
            elif asked:
                return code if code >= 0 else 128 - code
            failures = int(count.read_text() or 0) + 1
            count.write_text(str(failures))
            what = (
                "the driver lost the cluster" if code >= 0 else f"the driver was ended by {signal.Signals(-code).name}"
            )
            if 0 <= max_failures < failures:
                say(f"error: {what}; gave up after {failures} failures (--max-failures {max_failures})")
                return 1
            say(
                f"{what}; starting it again, failure {failures}"
                + (f" of at most {max_failures}" if max_failures >= 0 else "")
            )
            time.sleep(1.0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hear() -> None:
    """The command has handlers of the signals that ask it to stop, and takes those that came before."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)


def say_ended(count: Path, code: int) -> None:
    """The command ends in its own way, and `code` is what it returns."""
    partial = _ended(count).with_suffix(".partial")
    partial.write_text(str(code))
    partial.rename(_ended(count))


def _ended(count: Path) -> Path:
    return count.with_name("ended")


def end_with(parent: int) -> Callable[[], None]:
    """In the child: SIGTERM when the parent dies, however it dies."""
    libc = ctypes.CDLL(None, use_errno=True)

    def arrange() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return arrange
