"""A wish to stop is noted whatever goes on, also where Ray's start has put its own handler before ours.

python -m pytest tests/launch/test_signals.py
"""

import signal
import threading
import time

import pytest

from launch.signals import ASKING, Signals


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in ASKING}
    yield Signals()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ASKING)
def test_a_wish_is_noted_and_nothing_raised(signals, number):
    signals.beside(lambda: None)
    signals.check()
    signal.alarm(60)  # as Ray's handler does before it calls ours
    signal.raise_signal(number)
    assert signal.alarm(0) == 0
    with pytest.raises(KeyboardInterrupt):
        signals.check()


def test_before_there_is_ray_it_is_raised_and_noted_where_that_is_lost(signals):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signals.beside(lambda: pytest.fail("it goes on"))


def test_our_handlers_come_back_beside_work_that_takes_them(signals):
    ours = signal.getsignal(signal.SIGTERM)
    taken = threading.Event()

    def work() -> str:
        taken.wait(10)
        deadline = time.monotonic() + 10
        while signal.getsignal(signal.SIGTERM) != ours:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return "done"

    def take(number, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        taken.set()

    before = signal.signal(signal.SIGALRM, take)  # in the main thread, in the midst of its waiting
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        assert signals.beside(work) == "done"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_work_raises_is_raised(signals):
    with pytest.raises(ZeroDivisionError):
        signals.beside(lambda: 1 / 0)
