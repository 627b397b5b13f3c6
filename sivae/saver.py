"""The checkpoints of a run: taken on all ranks between two steps, written and published by rank 0 in the background.

Training waits while the state is copied, not while it is written. The copy is held until it is published and a second save
first waits for that, so rank 0's host needs memory for one copy: four times the weights in float32 (weights, average and two
moments), and bootstrap's target. On a GPU it is pinned memory: torch rounds each tensor's up to a power of two, so that it may take
up to twice as much, and keeps it for the next one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sivae import checkpoint
from sivae.background import Background
from sivae.checkpoint import Checkpoint
from sivae.distributed import Group
from sivae.state import Tensors
from sivae.storage import Folder


@dataclass(frozen=True)
class Saved:
    """A published checkpoint, with the metrics of the moment when it was taken."""

    name: str
    images_seen: int
    metrics: dict[str, float]


class Saver:
    """`newest` is published and known to all ranks, or None. All methods but `has_news` are collectives.

    after(name, state): what rank 0 does, still in the background, when a checkpoint is published.
    """

    def __init__(
        self, group: Group, folder: Folder, background: Background, keep: int, after: Callable[[str, dict], None]
    ):
        self.group, self.folder, self.background, self.keep, self.after = group, folder, background, keep, after
        self.newest: Saved | None = None
        self._under_way: tuple[int, dict[str, float]] | None = None  # images seen, metrics
        self._published: str | None = None  # on rank 0, until `settle` or `hear`

    def save(self, state: dict[str, Any], tensors: Tensors, metrics: dict[str, float]) -> None:
        """Begin to save plain state and whole CPU tensors, which nobody else may change. None may be under way."""
        assert self._under_way is None, "a second copy beside the first"
        self._under_way = state["images_seen"], metrics
        self.background.submit(lambda: self._write(state, tensors))

    def has(self, images_seen: int) -> bool:
        """Whether a checkpoint of so many images is the newest, or under way."""
        newest = self._under_way[0] if self._under_way is not None else self.newest and self.newest.images_seen
        return newest == images_seen

    @property
    def has_news(self) -> bool:
        """On rank 0: something was published, or failed. All ranks then call `hear`."""
        return self._published is not None or self.background.failed

    def hear(self) -> Saved | None:
        """What was published since the last time. Work that failed in the background raises here, on every rank."""
        return self._tell(self.background.check)

    def settle(self) -> Saved | None:
        """`hear`, when nothing is under way any more."""
        return self._tell(self.background.wait)

    def read_newest(self, check: Callable[[dict[str, Any]], None]) -> Checkpoint | None:
        """The newest whole checkpoint, read once and handed to all ranks. check(state) raises UserError where it does not fit."""
        found = None

        def read():
            nonlocal found
            found = checkpoint.read_newest(
                self.folder, report=lambda line: print(f"sivae: {line}", file=sys.stderr), set_aside=True
            )
            if found is not None:
                check(found.state)
            return found and (found.name, found.state, sorted(found.tensors))

        head = self.group.on_main(read)
        if head is None:
            return None
        name, state, files = head
        self.newest = Saved(name, state["images_seen"], {})
        return Checkpoint(name, state, {file: self.group.broadcast(found and found.tensors[file]) for file in files})

    def _write(self, state: dict[str, Any], tensors: Tensors) -> None:
        name = checkpoint.save(self.folder, state, tensors)
        tensors.clear()  # the memory is free before anybody hears of it
        self.after(name, state)
        checkpoint.prune(self.folder, self.keep)  # the best may be another now
        self._published = name

    def _tell(self, look: Callable[[], None]) -> Saved | None:
        name = self.group.on_main(lambda: (look(), self._published)[1])
        self._published = None
        if name is None:
            return None
        self.newest, self._under_way = Saved(name, *self._under_way), None
        return self.newest
