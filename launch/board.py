"""Where the workers of a run and its driver leave word for each other: one small actor beside the driver. Trials have one to
tell their sweep.

Orders go out through it (settings may hold credentials, so they stay out of what Ray keeps about a training run), and reports
come back. A worker never waits for an answer to a report, so a slow driver does not slow the training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sivae.config import Config
from sivae.errors import UserError


@dataclass(frozen=True)
class Orders:
    """What every worker of an attempt is told. `newest` is a checkpoint that is known to be there, `restarted` whether this
    is not the first attempt, `cache_dir` the folder for node-local caches (None: a folder of the node's own choice).
    `lockstep`: after a report the workers wait until the driver has dealt with it."""

    settings: Config
    newest: str | None
    restarted: bool
    cache_dir: str | None
    lockstep: bool = False


@dataclass
class News:
    """What has been left since the driver last looked."""

    joined: dict[int, dict[str, Any]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    reports: list[tuple[dict[str, float], str | None]] = field(default_factory=list)
    failures: list[tuple[int, UserError]] = field(default_factory=list)


class Board:
    def __init__(self, orders: Orders | None):
        self._orders = orders
        self._stop = False
        self._dealt_with = 0
        self._news = News()

    def orders(self) -> Orders | None:
        return self._orders

    def join(self, rank: int, place: dict[str, Any]) -> None:
        self._news.joined[rank] = place

    def tell(self, line: str) -> None:
        self._news.lines.append(line)

    def report(self, metrics: dict[str, float], checkpoint: str | None) -> None:
        self._news.reports.append((metrics, checkpoint))

    def fail(self, rank: int, error: UserError) -> None:
        """Another attempt may mend a RankFailed; all else a user has to mend."""
        self._news.failures.append((rank, error))

    def ask_stop(self) -> None:
        self._stop = True

    def stop_asked(self) -> bool:
        return self._stop

    def deal_with(self, reports: int) -> None:
        """So many reports more have been dealt with."""
        self._dealt_with += reports

    def dealt_with(self) -> int:
        return self._dealt_with

    def news(self) -> News:
        news, self._news = self._news, News()
        return news


def open_board(orders: Orders | None = None) -> Any:
    """A handle of a new board, on this process's own node: it goes when the driver goes, and with no other node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote(orders)
