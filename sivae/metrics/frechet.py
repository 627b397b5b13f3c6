"""Fréchet distance between two sets of feature vectors, each taken as a Gaussian.

Source: Heusel et al., arXiv 1706.08500, equation 6 (there on Inception features, which makes it FID; on other features,
such as pixels, it is not FID and must not be called so). Differs from the usual code: the trace of the matrix square root is
computed from eigenvalues of a symmetric product, which stays real for singular covariances; and the moments come from sums
in float64, so that batches and ranks can be added up in any order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Moments = tuple[np.ndarray, np.ndarray]


class MomentSums:
    """Count, sum [D] and sum of products [D, D] of feature vectors, float64 on `device`: all that the moments need.

    Memory is 8 D^2 bytes however many vectors are added. Sums over parts are added with `tensors`.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> MomentSums:
        """From what `tensors` gave."""
        sums = cls(0)
        sums.count, sums.total, sums.products = (tensors[name].double() for name in ("count", "total", "products"))
        return sums

    def add(self, features: Tensor) -> None:
        """[B, D] of any float type."""
        features = features.to(self.total.dtype)
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.products.addmm_(features.T, features)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name; those of two sets, added, are those of their union."""
        return {"count": self.count, "total": self.total, "products": self.products}

    def moments(self) -> Moments:
        """Mean [D] and unbiased covariance [D, D], float64. Raises ValueError for fewer than 2 vectors or NaN."""
        count, total, products = (value.cpu().numpy() for value in (self.count, self.total, self.products))
        if count < 2:
            raise ValueError(f"moments need at least 2 feature vectors, not {int(count)}")
        if not np.isfinite(products).all():
            raise ValueError("features hold NaN or infinity")
        mean = total / count
        return mean, (products - count * np.outer(mean, mean)) / (count - 1)


def moments(features: np.ndarray) -> Moments:
    """[N, D] -> mean [D] and unbiased covariance [D, D], float64. Raises ValueError for fewer than 2 rows or NaN."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"moments need at least 2 feature vectors [N, D], not an array of shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two (mean, covariance) pairs."""
    (mean1, cov1), (mean2, cov2) = first, second
    if mean1.shape != mean2.shape:
        raise ValueError(f"the sets have features of different sizes, {mean1.shape[0]} and {mean2.shape[0]}")
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    # tr (C1 C2)^(1/2) = tr (C1^(1/2) C2 C1^(1/2))^(1/2), and the latter is symmetric.
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_root)
