"""Figures of models of points in the plane: those of the Soft-IntroVAE paper as published, and the textbook's beside them.

Source: Daniel and Tamar, Soft-IntroVAE (arXiv 2012.13253) and its published code, which the functions named
`published_` equal digit by digit. They are no divergences: both take densities for masses, so that they depend on the size of
the bins, and sum over one axis of the histogram but average over the other; the JSD has the mixture as the first argument
instead of the second. `histogram_kl` and `histogram_jsd` are what the names promise.
"""

from __future__ import annotations

import numpy as np

_FLOOR = 1e-14  # in place of an empty bin's density, inside a logarithm


def published_kl(real: np.ndarray, fake: np.ndarray, limit: float, num_bins: int = 100) -> float:
    """Published "KL" of two sets of points [N, 2] on a grid over [-limit, limit]^2; points outside do not count."""
    p, q = (_histogram(points, limit, num_bins, density=True) for points in (real, fake))
    return _kl_sum(p, q + _FLOOR) / num_bins


def published_jsd(real: np.ndarray, fake: np.ndarray, limit: float, num_bins: int = 100) -> float:
    """Published "JSD" of two sets of points [N, 2], as `published_kl`."""
    p, q = (_histogram(points, limit, num_bins, density=True) for points in (real, fake))
    middle = 0.5 * (p + q)
    return 0.5 * (_kl_sum(middle, p + _FLOOR) + _kl_sum(middle, q + _FLOOR)) / num_bins


def grid_normalized_elbo(grid: np.ndarray, points: np.ndarray) -> float:
    """gnELBO of negative ELBOs: their mean over real points [N], over the sum of those of a grid [G] and the points.

    Published with beta_rec = beta_kl = 1, the encoder's mean for z, a grid of 1024 x 1024 on the square and 100 batches of
    128 points. Lower is better: the model rates real points as likelier than the rest of the square.
    """
    grid, points = np.asarray(grid, np.float64), np.asarray(points, np.float64)
    return float(points.mean() / (grid.sum() + points.sum()))


def histogram_kl(real: np.ndarray, fake: np.ndarray, limit: float, num_bins: int = 100) -> float:
    """KL(real || fake) in nats of the share of points [N, 2] in each bin; an empty bin of `fake` counts as 1e-14."""
    p, q = (_histogram(points, limit, num_bins, density=False) for points in (real, fake))
    return _kl_sum(p, np.maximum(q, _FLOOR))


def histogram_jsd(real: np.ndarray, fake: np.ndarray, limit: float, num_bins: int = 100) -> float:
    """Jensen-Shannon divergence in nats, from 0 to ln 2, of the share of points [N, 2] in each bin."""
    p, q = (_histogram(points, limit, num_bins, density=False) for points in (real, fake))
    middle = 0.5 * (p + q)
    return 0.5 * (_kl_sum(p, middle) + _kl_sum(q, middle))


def mode_coverage(fake: np.ndarray, centers: np.ndarray, std: float) -> tuple[int, float]:
    """Modes that points [N, 2] cover, and the share of points on a mode: within 3 `std` of its center [M, 2].

    Source: VEEGAN (arXiv 1705.07761). There one point in 2,500 makes a mode covered; here it takes a tenth of a mode's fair
    share of the points that are on modes, so that more points do not mean more modes.
    """
    distances = np.linalg.norm(np.asarray(fake)[:, None] - np.asarray(centers), axis=2)
    nearest, on_mode = distances.argmin(1), distances.min(1) < 3 * std
    counts = np.bincount(nearest[on_mode], minlength=len(centers))
    return int((counts > 0.1 * max(on_mode.sum(), 1) / len(centers)).sum()), float(on_mode.mean())


def _histogram(points: np.ndarray, limit: float, num_bins: int, density: bool) -> np.ndarray:
    """Bins [num_bins, num_bins]; as densities over the points inside, or as shares of all that are inside."""
    points = np.asarray(points)
    bounds = [[-limit, limit], [-limit, limit]]
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=num_bins, range=bounds)
    if not counts.sum():
        raise ValueError(f"none of the {len(points)} points lies within {limit:g} of the origin")
    shares = counts / counts.sum()
    return shares / (2 * limit / num_bins) ** 2 if density else shares


def _kl_sum(p: np.ndarray, q: np.ndarray) -> float:
    """Sum of p log(p / q), where p is not zero."""
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())
