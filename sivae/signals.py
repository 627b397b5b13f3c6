"""SIGTERM and SIGINT ask a run to save and stop at its next step; asking again ends it at once."""

import os
import signal
import threading
import time

# torchrun hands a Ctrl-C on to workers that the terminal has already told: one request arrives as two signals.
_SAME_REQUEST_SEC = 1.0


class StopSignals:
    """`with StopSignals() as stop: ... if stop.requested`. Outside the main thread (a Ray worker) it only holds False."""

    def __init__(self):
        self.requested = False
        self._first_sec = 0.0
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not self.requested:
            self.requested, self._first_sec = True, time.monotonic()
        elif time.monotonic() - self._first_sec > _SAME_REQUEST_SEC:
            os._exit(128 + number)
