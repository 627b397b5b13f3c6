"""Read the tensors of a PyTorch file that also holds objects of unknown classes, without running code of the file.

What the file calls, and of what classes it makes objects, is an ordered dictionary or torch's own function that builds
a tensor; anything else becomes an `Inert` object, which takes whatever the pickle does to it and does nothing. Torch's own
`weights_only` reader refuses such a file as a whole.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch


class Inert:
    """Stands for an object of a class that is not ours to run."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Inert:
        return super().__new__(cls)

    def _nothing(self, *arguments: Any, **keywords: Any) -> None:
        return None

    __init__ = __setstate__ = __setitem__ = append = extend = add = _nothing


class _Unpickler(pickle._Unpickler):
    """Written in Python, like that of `weights_only`: the C one makes a table as long as the largest number that the file gives one
    of its objects, so a single damaged byte would have it take gigabytes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # A function of this file's own: a pickle can set attributes of what it is handed.
            return lambda *arguments: torch._utils._rebuild_tensor_v2(*arguments)
        return Inert


def load(path: str) -> Any:
    """The file's content on the CPU. Raises whatever a damaged file makes the unpickler raise."""

    def read(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()

    reader = SimpleNamespace(Unpickler=_Unpickler, load=read, __name__="pickle")
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
