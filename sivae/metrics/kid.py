"""Kernel distance between two sets of feature vectors: the squared maximum mean discrepancy with a polynomial kernel.

Source: Binkowski et al., arXiv 1801.01401, section 4: k(x, y) = (x.y / D + 1)^3, the unbiased estimator, averaged over
subsets. On Inception features it is KID; on others it must not be called so.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUM_SUBSETS, SUBSET_SIZE = 100, 1000


def kernel_distance(
    real: Tensor, fake: Tensor, *, num_subsets: int = NUM_SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over the subsets, of features [N, D] and [M, D].

    Each subset draws `subset_size` vectors of each set without replacement; the deviation is that of one subset's estimate.
    Unbiased, so that sets of one distribution give values around 0, also negative ones. Raises ValueError when a set is
    smaller than a subset or the features differ in size.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"the sets have features of different sizes, {tuple(real.shape[1:])} and {tuple(fake.shape[1:])}"
        )
    if min(len(real), len(fake)) < subset_size:
        raise ValueError(f"subsets of {subset_size} need as many vectors; there are {len(real)} and {len(fake)}")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num_subsets):
        x, y = (features[_subset(rng, len(features), subset_size)].double() for features in (real, fake))
        found.append(float(_unbiased(x, y)))
    return float(np.mean(found)), float(np.std(found))


def _subset(rng: np.random.Generator, count: int, size: int) -> Tensor:
    return torch.from_numpy(rng.choice(count, size, replace=False))


def _unbiased(x: Tensor, y: Tensor) -> Tensor:
    """The estimator of one pair of subsets [m, D]; the diagonals, a vector with itself, are left out."""
    size = len(x)
    within = sum(kernel.sum() - kernel.diagonal().sum() for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (size * (size - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # many times faster than a power
