"""How a driver hears that it is asked to stop.

What a handler raises comes in the middle of anything: Python drops it in a destructor or in an import, and inside Ray's start a
lock may stay held for ever. So a handler here notes the wish, and whoever works looks at it between two things. It also raises
KeyboardInterrupt, but only before there is Ray: settings may be read from a place that hangs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT)
# A launcher may signal every process of a job, and the watcher hands it on as well; see sivae/signals.py.
SAME_REQUEST_SEC = 1.0


class Signals:
    """`asked` is set on SIGINT and SIGTERM; before the first `beside` they also raise. Asked again, this process ends at once. The
    main thread may not wait for `asked`: the handler, which interrupts it, could not set it then."""

    def __init__(self):
        self.asked = threading.Event()
        self._first_sec = 0.0
        self._raises = True
        self._listen()

    def check(self) -> None:
        """Raises KeyboardInterrupt when somebody has asked."""
        if self.asked.is_set():
            raise KeyboardInterrupt

    def beside(self, work: Callable[[], Any]) -> Any:
        """work() in a thread beside the main one, which stays free to hear signals, for Ray's compiled code keeps them waiting.

        The thread stays until this process ends: Ray's processes are killed with the thread that has started them.
        """
        self._raises = False
        self.check()
        done, box = threading.Event(), {}

        def run() -> None:
            try:
                box["result"] = work()
            except BaseException as error:  # noqa: BLE001 (raised below)
                box["error"] = error
            done.set()
            threading.Event().wait()

        threading.Thread(target=run, daemon=True).start()
        while not done.wait(0.1):
            self._listen()  # Ray's start puts a handler of its own in the place of ours
        self._listen()
        if "error" in box:
            raise box["error"]
        return box["result"]

    def _listen(self) -> None:
        for number in ASKING:
            signal.signal(number, self._handle)

    def _handle(self, number, frame) -> None:
        signal.alarm(0)  # where Ray's handler came first it aborts the process after three seconds
        if not self.asked.is_set():
            self._first_sec = time.monotonic()
            self.asked.set()
            if self._raises:
                raise KeyboardInterrupt
        elif time.monotonic() - self._first_sec > float(os.environ.get("SIVAE_SAME_REQUEST_SEC", SAME_REQUEST_SEC)):
            os._exit(128 + number)  # the cluster ends what this process started there
