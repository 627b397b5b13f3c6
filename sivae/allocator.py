"""What the C library does with freed memory, for training on a CPU."""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Keep what is freed for the next allocation, for the rest of the process.

    glibc gives large blocks back to the system and asks for them anew, as every step of training does for its activations,
    and the system clears each page before its first use. On other systems, without mallopt, it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
