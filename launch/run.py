"""A run over the workers of a cluster, attempt after attempt: start, watch, recover, grow, stop.

Each attempt is a Ray Train group of a fixed number of workers, without retries of its own. What comes after it is decided here,
because three things that Ray cannot know decide it: which numbers of workers can share the global batch, which errors another
attempt cannot mend, and that a checkpoint is saved before the group changes its size. The run's own checkpoints carry it over.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launch import cluster
from launch.board import News, Orders, open_board
from launch.cluster import Need
from sivae import startup
from sivae.config import Config, ConfigError
from sivae.errors import RankFailed, UserError

WATCH_SEC = 0.3
FREE_SEC = 5.0  # how long the places of a group that has just ended may still count as taken
SETTLE_SEC = 20.0  # how long to wait for the number of workers there was before, before going on with fewer
GROW_PATIENCE = 2  # looks in a row that must find room for more workers


@dataclass(frozen=True)
class Limits:
    """`wait_sec`: how long to wait for room; `grow_sec`: how often to look for room for more workers; `max_failures`: how
    many attempts may fail, -1 for any number; `queue`: room that others use comes free, and is waited for as long as that takes."""

    wait_sec: float = 60.0
    grow_sec: float = 30.0
    max_failures: int = 8
    queue: bool = False


@dataclass
class Outcome:
    images_seen: int
    interrupted: bool
    metrics: dict[str, float]
    checkpoint: str | None
    picture: str | None = None


def parse_workers(text: str) -> range:
    """`4` or `2:8` as a range of numbers of workers."""
    first, colon, last = text.partition(":")
    if (
        not first.isdecimal()
        or (colon and not last.isdecimal())
        or not 1 <= int(first) <= int(last if colon else first)
    ):
        raise UserError(f"--workers: {text} is neither a number (4) nor a range that rises (2:8)")
    return range(int(first), int(last if colon else first) + 1)


def sizes(settings: Config, workers: range) -> list[int]:
    """The numbers of workers that can share the global batch. Raises ConfigError with the reason when none does."""
    good, reason = [], None
    for number in workers:
        try:
            settings.passes(number)
            good.append(number)
        except ConfigError as error:
            reason = error
    if not good:
        if len(workers) == 1:
            raise reason
        raise ConfigError(
            f"--workers: none of {workers[0]} to {workers[-1]} workers can share the global batch"
            f" (schedule.batch_size={settings.schedule.batch_size},"
            f" engine.micro_batch_size={settings.engine.micro_batch_size}): {reason}"
        )
    return good


@dataclass
class Run:
    """One run on the cluster that this process is connected to. `go` may be called once. When `stop` is set, it saves and stops
    at the next step, and `go` returns an interrupted outcome.

    `say` gets sentences for a person, `on_report` every report of rank 0 as (metrics, checkpoint), in the thread of `go`.
    `lockstep`: the workers wait after a report until `on_report` has returned. `janitor`: this process may end long before
    the connection to the cluster does (a trial of a sweep), so Ray's own janitor must free the workers' places then; it
    needs the cluster's dashboard, and where there is none it would stay for ever.
    """

    settings: Config
    sizes: list[int]
    need: Need
    limits: Limits = Limits()
    say: Callable[[str], None] = print
    on_report: Callable[[dict[str, float], str | None], None] = lambda metrics, checkpoint: None
    on_failure: Callable[[int], None] = lambda failures: None
    cache_dir: str | None = None
    lockstep: bool = False
    janitor: bool = False
    failures: int = 0
    newest: str | None = None
    restarted: bool = False
    ever: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def go(self) -> Outcome:
        """Train to the end. Raises UserError: a lasting error in its own sentence, or that the limit of failures is reached."""
        self._refuse_impossible()
        before, restarted = None, self.restarted or self.failures > 0
        while True:
            number = self._wait_for_room(before)
            if number is None:
                return Outcome(0, True, {}, self.newest)
            attempt = Attempt(self, number, restarted)
            outcome, fault = attempt.go()
            if fault is None and (self.stop.is_set() or not outcome.interrupted):
                return outcome
            before, restarted = attempt.target, True
            if fault is None:
                continue  # stopped by us, to go on with another number of workers
            self.failures += 1
            self.on_failure(self.failures)
            limit = self.limits.max_failures
            where = f"checkpoint {self.newest} is kept" if self.newest else "no new checkpoint was saved"
            if 0 <= limit < self.failures:
                raise UserError(f"{fault}; gave up after {self.failures} failures (--max-failures {limit}), {where}")
            if self.stop.is_set():
                return Outcome(0, True, {}, self.newest)
            self.say(
                f"{fault}; starting again, failure {self.failures}" + (f" of at most {limit}" if limit >= 0 else "")
            )

    def _refuse_impossible(self) -> None:
        ever = self.ever = cluster.most_ever(self.need)
        if ever is not None and ever < self.sizes[0]:
            raise UserError(
                f"--workers: {self.sizes[0]} are asked for, with {self.need} each, but the cluster's autoscaler may"
                f" start room for {ever} at most; lower --workers or raise the limits of its node types"
            )

    def _wait_for_room(self, before: int | None) -> int | None:
        """The number of workers to start now; None when asked to stop meanwhile.

        After a fault the resources of the dead come free only after a moment, and nodes join one after the other: so the
        number that there was, or at first the most, is preferred for some seconds. Raises UserError when there is no room for
        the fewest in time.
        """
        with self.demand(self.sizes[0]) as demand:
            patience = max(self.limits.wait_sec, FREE_SEC if before else 0.0)
            return self._wait(before or self.most, patience, demand)

    @property
    def most(self) -> int:
        return self.sizes[-1] if self.ever is None else self.at_most(self.ever)

    def at_most(self, limit: int) -> int:
        """The most workers within a limit; the fewest where that is too low."""
        return max((number for number in self.sizes if number <= limit), default=self.sizes[0])

    def _wait(self, before: int, patience: float, demand: cluster.Demand) -> int | None:
        start = lacking = time.monotonic()
        told = False
        while True:
            if demand.met():
                demand.close()  # what it holds is for the workers
                time.sleep(1.0)
            found = cluster.nodes(self.need)
            free, total = (self.need.most([getattr(node, name) for node in found]) for name in ("free", "total"))
            fits = [number for number in self.sizes if number <= free]
            waited = time.monotonic() - start
            queued = self.limits.queue and total >= self.sizes[0]
            lacking = time.monotonic() if queued else lacking
            if fits and (fits[-1] >= before or waited >= min(SETTLE_SEC, patience)):
                return fits[-1]
            if not fits:
                demand.open()
            if self.stop.is_set():
                return None
            if not fits and not queued and time.monotonic() - lacking >= patience:
                rooms = ", ".join(f"{node.name}: {node.total}" for node in found) or "no node"
                busy = f", of which {total - free} in use" if total - free else ""
                how = "" if self.need.placement in ("pack", "spread") else f" under --placement {self.need.placement}"
                raise UserError(
                    f"--workers: {self.sizes[0]} are asked for, with {self.need} each, but the cluster has room for"
                    f" {total}{how}{busy} ({rooms}); lower --workers, or add nodes and try again"
                )
            if not told and waited > 3.0:
                told = True
                limit = " until others are done" if queued else f" up to {patience:g} seconds"
                self.say(f"waiting{limit} for room for {before} workers, there is room for {free}")
            self.stop.wait(0.5)

    def demand(self, number: int) -> cluster.Demand:
        """Ask the cluster's autoscaler for room for so many workers more; where there is none, nobody hears it."""
        return cluster.Demand(self.need, number if self.limits.wait_sec else 0)

    def room(self, running: int) -> int:
        """The most workers that could run, counting the `running` ones of this run."""
        free = self.need.most([node.free for node in cluster.nodes(self.need)])
        fits = [number for number in self.sizes if number <= free + running]
        return max([running, *fits])


