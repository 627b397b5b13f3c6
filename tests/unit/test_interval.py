"""Proves what is told of the steps between two log lines: each term's mean over the steps that had it, the KL gap and its
warning, and a speed of training alone.

pytest tests/unit/test_interval.py
"""

import pytest
import torch

from sivae import interval
from sivae.distributed import Group
from sivae.interval import GAP_PATIENCE, GapWatch, Interval

ALONE = Group(0, 1, torch.device("cpu"), None)


def test_a_term_is_averaged_over_the_steps_that_had_it():
    """As where the warm-up as a plain VAE ends between two lines."""
    found = Interval(0)
    for terms in ({"rec": 1.0}, {"rec": 2.0}, {"rec": 6.0, "kl_real": 5.0, "kl_fake": 8.0}, {"rec": 3.0, "kl_real": 7.0, "kl_fake": 2.0}):  # fmt: skip
        found.add({name: torch.tensor(value) for name, value in terms.items()})
    assert found.steps == 4
    assert found.means(ALONE) == {"rec": 3.0, "kl_real": 6.0, "kl_fake": 5.0, "kl_gap": -1.0}


def test_pauses_are_no_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interval.time, "monotonic", lambda: now[0])
    found = Interval(1000)
    found.paused_sec, found.data_wait_sec, now[0] = 6.0, 1.0, 110.0
    assert found.speed(1080) == {"speed/images_per_sec": 20.0, "speed/data_wait_fraction": 0.25}


@pytest.mark.parametrize("before", [0, 1])
def test_a_gap_that_stays_negative_is_warned_of_once(before):
    watch = GapWatch()
    for gap in [-1.0] * (GAP_PATIENCE - 1) * before + [0.0] * before:
        assert watch.note(gap) is None, "one that ends in time"
    told = [watch.note(-0.5) for _ in range(3 * GAP_PATIENCE)]
    assert [line is not None for line in told] == [index == GAP_PATIENCE - 1 for index in range(3 * GAP_PATIENCE)]
    assert "objective.beta_neg" in told[GAP_PATIENCE - 1]
