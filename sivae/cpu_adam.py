"""DeepSpeed's Adam for the CPU, which `engine.offload_optimizer` needs. It is compiled on first use: minutes, once on a machine.

torch guards the compiling by a file named `lock`, which a process that is killed leaves behind; whoever comes later then waits for
it for ever, in silence. Here a lock of the operating system stands around it, which ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from types import ModuleType

from sivae.errors import UserError

NAME = "cpu_adam"  # of DeepSpeed's builder


def load(deepspeed: ModuleType, tells: bool) -> type:
    """The optimizer's class, compiled. `tells`: say on stderr that this takes time. Raises UserError where it cannot be compiled."""
    from torch.utils.cpp_extension import _get_build_directory

    try:
        folder = Path(_get_build_directory(NAME, verbose=False))
        with _alone(folder):
            if tells and not list(folder.glob("*.so")):
                print("sivae: compiling DeepSpeed's CPU Adam, which takes minutes, once on a machine", file=sys.stderr)
            deepspeed.ops.op_builder.CPUAdamBuilder().load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"engine.offload_optimizer: DeepSpeed's CPU Adam cannot be compiled ({reason}); it needs ninja and a C++ compiler"
        ) from error
    return deepspeed.ops.adam.DeepSpeedCPUAdam


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, and without what one that was killed left of torch's own lock."""
    with open(folder.parent / f"{folder.name}.sivae.lock", "w") as file:
        with suppress(OSError):  # some network filesystems have no locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        left = folder / "lock"
        if left.exists() and not is_open(left):
            left.unlink(missing_ok=True)
        yield


def is_open(path: Path) -> bool:
    """Whether a process of this machine holds the file open: those of other users do not show."""
    wanted = os.path.realpath(path)
    for link in glob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(link) == wanted:
                return True
        except OSError:  # ended meanwhile
            continue
    return False
