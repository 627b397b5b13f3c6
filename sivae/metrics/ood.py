"""How well a score tells outliers from inliers; a higher score means more of an outlier.

AUROC and AUPR (the average precision) take outliers as the positive class. FPR at 95% TPR follows Liang et al., arXiv
1706.02690: of the outliers, the share that is taken for inliers at the threshold that 95% of the inliers keep below. The
intervals are percentiles of a bootstrap (Efron 1979) that draws inliers and outliers anew, each from its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEPT = 0.95  # share of inliers that the threshold keeps
NUM_RESAMPLES, CONFIDENCE = 1000, 0.95


@dataclass(frozen=True)
class Separation:
    """Each figure with the ends of its confidence interval."""

    auroc: tuple[float, float, float]
    aupr: tuple[float, float, float]
    fpr_at_95_tpr: tuple[float, float, float]


def separation(inliers: np.ndarray, outliers: np.ndarray, seed: int = 0) -> Separation:
    """Of scores [N] and [M]. Raises ValueError for an empty set or a score that is not finite."""
    counts = _counts(inliers, outliers)
    found = _figures(*counts)
    rng = np.random.default_rng(seed)
    sizes = [count.sum() for count in counts]
    shares = [count / size for count, size in zip(counts, sizes)]
    again = np.array(
        [_figures(*(rng.multinomial(size, share) for size, share in zip(sizes, shares))) for _ in range(NUM_RESAMPLES)]
    )
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(again, [tail, 100 - tail], axis=0)
    return Separation(*((float(found[i]), float(low[i]), float(high[i])) for i in range(3)))


def auroc(inliers: np.ndarray, outliers: np.ndarray) -> float:
    """Chance that an outlier's score [M] is above an inlier's [N]; ties count half. Raises ValueError as `separation`."""
    return float(_figures(*_counts(inliers, outliers))[0])


def threshold(inliers: np.ndarray, kept: float = KEPT) -> float:
    """The lowest of the scores that at least this share of the inliers does not exceed."""
    ordered = np.sort(inliers)
    return float(ordered[int(np.ceil(kept * len(ordered) - 1e-9)) - 1])


def _counts(inliers: np.ndarray, outliers: np.ndarray) -> list[np.ndarray]:
    """How many of each lie at each value that occurs, in rising order: all figures follow from it, for a resample too."""
    inliers, outliers = (np.asarray(scores, dtype=np.float64) for scores in (inliers, outliers))
    if not inliers.size or not outliers.size:
        raise ValueError(f"there are {inliers.size} inliers and {outliers.size} outliers; both are needed")
    if not (np.isfinite(inliers).all() and np.isfinite(outliers).all()):
        raise ValueError("scores hold NaN or infinity")
    values, where = np.unique(np.concatenate([inliers, outliers]), return_inverse=True)
    return [np.bincount(part, minlength=len(values)) for part in (where[: inliers.size], where[inliers.size :])]


def _figures(inliers: np.ndarray, outliers: np.ndarray) -> tuple[float, float, float]:
    """AUROC, AUPR, FPR at 95% TPR of counts at rising scores. Ties count half in AUROC, and are one step in AUPR."""
    num_inliers, num_outliers = inliers.sum(), outliers.sum()
    below = np.cumsum(inliers)
    auroc = (outliers * (below - inliers / 2)).sum() / (num_inliers * num_outliers)
    caught, wrong = np.cumsum(outliers[::-1]), np.cumsum(inliers[::-1])
    precision = caught / np.maximum(caught + wrong, 1)
    aupr = (precision * outliers[::-1]).sum() / num_outliers
    at = np.searchsorted(below, KEPT * num_inliers - 1e-9)
    return auroc, aupr, np.cumsum(outliers)[at] / num_outliers
