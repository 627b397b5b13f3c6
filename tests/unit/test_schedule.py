"""Proves the learning-rate factors and the levels of progressive growing at their boundaries, the half-life of the running average, and that every due date is met
exactly once.

    python -m pytest tests/unit/test_schedule.py
"""

import math
import random
from types import SimpleNamespace

import pytest

from sivae.levels import Levels
from sivae.schedule import due, ema_decay, level_at, lr_factor


def test_constant():
    assert [lr_factor(n, 100, kind="constant") for n in (1, 50, 100, 1000)] == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["constant", "milestones", "cosine"])
def test_warm_up_rises_linearly_from_the_first_step(kind):
    factor = lambda n: lr_factor(n, 1000, kind=kind, warmup_images=100, milestones_images=[500])  # noqa: E731
    assert [factor(n) for n in (1, 25, 50, 99)] == [0.01, 0.25, 0.5, 0.99]
    assert factor(100) == 1.0
    assert factor(1) > 0  # the first step learns something


def test_milestones_fall_in_the_step_after_them():
    factor = lambda n: lr_factor(n, 1000, kind="milestones", milestones_images=[300, 600], gamma=0.1)  # noqa: E731
    # The step that ends at 300 still belongs to the images before the milestone.
    assert [factor(n) for n in (1, 300, 301, 600)] == [1, 1, 0.1, 0.1]
    assert factor(601) == factor(1000) == pytest.approx(0.01)


def test_cosine():
    factor = lambda n: lr_factor(  # noqa: E731
        n, 1000, kind="cosine", warmup_images=100, hold_images=100, final_fraction=0.2
    )
    assert factor(100) == factor(150) == factor(200) == 1.0
    assert factor(201) < 1.0
    assert factor(600) == pytest.approx(0.6)  # half way between 1 and 0.2
    assert factor(400) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(1000) == pytest.approx(0.2) and factor(5000) == pytest.approx(0.2)
    values = [factor(n) for n in range(200, 1001)]
    assert all(a >= b for a, b in zip(values, values[1:]))


def test_cosine_falls_to_zero_by_default_and_survives_a_hold_of_the_whole_run():
    assert lr_factor(1000, 1000, kind="cosine") == pytest.approx(0, abs=1e-12)
    assert lr_factor(1000, 1000, kind="cosine", hold_images=1000) == 1.0


@pytest.mark.parametrize("kind", ["constant", "milestones", "cosine"])
def test_a_factor_lies_in_zero_to_one(kind):
    for n in range(1, 1200, 7):
        factor = lr_factor(n, 1000, kind=kind, warmup_images=150, milestones_images=[200, 800], hold_images=90)
        assert 0 <= factor <= 1


@pytest.mark.parametrize("halflife, batch", [(3000, 16), (1000, 64), (500, 500), (10_000, 32)])
def test_a_weight_has_halved_after_the_half_life(halflife, batch):
    """The shares of all steps of `halflife` images multiply to one half, in whatever batches."""
    product, images = 1.0, 0
    while images < halflife:
        step = min(batch, halflife - images)
        images += step
        product *= ema_decay(images, step, halflife, rampup_ratio=None)
    assert product == pytest.approx(0.5, rel=1e-9)  # a product of at most 313 rounded factors


def test_ramp_up_shortens_the_half_life_early_on():
    # At 1,000 images with a ratio of 0.1 the half-life is 100: a step of 100 halves.
    assert ema_decay(1000, 100, 10_000, 0.1) == pytest.approx(0.5)
    assert ema_decay(100, 100, 10_000, 0.1) == pytest.approx(0.5**10)
    # From 100,000 images on it is the half-life asked for.
    assert ema_decay(100_000, 100, 10_000, 0.1) == ema_decay(500_000, 100, 10_000, 0.1) == 0.5 ** (1 / 100)


def test_no_half_life_is_no_average():
    assert ema_decay(1000, 32, 0, None) == ema_decay(1000, 32, 0, 0.05) == 0.0


def test_due_at_every_multiple_once():
    for batch in (1, 7, 32, 100):
        ends = range(batch, 3000, batch)
        hits = [end for end in ends if due(end, batch, 100)]
        # The first step that reaches each multiple.
        expected = [next(end for end in ends if end >= multiple) for multiple in range(100, ends[-1] + 1, 100)]
        assert hits == sorted(set(expected))


def test_due_when_a_step_is_longer_than_the_interval():
    assert all(due(end, 250, 100) for end in range(250, 2000, 250))


def test_due_at_the_boundary():
    assert due(100, 10, 100) and not due(90, 10, 100) and not due(110, 10, 100)
    assert not due(99, 99, 100) and due(101, 2, 100)


LEVELS = [(100, 0), (200, 100), (None, 50)]


@pytest.mark.parametrize(
    "images, level, blend",
    [
        (0, 0, 1.0), (99, 0, 1.0),
        (100, 1, 0.0), (125, 1, 0.1464466), (150, 1, 0.5), (175, 1, 0.8535534), (200, 1, 1.0), (299, 1, 1.0),
        (300, 2, 0.0), (310, 2, 0.0954915), (350, 2, 1.0), (10**9, 2, 1.0),
    ],
)  # fmt: skip
def test_a_level_fades_in_over_its_first_images_then_stays(images, level, blend):
    """The published blend is sin(pi t - pi / 2) / 2 + 1 / 2, t the share of the fade that is over."""
    found, weight = level_at(images, LEVELS)
    assert found == level and weight == pytest.approx(blend, abs=1e-6)


def test_one_level_lasts_for_ever():
    assert level_at(0, [(None, 0)]) == level_at(10**9, [(None, 0)]) == (0, 1.0)


def test_the_last_step_of_a_growing_run_is_found_without_walking_to_it():
    """From anywhere in the run, for batches that do not divide their levels."""
    chance = random.Random(0)
    for _ in range(300):
        levels = [
            SimpleNamespace(images=chance.randint(1, 200), fade_images=0, batch_size=chance.randint(1, 40))
            for _ in range(chance.randint(1, 4))
        ]
        for level in levels[1:]:
            level.fade_images = chance.randint(0, level.images)
        levels[-1].images = None
        walked = object.__new__(Levels)
        walked.levels, total = levels, chance.randint(1, 700)
        walked.settings = SimpleNamespace(schedule=SimpleNamespace(total_images=total))
        steps = [0]
        while (following := steps[-1] + levels[walked.at(steps[-1])[0]].batch_size) < total:
            steps.append(following)
        assert walked.at_the_end(chance.choice(steps)) == walked.at(steps[-1])
