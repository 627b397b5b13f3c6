"""The first SIGTERM or SIGINT is noted, the same request arriving twice counts once, a later one ends the process at once.

pytest tests/unit/test_signals.py
"""

import signal
import subprocess
import sys
import threading
import time

import pytest

from sivae import signals
from tests.processes import ROOT, environment

PROGRAM = """
import time
from sivae.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("requested", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_process_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "requested\n"
    process.send_signal(number)  # as torchrun hands on what the terminal sent already
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=5) == 128 + number


def test_a_scheduler_may_repeat_its_signal():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment() | {"SIVAE_SAME_REQUEST_SEC": "60"}, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "requested\n"
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_asked_from_any_thread_and_forgotten_afterwards():
    with signals.StopSignals() as stop:
        assert not stop.requested
        thread = threading.Thread(target=signals.ask)
        thread.start()
        thread.join()
        assert stop.requested
    with signals.StopSignals() as stop:
        assert not stop.requested
