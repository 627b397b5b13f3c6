"""SIGTERM and SIGINT ask a run to save and stop at its next step; asking again ends it at once."""

import os
import signal
import threading
import time

# torchrun hands a Ctrl-C on to workers that the terminal has already told: one request arrives as two signals. A cluster's
# scheduler may repeat its own for minutes, so its scripts set SIVAE_SAME_REQUEST_SEC.
_SAME_REQUEST_SEC = 1.0
_asked = threading.Event()


def ask() -> None:
    """Ask this process's run to save and stop at its next step, from any thread: for launchers that hear it some other way."""
    _asked.set()


class StopSignals:
    """`with StopSignals() as stop: ... if stop.requested`. Outside the main thread (a Ray worker) only `ask` is heard."""

    def __init__(self):
        self._signalled = False
        self._first_sec = 0.0
        self._previous = {}

    @property
    def requested(self) -> bool:
        return self._signalled or _asked.is_set()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        _asked.clear()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not self._signalled:
            self._signalled, self._first_sec = True, time.monotonic()
        elif time.monotonic() - self._first_sec > float(os.environ.get("SIVAE_SAME_REQUEST_SEC", _SAME_REQUEST_SEC)):
            os._exit(128 + number)
