"""Starting and ending a process that imports torch, without the garbage collector.

While torch and DeepSpeed are imported it goes through all that they have made so far, again and again, and once more when the
process ends: a third of the processor time of a short command. What imports make stays anyway.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a process's own command: no collection meanwhile, and none of what is there afterwards.

    The last collection, when the process ends, is left out as well.
    """
    atexit.register(gc.freeze)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
