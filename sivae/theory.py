"""What the encoder and the decoder of Soft-IntroVAE converge to, where everything is a table: no networks, no sampling.

Source: Daniel and Tamar, Soft-IntroVAE (arXiv 2012.13253), the analysis of its equilibrium. With W(x; q, d) the ELBO of x and
p_d(x) = sum_z p(z) d(x|z), the encoder q(z|x) and the decoder d(x|z) maximise in turn

    L_E(q, d) = sum_x p_data(x) W(x) - 1/alpha sum_x p_d(x) exp(alpha W(x))
    L_D(q, d) = sum_x p_data(x) W(x) + gamma   sum_x p_d(x) W(x).

docs/theory.md derives what follows from it. Tables: p_data [X], prior [Z], q [X, Z] whose rows sum to 1, d [Z, X] whose rows
sum to 1; float64. Both updates are exact: the encoder's in closed form, the decoder's climbed to its top.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Encoder = Callable[[np.ndarray, np.ndarray], np.ndarray]


def divergence(p_data: np.ndarray, p: np.ndarray, gamma: float) -> float:
    """KL(p_data || p) + gamma H(p) in nats: what p_d minimises at the equilibrium."""
    there = p_data > 0
    with np.errstate(divide="ignore"):
        kl = (p_data[there] * np.log(p_data[there] / p[there])).sum()
    return float(kl - gamma * _xlogy(p, p).sum())


def minimizer(p_data: np.ndarray, gamma: float) -> np.ndarray:
    """The distribution [X] of least `divergence`, solved from its stationarity, for p_data > 0 everywhere.

    At a minimum p_data / p + gamma log p is the same number mu for all x. Each x has two solutions, below and above
    p_data / gamma; the objective is concave above, where not more than one x can be at a minimum.
    """
    if gamma == 0:
        return p_data.copy()

    turn = np.log(p_data / gamma)

    def solve(mu: np.ndarray, upper: int | None) -> np.ndarray:
        """p [M, X] for each mu [M]; `upper` is the x to be above, if one is. In t = log p, p_data exp(-t) + gamma t falls
        before `turn` and rises after it."""
        low, high = np.tile(turn - 800, (len(mu), 1)), np.tile(turn, (len(mu), 1))
        rising = np.arange(len(p_data)) == (-1 if upper is None else upper)
        low[:, rising], high[:, rising] = turn[rising], np.maximum(turn[rising], 0) + 1
        for _ in range(70):
            middle = 0.5 * (low + high)
            too_far = (p_data * np.exp(-middle) + gamma * middle > mu[:, None]) == rising
            low, high = np.where(too_far, low, middle), np.where(too_far, middle, high)
        return np.exp(0.5 * (low + high))

    least = float((gamma + gamma * turn).max())
    found = []
    for upper in (None, *range(len(p_data))):
        # The sum over x need not be monotone in mu when one is above: look for every change of sign.
        grid = least + np.geomspace(1e-9, 1e3, 400)
        excess = np.sign(solve(grid, upper).sum(1) - 1)
        for index in np.flatnonzero(excess[:-1] != excess[1:]):
            low, high = grid[index], grid[index + 1]
            for _ in range(60):
                middle = 0.5 * (low + high)
                same = np.sign(solve(np.array([middle]), upper).sum() - 1) == excess[index]
                low, high = (middle, high) if same else (low, middle)
            found.append(solve(np.array([0.5 * (low + high)]), upper)[0])
    return min(found, key=lambda p: divergence(p_data, p / p.sum(), gamma))


def holds(p_data: np.ndarray, p: np.ndarray, alpha: float) -> np.ndarray:
    """Where p^(alpha + 1) <= p_data, bool [X]: there the encoder gains nothing by leaving the posterior."""
    return p ** (alpha + 1) <= p_data * (1 + 1e-9)


def soft_elbo(p_data: np.ndarray, p: np.ndarray, alpha: float) -> np.ndarray:
    """The ELBO [X] that the best encoder gives to each x: log p, or less where the condition `holds` fails."""
    return np.minimum(np.log(p), np.log(p_data / p) / alpha)


def hinge_elbo(p_data: np.ndarray, p: np.ndarray, margin: float) -> np.ndarray:
    """The same for IntroVAE's hinge on the ELBO, sum_x p_d(x) max(0, margin + W(x)) in place of the exponential: all or
    nothing. Where the decoder makes x more often than the data, its ELBO is pushed to -margin."""
    return np.where(p <= p_data, np.log(p), np.minimum(np.log(p), -margin))


def posterior(prior: np.ndarray, d: np.ndarray) -> np.ndarray:
    """p_d(z|x) [X, Z]."""
    joint = (prior[:, None] * d).T
    return joint / joint.sum(1, keepdims=True)


def elbo(prior: np.ndarray, q: np.ndarray, d: np.ndarray) -> np.ndarray:
    """W [X] = sum_z q(z|x) log(p(z) d(x|z) / q(z|x))."""
    return (q * np.log((prior[:, None] * d).T) - _xlogy(q, q)).sum(1)


def best_encoder(prior: np.ndarray, d: np.ndarray, target: np.ndarray) -> np.ndarray:
    """q [X, Z] whose ELBO is `target` [X], as far as a q has one so low: the posterior, moved towards its least likely z."""
    right = posterior(prior, d)
    worst = np.eye(len(prior))[right.argmin(1)]
    low, high = np.zeros((len(right), 1)), np.ones((len(right), 1))
    reached = elbo(prior, right, d) <= target + 1e-12
    for _ in range(60):
        middle = 0.5 * (low + high)
        too_high = elbo(prior, (1 - middle) * right + middle * worst, d)[:, None] > target[:, None]
        low, high = np.where(too_high, middle, low), np.where(too_high, high, middle)
    moved = (1 - high) * right + high * worst
    return np.where(reached[:, None], right, moved)


def best_decoder(
    p_data: np.ndarray, prior: np.ndarray, q: np.ndarray, d: np.ndarray, gamma: float, steps: int = 200
) -> np.ndarray:
    """d [Z, X] that maximises L_D for this q, climbed from `d` by multiplicative steps that never lower it."""

    def value(d: np.ndarray) -> float:
        return float(((p_data + gamma * prior @ d) * elbo(prior, q, d)).sum())

    rate, height = 1.0, value(d)
    for _ in range(steps):
        gradient = (p_data + gamma * prior @ d) * q.T / d + gamma * prior[:, None] * elbo(prior, q, d)
        # Natural coordinates: log d moves by the gradient against its mean, for each z by itself.
        slope = gradient - (gradient * d).sum(1, keepdims=True)
        while True:
            there = d * np.exp(np.clip(rate * slope / prior[:, None], -5, 5))
            there = np.maximum(there / there.sum(1, keepdims=True), 1e-300)
            reached = value(there)
            if reached >= height or rate < 1e-12:
                break
            rate *= 0.5
        done = abs(there - d).max() < 1e-12
        d, height, rate = there, max(reached, height), rate * 1.5
        if done:
            break
    return d


def iterate(
    p_data: np.ndarray, prior: np.ndarray, d: np.ndarray, gamma: float, target: Callable[[np.ndarray], np.ndarray],
    rounds: int,
) -> list[np.ndarray]:  # fmt: skip
    """p_d [X] before the first and after each round: the encoder's exact update, then the decoder's. `target(p_d)` [X] is
    the ELBO that the encoder wants: `soft_elbo` or `hinge_elbo`."""
    found = [prior @ d]
    for _ in range(rounds):
        q = best_encoder(prior, d, target(prior @ d))
        d = best_decoder(p_data, prior, q, d, gamma)
        found.append(prior @ d)
    return found


def _xlogy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, y, 1.0))
