"""Proves that the order of samples is a pure function of (seed, epoch), each epoch a permutation that keeps
to its groups of shards; that ranks tile the global batch; that flips are keyed on (seed, epoch, sample).

    python -m pytest tests/unit/test_data_order.py
"""

import doctest

import numpy as np
import pytest

from sivae.data import order
from sivae.data.order import Order, epoch_order, flip_at, keyed_bits, rank_positions

SIZES = [5, 1, 7, 3, 4, 6, 2]  # samples in each shard


def test_worked_example_is_true():
    result = doctest.testmod(order)
    assert result.attempted >= 5 and result.failed == 0


@pytest.mark.parametrize("group", [1, 2, 8])
def test_each_epoch_is_a_permutation(group):
    for epoch in range(5):
        assert sorted(epoch_order(SIZES, 3, epoch, group)) == list(range(sum(SIZES)))


def test_order_depends_on_seed_and_epoch_alone():
    assert np.array_equal(epoch_order(SIZES, 3, 4), epoch_order(SIZES, 3, 4))
    assert not np.array_equal(epoch_order(SIZES, 3, 4), epoch_order(SIZES, 4, 3))
    assert not np.array_equal(epoch_order(SIZES, 3, 4), epoch_order(SIZES, 3, 5))


def test_words_do_not_change_with_numpy():
    # Written down once: a resumed run must see the same order after an upgrade.
    assert epoch_order([3, 2, 4], 7, 11, group=2).tolist() == [4, 2, 1, 0, 3, 7, 8, 5, 6]
    assert keyed_bits(7, 11, np.arange(2)).tolist() == [5422096810495581971, 8037946271120717439]


def test_a_group_touches_only_its_shards():
    shard = np.repeat(np.arange(len(SIZES)), SIZES)
    seen = shard[epoch_order(SIZES, 0, 0, group=2)]
    while len(seen):
        first = list(dict.fromkeys(seen))[:2]  # the shards of this group
        size = sum(SIZES[s] for s in first)
        if len(set(seen)) > 1:
            assert set(seen[:size]) == set(first)
        seen = seen[size:]


def test_every_order_of_a_small_set_comes_up_equally_often():
    counts = {}
    for seed in range(6000):
        drawn = tuple(epoch_order([3], seed, 0))
        counts[drawn] = counts.get(drawn, 0) + 1
    # 6 orders, 1000 each; 150 is five standard deviations
    assert len(counts) == 6 and max(abs(c - 1000) for c in counts.values()) < 150


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_tile_the_batch(world_size):
    stream = Order(SIZES, seed=1)
    whole = stream.sample_at(range(20, 32))  # spans epochs 0 and 1, of 28 samples each
    parts = [Order(SIZES, 1).sample_at(rank_positions(20, 12, r, world_size)) for r in range(world_size)]
    assert np.array_equal(np.stack(parts, axis=1).reshape(-1), whole)


def test_positions_run_through_epochs():
    stream = Order(SIZES, seed=1)
    three_epochs = np.concatenate([epoch_order(SIZES, 1, epoch) for epoch in range(3)])
    assert np.array_equal(stream.sample_at(range(84)), three_epochs)
    assert len(stream._epochs) <= 2
    assert np.array_equal(stream.sample_at([0]), three_epochs[:1])  # and back again


def test_flips_are_keyed_and_even():
    samples = np.arange(20000)
    flips = flip_at(5, 2, samples)
    assert np.array_equal(flips[[7, 3]], flip_at(5, np.array([2, 2]), np.array([7, 3])))
    crops = keyed_bits(5, 2, samples, purpose=1) >> 63 == 1
    for other in (flip_at(5, 3, samples), flip_at(6, 2, samples), crops):
        assert abs((flips ^ other).mean() - 0.5) < 0.02  # independent: five standard deviations are 0.018
    assert abs(flips.mean() - 0.5) < 0.02
