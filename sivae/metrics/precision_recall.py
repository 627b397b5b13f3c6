"""How much of the samples is like real images, and how much of the real images the samples cover.

Sources: Kynkäänniemi et al., arXiv 1904.06991 (precision and recall, k = 3); Naeem et al., arXiv 2002.09797 (density and
coverage, k = 5). Both take the balls around the points of a set, each as large as the distance to its k-th neighbour there,
for the set's manifold. Distances are Euclidean, in float64, in blocks of rows of at most BLOCK_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2**28  # of distances, which are there twice at most
PR_NEIGHBOURS, DC_NEIGHBOURS = 3, 5


def precision_recall(real: Tensor, fake: Tensor, k: int = PR_NEIGHBOURS) -> tuple[float, float]:
    """Shares of the fakes in a real ball, and of the reals in a fake ball; features [N, D] and [M, D]."""
    return _share_covered(fake, real, k), _share_covered(real, fake, k)


def density_coverage(real: Tensor, fake: Tensor, k: int = DC_NEIGHBOURS) -> tuple[float, float]:
    """Density: real balls around a fake, on average, over k (it can exceed 1). Coverage: share of real balls with a fake."""
    _check(real, fake, k)
    radii = neighbour_distances(real, k)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, distances in _blocks(fake, real):
        within = distances <= radii
        inside += int(within.sum())
        covered |= within.any(dim=0)
    return inside / (k * len(fake)), covered.double().mean().item()


def neighbour_distances(features: Tensor, k: int) -> Tensor:
    """Squared distance of each vector of [N, D] to its k-th nearest other one, float64 [N]."""
    found = []
    for first, distances in _blocks(features, features):
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, first + rows] = torch.inf  # not itself
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _share_covered(points: Tensor, manifold: Tensor, k: int) -> float:
    _check(manifold, points, k)
    radii = neighbour_distances(manifold, k)
    return sum(int((distances <= radii).any(dim=1).sum()) for _, distances in _blocks(points, manifold)) / len(points)


def _blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, squared distances [rows of a block, N]), float64."""
    columns = columns.double()
    norms = columns.square().sum(dim=1)
    count = max(1, BLOCK_BYTES // (8 * len(columns)))
    for first in range(0, len(rows), count):
        block = rows[first : first + count].double()
        # |a - b|^2 without the differences, which would take D times the memory; rounding can make it negative.
        squares = torch.addmm(norms, block, columns.T, alpha=-2).add_(block.square().sum(dim=1, keepdim=True))
        yield first, squares.clamp_(min=0)


def _check(first: Tensor, second: Tensor, k: int) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"the sets have features of different sizes, {tuple(first.shape[1:])} and {tuple(second.shape[1:])}"
        )
    if len(first) <= k or not len(second):
        raise ValueError(f"{k} neighbours need more than {k} vectors; there are {len(first)} and {len(second)}")