class Attempt:
    """One group of workers, from its start to its end."""

    def __init__(self, run: Run, number: int, restarted: bool):
        self.run, self.number, self.target = run, number, number
        self.board = open_board(Orders(run.settings, run.newest, restarted, run.cache_dir, run.lockstep))
        self.joined: dict[int, dict[str, Any]] = {}
        self.failures: list[tuple[int, UserError]] = []
        self.done = threading.Event()
        self.outcome: dict[str, Any] | None = None
        self.error: BaseException | None = None

    def go(self) -> tuple[Outcome | None, str | None]:
        """The outcome and None, or None and a clause that says what went wrong. Raises UserError for a lasting error."""
        with self.run.demand(self.run.most - self.number) as more:
            return self._go(more)

    def _go(self, demand: cluster.Demand) -> tuple[Outcome | None, str | None]:
        thread = threading.Thread(target=self._fit, daemon=True)
        thread.start()
        stopping, looks, next_look = False, 0, time.monotonic() + self.run.limits.grow_sec
        while not self.done.wait(WATCH_SEC):
            self._read()
            if stopping:
                continue
            reason = None
            if self.run.stop.is_set():
                reason = "asked to stop: saving a checkpoint first"
                if not self.joined:
                    return Outcome(0, True, {}, self.run.newest), None  # nothing runs yet; it ends with this process
            elif leaving := self._leaving():
                # For now there are no more than these: nothing to wait for.
                self.target = self.run.at_most(self.number - len(leaving))
                reason = f"node {leaving[0]['node']} is about to be taken away: saving a checkpoint first"
            elif self.number < self.run.most and len(self.joined) == self.number and time.monotonic() >= next_look:
                next_look = time.monotonic() + self.run.limits.grow_sec
                demand.open()  # not before the workers have their places, which it would take
                more = self.run.most if demand.met() else self.run.room(self.number)
                looks = looks + 1 if more > self.number else 0
                if looks >= GROW_PATIENCE:
                    self.target = more
                    reason = f"there is room for {more} workers now: saving a checkpoint, then going on with them"
            if reason:
                stopping = True
                self.run.say(reason)
                self.board.ask_stop.remote()
        self._read()
        if self.error is not None and len(self.failures) < len(self.joined) - 1:
            time.sleep(1.0)  # the last words of those who saw it
            self._read()
        lasting = [error for _, error in self.failures if not isinstance(error, RankFailed)]
        if lasting:
            raise lasting[0]
        if self.error is None and self.outcome is not None:
            result = self.outcome
            self.run.newest = result["checkpoint"] or self.run.newest
            return Outcome(**result), None
        return None, self._fault()

    def _fit(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.config import LoggingConfig

        from launch.group import Trainer

        try:
            # Ray Train notes some bookkeeping here; nothing of the run depends on it.
            with tempfile.TemporaryDirectory(prefix="sivae-ray-", ignore_cleanup_errors=True) as notes:
                trainer = Trainer(
                    work,
                    janitor=self.run.janitor,
                    train_loop_config={"board": self.board},
                    scaling_config=ScalingConfig(
                        num_workers=self.number, use_gpu=self.run.need.gpus > 0, resources_per_worker=self.run.need.resources,
                        placement_strategy=self.run.need.placement.upper(),
                    ),
                    run_config=RunConfig(
                        name=os.path.basename(self.run.settings.run.directory.rstrip("/")) or "run", storage_path=notes,
                        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                        logging_config=LoggingConfig(log_level="CRITICAL"),
                    ),
                )  # fmt: skip
                self.outcome = trainer.fit().return_value
        except BaseException as error:  # noqa: BLE001 (judged by the thread that waits)
            self.error = error
        finally:
            self.done.set()

    def _read(self) -> None:
        """Take what the workers left on the board; say who is where as soon as all have come."""
        import ray

        try:
            news: News = ray.get(self.board.news.remote(), timeout=30)
        except ray.exceptions.RayError:
            return
        missing = len(self.joined) < self.number
        self.joined |= news.joined
        if missing and len(self.joined) == self.number:
            self.run.say(placement_table(self.joined))
        self.failures += news.failures
        for line in news.lines:
            self.run.say(line)
        for metrics, checkpoint in news.reports:
            self.run.newest = checkpoint or self.run.newest
            self.run.on_report(metrics, checkpoint)
            if self.run.lockstep:
                self.board.deal_with.remote(1)

    def _leaving(self) -> list[dict[str, Any]]:
        """Places of workers whose node is about to be taken away."""
        leaving = cluster.draining() if self.joined else ()
        return [place for place in self.joined.values() if place["node_id"] in leaving]

    def _fault(self) -> str:
        """What ended the attempt, as a clause: the ones that died without a word, not those whose connection to them broke."""
        from ray.exceptions import RayActorError

        said = {rank: error for rank, error in self.failures}
        ended = getattr(self.error, "worker_failures", {})
        died = {rank for rank, error in ended.items() if isinstance(error, RayActorError)} & set(self.joined)
        lost = sorted(died or set(self.joined) - set(said))
        if lost:
            nodes = sorted({self.joined[rank]["node"] for rank in lost})
            which = (
                f"rank {lost[0]} on node {nodes[0]} was"
                if len(lost) == 1
                else f"ranks {', '.join(map(str, lost))} on nodes {', '.join(nodes)} were"
            )
            return f"{which} lost"
        if said:
            rank = min(said)
            return f"rank {rank} ended with {said[rank]}"
        cause = getattr(self.error, "controller_failure", None) or self.error
        # Ray's own text of it is the traceback of another process, with colours.
        lines = re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).strip().splitlines() or [type(cause).__name__]
        return f"the workers could not be started ({' '.join(lines[-1].split())[:300]})"


def work(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a worker runs. Imported there alone: a driver needs no DeepSpeed."""
    with startup.importing():
        from launch import worker

    return worker.run(config)


def placement_table(joined: dict[int, dict[str, Any]]) -> str:
    """Which node has which ranks, one line a node."""
    by_node: dict[tuple[str, str], list[int]] = {}
    for rank in sorted(joined):
        by_node.setdefault((joined[rank]["node"], joined[rank]["ip"]), []).append(rank)
    lines = []
    for (node, ip), ranks in by_node.items():
        gpus = [gpu for rank in ranks for gpu in joined[rank]["gpus"]]
        on = f" on GPUs {', '.join(gpus)}" if gpus else ""
        pids = ", ".join(str(joined[rank]["pid"]) for rank in ranks)
        lines.append(
            f"node {node} ({ip}): ranks {', '.join(map(str, ranks))}{on}, processes {pids}, caches in {joined[ranks[0]]['cache']}"
        )
    return f"{len(joined)} workers on {len(by_node)} nodes\n" + "\n".join(f"  {line}" for line in lines)
