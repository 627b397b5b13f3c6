"""Work that training does not wait for: rank 0 writes checkpoints, pictures and logs in one thread beside it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from sivae.distributed import Group
from sivae.errors import UserError

logger = logging.getLogger("sivae")
MAX_WAITING = 8  # pieces of work that are held, with their pictures; then training waits after all


class Background:
    """One piece of work after the other, in the order of `submit`. After a failure nothing more is done.

    Only what is in the host's memory may be handed over, and nothing that the training changes; the work holds no collective.
    Python waits at exit for what is under way: only a kill ends it halfway.
    """

    def __init__(self, group: Group):
        self.is_main = group.is_main
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="sivae-background"
        )  # its thread starts with the first work
        self._waiting: deque[Future] = deque()
        self._failure: Exception | None = None

    def submit(self, work: Callable[[], object]) -> None:
        """On rank 0; the other ranks have nothing to do."""
        if not self.is_main:
            return
        while len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._run, work))

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def check(self) -> None:
        """Raise what the first failed work raised."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Until nothing is under way; then `check`."""
        while self._waiting:
            self._waiting.popleft().result()
        self.check()

    def close(self) -> None:
        """Wait, and end the thread. Raises nothing."""
        self._pool.shutdown()

    def _run(self, work: Callable[[], object]) -> None:
        if self._failure is not None:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 (raised by `check`, in the thread that trains)
            if not isinstance(error, UserError):
                logger.debug("work in the background failed", exc_info=True)
            self._failure = error
