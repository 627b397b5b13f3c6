"""The Fréchet distance equals its closed forms.

pytest tests/unit/test_frechet.py
"""

import numpy as np
import pytest
import scipy.linalg

from sivae.metrics.frechet import frechet_distance, moments


def test_of_diagonal_gaussians():
    """Without correlations it is a sum over axes: (m1 - m2)^2 + (s1 - s2)^2."""
    first, second = (np.array([0.0, 1.0]), np.diag([4.0, 9.0])), (np.array([3.0, 1.0]), np.diag([1.0, 16.0]))
    assert frechet_distance(first, second) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)


def test_equals_the_matrix_square_root():
    rng = np.random.default_rng(0)
    first, second = moments(rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))), moments(rng.normal(size=(150, 6)) + 1)
    root = scipy.linalg.sqrtm(first[1] @ second[1]).real
    expected = ((first[0] - second[0]) ** 2).sum() + np.trace(first[1] + second[1] - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_of_a_set_to_itself_is_zero_even_when_singular():
    features = np.random.default_rng(0).normal(size=(20, 50))  # fewer rows than columns
    # Square roots of eigenvalues that are zero to rounding leave about sqrt(1e-16) each.
    assert frechet_distance(moments(features), moments(features)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("features", [np.zeros((1, 3)), np.zeros(3), np.full((5, 2), np.nan)])
def test_bad_features_are_refused(features):
    with pytest.raises(ValueError):
        moments(features)
