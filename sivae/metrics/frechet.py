"""Fréchet distance between two sets of feature vectors, each taken as a Gaussian.

Source: Heusel et al., arXiv 1706.08500, equation 6 (there on Inception features, which makes it FID; on other features,
such as pixels, it is not FID and must not be called so). Differs from the usual code: the trace of the matrix square root is
computed from eigenvalues of a symmetric product, which stays real for singular covariances.
"""

import numpy as np


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] -> mean [D] and unbiased covariance [D, D], float64. Raises ValueError for fewer than 2 rows or NaN."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"moments need at least 2 feature vectors [N, D], not an array of shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two (mean, covariance) pairs."""
    (mean1, cov1), (mean2, cov2) = first, second
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    # tr (C1 C2)^(1/2) = tr (C1^(1/2) C2 C1^(1/2))^(1/2), and the latter is symmetric.
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_root)
