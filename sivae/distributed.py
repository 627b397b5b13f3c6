"""The process group: who this process is, which device it uses, and the few collectives the trainer needs.

Works alone, under torchrun, under Slurm through torchrun, and inside a Ray worker that has already initialised torch.distributed.
NCCL moves CUDA tensors; a gloo group beside it carries the flags that only the host looks at, so that agreeing
on a stop never waits for the GPU.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from sivae.errors import RankFailed, UserError

joined = False  # whether this process ever had a group, and must end by `end_process`


@dataclass(frozen=True)
class Group:
    """`rank` of `world_size` processes, each with one `device`."""

    rank: int
    world_size: int
    device: torch.device
    control: Any
    """A gloo group for host-side agreement."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, stop: bool, failure: UserError | None = None) -> bool:
        """Whether any rank wants to stop. A failure of one rank is raised on all. Host only: no device synchronisation."""
        return self.any(stop, failure=failure)[0]

    def any(self, *flags: bool, failure: UserError | None = None) -> tuple[bool, ...]:
        """For each flag whether any rank raises it; `failure` as in `agree`."""
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return flags
        raised = torch.tensor([failure is not None, *flags], dtype=torch.uint8)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.control)
        failed, *found = map(bool, raised.tolist())
        if failed:
            failures: list[UserError | None] = [None] * self.world_size
            dist.all_gather_object(failures, failure and _shared(failure), group=self.control)
            raise next(found for found in failures if found)
        return tuple(found)

    def together(self, work: Callable[[], Any]) -> Any:
        """Run `work`, in which no rank waits for another, on every rank. A UserError of one is raised on all, to be told once."""
        result, failure = None, None
        try:
            result = work()
        except UserError as error:
            failure = error
        self.agree(False, failure)
        return result

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable object, on every rank (the group's own processes trust each other)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def patient(self) -> Group:
        """The same ranks, which wait for rank 0 up to a day: for what it computes alone. A collective."""
        if self.world_size == 1:
            return self
        return replace(self, control=dist.new_group(backend="gloo", timeout=timedelta(days=1)))

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and give its result to all. What it raises is raised on every rank: nobody waits for a dead rank 0."""
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as caught:  # noqa: BLE001 (passed on to every rank below)
                error = caught
        if self.world_size == 1:
            if error is not None:
                raise error
            return result
        result, told = self.broadcast_object((result, error and _shared(error)))
        if error is not None:
            raise error
        if told is not None:
            raise told
        return result

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the ranks of a device tensor."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks of a device tensor, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def max(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def send_to_main(self, rows: Tensor, rank: int, count: int) -> Tensor | None:
        """On rank 0 the `count` rows that `rank` holds, in the host's memory; None elsewhere. Every rank calls it."""
        if self.rank == rank == 0:
            return rows.cpu()
        received = rows.new_empty(count, *rows.shape[1:], device="cpu") if self.is_main else None
        if self.is_main:
            dist.recv(received, src=rank, group=self.control)
        elif self.rank == rank:
            dist.send(rows.cpu(), dst=0, group=self.control)
        return received

    def broadcast_from_main(self, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that rank 0 reads, on every rank's CPU; an error of the reading is raised on all."""
        tensors: dict[str, Tensor] | None = None

        def keep() -> None:
            nonlocal tensors
            tensors = read()

        self.on_main(keep)
        return self.broadcast(tensors)

    def broadcast(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors, by name, on every rank's CPU."""
        if self.world_size == 1:
            return tensors
        shapes = self.broadcast_object(
            {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()} if self.is_main else None
        )
        result = {}
        for name, (shape, dtype) in shapes.items():
            tensor = (
                tensors[name].to(self.device) if self.is_main else torch.empty(shape, dtype=dtype, device=self.device)
            )
            dist.broadcast(tensor, src=0)
            result[name] = tensor.cpu()
        return result


def _shared(error: Exception) -> UserError:
    """What other ranks raise for it: the same, or RankFailed."""
    if not isinstance(error, UserError):
        return RankFailed(f"rank 0 failed: {error!r}", shared=True)
    return type(error)(str(error), shared=True)


def pick_device(choice: str) -> torch.device:
    """`auto`, `cpu` or `cuda`; under several processes on a node each takes the GPU of its local rank."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "cuda is asked for (by --device, or run.device of a config), but torch sees no GPU; `sivae doctor` says more, cpu"
            " goes without"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this process is shown {torch.cuda.device_count()};"
            " start as many processes per node as it has GPUs, and show each of them all (CUDA_VISIBLE_DEVICES, or"
            " Slurm's --gpus-per-node, not --gpus-per-task)"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def join(device_choice: str = "auto", timeout_sec: float = 1800.0) -> Iterator[Group]:
    """Join the process group that the launcher describes, or make a group of one.

    A group of several is left in the end, but not after an error: leaving may wait for ranks that no longer come. A group of
    one stays until the process ends, because DeepSpeed holds on to the first one it meets: so a notebook can train twice.
    """
    global joined
    device = pick_device(device_choice)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joined = True
    ours = not dist.is_initialized()
    timeout = timedelta(seconds=timeout_sec)
    if ours:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            # A store in memory: a single process opens no port.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            atexit.register(leave)
    control = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None
    yield Group(dist.get_rank(), dist.get_world_size(), device, control)
    if control is not None:
        dist.barrier(group=control)  # a rank that leaves early breaks the others' last collective
        if ours:
            leave()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Do what Python does when a process ends, up to the taking apart of its modules.

    DeepSpeed holds on to process groups, so gloo's threads live to the end. One that lets go of a collective's tensors has to
    wait for Python, and Python ends whoever still waits for it then; in the midst of C++ that aborts the process, whose work is
    done and saved (SIGABRT, "terminate called without an active exception", once in some hundred runs on a busy machine).
    """
    with suppress(KeyboardInterrupt):
        threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError as error:
            code = code or 1
            if not isinstance(error, BrokenPipeError):  # of which the reader knows
                with suppress(OSError):
                    print(f"sivae: error: cannot write {stream.name}: {error.strerror}", file=sys.stderr, flush=True)
    ctypes.CDLL(None).fflush(None)  # what libraries print themselves
    os._exit(code)
