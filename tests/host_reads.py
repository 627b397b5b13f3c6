"""Where a tensor's value goes to Python: on a GPU the host would wait there until the device has done all that was asked of it.

On a machine without a GPU nothing waits, so this watches what is called. A copy to the host is seen by the name of the method:
on a CPU `.cpu()` copies nothing. `.to` counts with "cpu" in so many words, for a batch comes onto the device by `.to(device)`.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# item, bool, float, int, if, and f"{}"; comparisons to a Python bool; results whose size depends on values.
OPERATORS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim")
METHODS = ("cpu", "numpy", "tolist", "__array__", "__repr__")


class HostReads:
    """`with HostReads() as reads:` counts what goes to Python, by name, but inside `with reads.paused():`."""

    def __init__(self):
        self.found: Counter[str] = Counter()
        self._counting = True

    def note(self, name: str) -> None:
        if self._counting:
            self.found[name] += 1

    @contextmanager
    def paused(self):
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def __enter__(self) -> "HostReads":
        self._stack = ExitStack()
        self._stack.enter_context(_Methods(self))
        self._stack.enter_context(_Operators(self))
        from deepspeed.accelerator import get_accelerator  # looks for devices as it is imported

        # DeepSpeed's name for torch.cuda.synchronize; on a CPU it does nothing.
        accelerator = get_accelerator()
        self._stack.enter_context(mock.patch.object(accelerator, "synchronize", lambda *_: self.note("synchronize")))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        masked = name == "index" and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        if name in OPERATORS or masked:
            self.reads.note(name)
        return function(*arguments, **(keywords or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        name, keywords = getattr(function, "__name__", ""), keywords or {}
        # DeepSpeed names every device so, also the one where a tensor already is.
        ours = "deepspeed" not in sys._getframe(1).f_code.co_filename
        to_host = ours and function is torch.Tensor.to and "cpu" in (*arguments[1:2], keywords.get("device"))
        if (name in METHODS and arguments and isinstance(arguments[0], torch.Tensor)) or to_host:
            self.reads.note(name)
        return function(*arguments, **keywords)
