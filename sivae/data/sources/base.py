"""What every source of images is: a sequence of samples in one order on every machine, cheap to hand to another process."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sivae.errors import UserError

MAX_UNREADABLE = 100  # images tried for the number of channels, before their source counts as unreadable


class BadImage(UserError):
    """One image cannot be read, or is not what it should be; the message names it. Packing may skip it."""


@dataclass(frozen=True)
class Sample:
    """One image of a source."""

    name: str  # as errors name it: its path in the source
    pixels: np.ndarray  # uint8 [H, W, 1 or 3], upright, without alpha
    label: int | None = None
    # The source's own PNG, where it is plain (8-bit grey or RGB, nothing that a decoder could see
    # otherwise) and decodes to exactly `pixels`: it can be copied instead of being encoded again.
    encoded: bytes | None = None
    metadata: dict | None = None  # attribution of this image


class Source(ABC):
    """Images [0, len), read one by one; the order is the same on every machine.

    Pickling one is cheap, and files are opened by the process that reads them: no handle, connection or
    event loop is inherited.
    """

    description: str  # short, without paths of the machine
    licence: str = ""  # licence and attribution of the whole; "" when unknown
    num_classes: int | None = None  # None: no labels
    # The official split: name ("train", "validation", "test", ...) -> its sample numbers in order,
    # disjoint. None when the source has none.
    splits: dict[str, np.ndarray | range] | None = None
    fingerprint: str  # see `fingerprint` below
    names: list[str] | None = None  # of the samples, where they have lasting ones: a random split is drawn by them

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Sample:
        """Sample i. Raises BadImage when it is missing or damaged, UserError when its storage does not answer."""

    @cached_property
    def num_channels(self) -> int:
        """1 or 3: of the first image that can be read. Raises what is wrong with the first when none can."""
        first_error = None
        for i in range(min(len(self), MAX_UNREADABLE)):
            try:
                return self[i].pixels.shape[2]
            except BadImage as error:
                first_error = first_error or error
        raise first_error


def fingerprint(*parts) -> str:
    """sha256 over what identifies a source's content cheaply, as JSON: names, sizes, times, options."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()


def wanted_labels(labels: bool | None, found, where: str, how: str):
    """`found` (None: the source has none) as asked for; raises UserError when asked for what is not there.

    labels: None takes what there is, True asks for it, False leaves it out. how: what would give labels.
    """
    if labels and found is None:
        raise UserError(f"{where} has no labels; {how}")
    return None if labels is False else found


def consecutive(counts: dict[str, int]) -> dict[str, range]:
    """Split name -> sample numbers, for splits that lie one after the other."""
    splits, start = {}, 0
    for name, count in counts.items():
        splits[name] = range(start, start + count)
        start += count
    return splits


def natural_key(path: str) -> tuple:
    """Sorts a/2.png before a/10.png, and whole folders together."""
    parts = [re.split(r"(\d+)", part.lower()) for part in path.split("/")]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts], path
