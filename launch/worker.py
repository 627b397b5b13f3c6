"""What Ray Train runs on every worker: sivae's own training function, told where it is and whom to report to."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from launch.board import Orders
from sivae import checkpoint, distributed, run_directory, signals, trainer
from sivae.config import Config, ConfigError
from sivae.errors import RankFailed, UserError
from sivae.storage import Folder

STOP_POLL_SEC = 0.5
LOCK_WAIT_SEC = 60.0  # workers of an attempt that has just died may live a little longer


def run(config: dict[str, Any]) -> dict[str, Any] | None:
    """One worker's part of a run. `config["board"]` is the driver's board; the rest comes from there.

    Returns the outcome, or None when a lasting error was left on the board: every rank found it, so nobody needs to be torn
    down. Raises what another attempt may mend.
    """
    import ray
    import torch

    board, rank = config["board"], int(os.environ["RANK"])
    orders: Orders = ray.get(board.orders.remote())
    place_caches(orders.cache_dir)
    sys.stderr = Forward(sys.stderr, board, ("sivae: ", "train: ") if rank == 0 else ("sivae: ",))
    ray.get(board.join.remote(rank, _place()))
    done = threading.Event()
    if rank == 0:
        threading.Thread(target=_watch, args=(board, done), daemon=True).start()

    reports = 0

    def report(metrics: dict[str, float], name: str | None) -> None:
        nonlocal reports
        if rank == 0:
            board.report.remote(dict(metrics), name)
            reports += 1
            while orders.lockstep and ray.get(board.dealt_with.remote()) < reports:
                time.sleep(0.05)

    try:
        check_directory(orders)
        result = trainer.train(orders.settings, report)
    except (UserError, ConfigError) as error:
        told = error if isinstance(error, UserError) else UserError(str(error))
        ray.get(board.fail.remote(rank, told))
        if told.shared and not isinstance(told, RankFailed):
            return None
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        sentence = (
            f"rank {rank} ran out of memory ({str(error).split('.')[0]}); lower engine.micro_batch_size (gradients then"
            " accumulate, whatever the number of workers), or raise engine.zero_stage"
        )
        ray.get(board.fail.remote(rank, UserError(sentence)))
        raise
    except Exception as error:
        # Whoever leaves no word at all is the one that was lost.
        told = RankFailed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        ray.get(board.fail.remote(rank, told))
        raise
    finally:
        done.set()
    return {"images_seen": result.images_seen, "interrupted": result.interrupted, "metrics": result.metrics,
            "checkpoint": result.checkpoint, "picture": result.picture}  # fmt: skip


class Forward:
    """A stream that also hands the lines that a person should see to the driver; everything stays in Ray's log files."""

    def __init__(self, stream: Any, board: Any, prefixes: tuple[str, ...]):
        self._stream, self._board, self._prefixes, self._rest = stream, board, prefixes, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.startswith(self._prefixes):
                self._board.tell.remote(line)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def place_caches(cache_dir: str | None) -> None:
    """Caches lie on the node's own disk, never in a home directory that nodes share: packed digits, compiled kernels."""
    home = Path(
        cache_dir or os.environ.get("SIVAE_CACHE") or Path(tempfile.gettempdir()) / f"sivae-cache-{os.getuid()}"
    )
    os.environ["SIVAE_CACHE"] = str(home)
    for name, folder in (("TRITON_CACHE_DIR", "triton"), ("TORCH_EXTENSIONS_DIR", "torch_extensions")):
        os.environ.setdefault(name, str(home / folder))


def check_directory(orders: Orders) -> None:
    """Every node writes into the run directory and sees what the others write, the newest checkpoint among it.

    Without this a run whose directory is on one node's own disk would start anew, in silence, when rank 0 moves.
    """
    settings = orders.settings
    folder = Folder(settings.run.directory, settings.run.storage_options)
    node = socket.gethostname()
    with distributed.join(settings.run.device) as group:
        token = group.broadcast_object(f".launch-{uuid.uuid4().hex}")
        failure = None
        try:
            # One file for each node, as ranks of a node share its disks.
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                folder.write(node.encode(), token, str(group.rank))
        except UserError as error:
            failure = UserError(f"run.directory, on node {node}: {error}")
        group.agree(False, failure)
        try:
            if not folder.exists(token, "0"):
                failure = UserError(
                    f"run.directory: {folder.url} is not the same place on every node (node {node} does not see what"
                    " rank 0 writes); use a shared filesystem or an object store"
                )
            elif orders.newest is not None and orders.newest not in checkpoint.list_names(folder):
                if group.is_main and not _has_newer(folder, orders.newest):
                    failure = UserError(
                        f"run.directory: checkpoint {orders.newest} was saved, but node {node} finds it nowhere in"
                        f" {folder.url}; use a shared filesystem or an object store"
                    )
        except UserError as error:
            failure = error
        group.agree(False, failure)
        group.on_main(lambda: (folder.remove(token), _wait_for_lock(folder, orders.restarted)))


def _has_newer(folder: Folder, name: str) -> bool:
    """A checkpoint may have been pruned since it was told of, or set aside as damaged with one before it left."""
    return any(int(other.partition(".")[0]) >= int(name.partition(".")[0]) for other in checkpoint.list_names(folder))


def _wait_for_lock(folder: Folder, restarted: bool) -> None:
    deadline = time.monotonic() + (LOCK_WAIT_SEC if restarted else 0.0)
    while True:
        try:
            lock = run_directory.lock(folder)
        except UserError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.5)
            continue
        if lock is not None:
            lock.close()
        return


def _watch(board: Any, done: threading.Event) -> None:
    """Hand the driver's wish to stop on to the training loop: it saves at its next step, on all ranks."""
    import ray

    while not done.wait(STOP_POLL_SEC):
        try:
            if ray.get(board.stop_asked.remote()):
                signals.ask()
                return
        except ray.exceptions.RayError:
            return  # the driver is gone, and with it soon this process


def _place() -> dict[str, Any]:
    import ray

    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return {
        "node": socket.gethostname(), "ip": ray.util.get_node_ip_address(), "node_id": context.get_node_id(),
        "pid": os.getpid(), "gpus": [str(gpu) for gpu in gpus], "cache": os.environ["SIVAE_CACHE"],
    }  # fmt: skip


def settings_with(settings: Config, **directories: str) -> Config:
    """Settings with `run.directory` and others replaced."""
    return settings.model_copy(update={"run": settings.run.model_copy(update=directories)})
