"""Which sample of a source goes into which split of a set."""

import hashlib
import re

import numpy as np

from sivae.data.sources.base import Source
from sivae.errors import UserError

KNOWN = (
    "give `none`, ranges in the source's order (train=0:60000,validation=60000:), or shares of it (validation=10%, "
    "the rest is train)"
)


def assign(source: Source, splits: str | None) -> dict[str, np.ndarray]:
    """Split -> the numbers of its samples in the source, int64, in the order they are packed in. Each has some.

    splits: None takes the source's own, or `train` for all; "none" puts all into `train`; "NAME=FIRST:STOP,..."
    are ranges, what is in none of them is left out; "NAME=10%,..." is that share of the samples, drawn by a
    hash of each one's name (of its number, in a source without names), so that a sample stays where it is when
    others are added; the rest is `train`. Raises UserError on anything else, on overlaps and on empty splits.
    """
    if splits is None and source.splits is not None:
        return {name: np.asarray(numbers, dtype=np.int64) for name, numbers in source.splits.items() if len(numbers)}
    if splits in (None, "none"):
        return {"train": np.arange(len(source))}
    parts = {}
    for part in splits.split(","):
        name, _, share = part.strip().partition("=")
        if not re.fullmatch(r"[\w-]{1,100}", name, re.ASCII) or name == "all" or name in parts:
            raise UserError(
                f"splits {splits!r}: {name!r} is {'there twice' if name in parts else 'no name for a split'}; {KNOWN}"
            )
        parts[name] = share
    if all(re.fullmatch(r"\d*:\d*", share, re.ASCII) for share in parts.values()):
        return _ranges(parts, len(source), splits)
    if all(re.fullmatch(r"\d+(\.\d+)?%", share, re.ASCII) for share in parts.values()):
        return _shares(parts, source, splits)
    raise UserError(f"splits {splits!r} cannot be read; {KNOWN}")


def _ranges(parts: dict[str, str], count: int, splits: str) -> dict[str, np.ndarray]:
    found, owner = {}, np.full(count, -1)
    for number, (name, share) in enumerate(parts.items()):
        first, _, stop = share.partition(":")
        first, stop = int(first or 0), int(stop) if stop else count
        if not first < stop <= count:
            raise UserError(
                f"splits {splits!r}: {name} must be a range in 0:{count}, which the source has, with a sample"
            )
        taken = owner[first:stop]
        if taken.max() >= 0:
            raise UserError(
                f"splits {splits!r}: {name} overlaps {list(parts)[taken.max()]}; a sample is in one split only"
            )
        taken[:] = number
        found[name] = np.arange(first, stop)
    return found


def _shares(parts: dict[str, str], source: Source, splits: str) -> dict[str, np.ndarray]:
    shares = [float(share[:-1]) / 100 for share in parts.values()]
    if "train" in parts or not 0 < sum(shares) < 1 or not all(shares):
        raise UserError(
            f"splits {splits!r}: train takes what the others leave, which must be shares above 0% that leave something"
        )
    names = source.names or range(len(source))
    position = np.array([_uniform(str(name)) for name in names])
    split = np.searchsorted(np.cumsum(shares), position, side="right")
    found = {"train": np.flatnonzero(split == len(parts))}
    found |= {name: np.flatnonzero(split == i) for i, name in enumerate(parts)}
    for name, numbers in found.items():
        if not len(numbers):
            raise UserError(f"splits {splits!r}: no sample of {len(source)} falls into {name}; give ranges instead")
    return found


def _uniform(name: str) -> float:
    """A number in [0, 1) that the name alone decides."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, key=b"sivae split").digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
