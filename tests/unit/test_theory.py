"""The exact updates of encoder and decoder end at the minimizer of KL(p_data || p) + gamma H(p), solved directly, and no
longer do where the paper's condition fails.

    pytest tests/unit/test_theory.py
"""

import numpy as np
import pytest

from sivae import theory

PRIOR = np.array([0.5, 0.3, 0.2])
DATA = {
    "falling": np.array([0.40, 0.25, 0.15, 0.10, 0.06, 0.04]),
    "two modes": np.array([0.02, 0.20, 0.26, 0.03, 0.05, 0.24, 0.18, 0.02]),
    "rough": np.random.default_rng(0).dirichlet(np.full(10, 2.0)),
}


def start(size: int, seed: int = 1) -> np.ndarray:
    return 0.5 * np.random.default_rng(seed).dirichlet(np.ones(size), len(PRIOR)) + 0.5 / size


def total_variation(p, other) -> float:
    return 0.5 * abs(p - other).sum()


def ends(p_data, gamma, alpha=2.0, rounds=30):
    return theory.iterate(
        p_data, PRIOR, start(len(p_data)), gamma, lambda p: theory.soft_elbo(p_data, p, alpha), rounds
    )


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("name", DATA)
def test_the_updates_end_at_the_minimizer(name, gamma):
    p_data = DATA[name]
    best = theory.minimizer(p_data, gamma)
    path = ends(p_data, gamma)
    assert theory.holds(p_data, best, 2.0).all()
    assert total_variation(path[0], best) > 0.1  # there was something to converge
    assert total_variation(path[-1], best) < 1e-3
    assert total_variation(p_data, best) > 0.01  # gamma does something: the data would not pass


@pytest.mark.parametrize("name", DATA)
def test_without_entropy_the_end_is_the_data(name):
    assert total_variation(ends(DATA[name], 0.0)[-1], DATA[name]) < 1e-6
    assert np.array_equal(theory.minimizer(DATA[name], 0.0), DATA[name])


@pytest.mark.parametrize("gamma", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("name", DATA)
def test_nothing_is_below_the_minimizer(name, gamma):
    p_data = DATA[name]
    best = theory.minimizer(p_data, gamma)
    least = theory.divergence(p_data, best, gamma)
    assert best.sum() == pytest.approx(1, abs=1e-9)
    generator = np.random.default_rng(0)
    for concentration in (0.3, 1.0, 30.0):
        for p in generator.dirichlet(1e-3 + concentration * len(p_data) * best, 300):
            assert theory.divergence(p_data, np.maximum(p, 1e-12), gamma) >= least - 1e-9


def test_by_hand():
    p_data, p = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    kl, entropy = 0.5 * np.log(4 / 3), -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert theory.divergence(p_data, p, 0.7) == pytest.approx(kl + 0.7 * entropy)
    # 3/4 squared is more than 1/2, so that the second ELBO is cut, to log of (1/2) / (3/4).
    assert theory.soft_elbo(p_data, p, 1.0) == pytest.approx([np.log(0.25), np.log(2 / 3)])
    assert theory.holds(p_data, p, 1.0).tolist() == [True, False]
    assert theory.holds(p_data, p, 2.0).tolist() == [True, True]
    assert theory.hinge_elbo(p_data, p, 4.0) == pytest.approx([np.log(0.25), -4])


def test_the_encoder_has_the_elbo_it_wants():
    d, p_data = start(8), DATA["two modes"]
    p = PRIOR @ d
    right = theory.best_encoder(PRIOR, d, np.log(p))
    assert right == pytest.approx(theory.posterior(PRIOR, d))
    assert theory.elbo(PRIOR, right, d) == pytest.approx(np.log(p))
    wanted = theory.soft_elbo(p_data, p, 0.5)
    assert (wanted < np.log(p) - 0.1).any()  # some x for which the posterior would be too high
    found = theory.elbo(PRIOR, theory.best_encoder(PRIOR, d, wanted), d)
    lowest = theory.elbo(PRIOR, np.eye(3)[theory.posterior(PRIOR, d).argmin(1)], d)
    assert found == pytest.approx(np.maximum(wanted, lowest), abs=1e-6)


def test_each_of_the_encoders_gains_nothing_by_another_elbo():
    p_data, p, margin = DATA["rough"], PRIOR @ start(10), 4.0
    tries = np.log(p) - np.linspace(0, 6, 600)[:, None]
    soft = p_data * tries - p * np.exp(2.0 * tries) / 2.0
    best = theory.soft_elbo(p_data, p, 2.0)
    assert (p_data * best - p * np.exp(2.0 * best) / 2.0 >= soft.max(0) - 1e-12).all()
    hinge = p_data * tries - p * np.maximum(0, margin + tries)
    best = theory.hinge_elbo(p_data, p, margin)
    assert (p_data * best - p * np.maximum(0, margin + best) >= hinge.max(0) - 1e-12).all()


def test_the_decoder_never_does_worse():
    p_data, d = DATA["falling"], start(6)
    q = theory.posterior(PRIOR, start(6, seed=2))

    def value(d):
        return ((p_data + 0.3 * PRIOR @ d) * theory.elbo(PRIOR, q, d)).sum()

    best = theory.best_decoder(p_data, PRIOR, q, d, 0.3)
    assert best.sum(1) == pytest.approx(np.ones(3))
    assert value(best) > value(d) + 0.1
    generator = np.random.default_rng(0)
    for _ in range(300):
        near = best * np.exp(0.05 * generator.standard_normal(best.shape))
        assert value(near / near.sum(1, keepdims=True)) <= value(best) + 1e-9


def test_where_the_condition_fails_the_minimizer_is_no_end():
    p_data = DATA["falling"]
    best = theory.minimizer(p_data, 1.0)
    assert not theory.holds(p_data, best, 2.0).all()
    assert np.mean([total_variation(p, best) for p in ends(p_data, 1.0)[-10:]]) > 0.01
    # A larger alpha makes it hold again.
    assert theory.holds(p_data, best, 8.0).all()
    assert total_variation(ends(p_data, 1.0, alpha=8.0)[-1], best) < 1e-3


def test_the_hinge_does_not_settle():
    p_data = DATA["falling"]
    best = theory.minimizer(p_data, 0.3)
    path = theory.iterate(p_data, PRIOR, start(6), 0.3, lambda p: theory.hinge_elbo(p_data, p, 4.0), 20)
    assert np.mean([total_variation(p, best) for p in path[-10:]]) > 0.05
    assert max(total_variation(a, b) for a, b in zip(path[-10:], path[-9:])) > 0.01
