"""Which sample stands at which position of the endless stream: pure functions of (seed, epoch).

Position p counts the samples consumed since the start of the run, so it is all the state there is.
It belongs to epoch p // N, and each epoch holds each of the N samples once. Inside an epoch the shards
are permuted, put into groups of `group`, and the samples of a group are permuted together: a reader
touches only `group` shards at a time, and neighbours come from different shards. `mixed_shards` says how
many: sets are often packed class by class, so a group holds tens of thousands of samples.

Worked example: three shards of 2, 3 and 2 samples, so that samples 0 1 | 2 3 4 | 5 6 lie in them.

>>> order = Order([2, 3, 2], seed=1, group=2)
>>> order.epoch(0)          # shards 0 and 2 mixed, then shard 1
array([1, 5, 0, 6, 2, 3, 4])
>>> order.epoch(1)          # another epoch, another permutation: shards 0 and 1 mixed, then shard 2
array([4, 3, 0, 2, 1, 6, 5])

The global batch of 4 that starts at position 4 takes the last three of epoch 0 and the first of epoch 1:

>>> order.sample_at(range(4, 8))
array([2, 3, 4, 4])

Two ranks share it, every second position each; together they hold the same batch as one rank alone:

>>> [order.sample_at(rank_positions(4, 4, rank, 2)) for rank in range(2)]
[array([2, 4]), array([3, 4])]

Worker w of n makes every n-th step: of batches starting at 0, 4, 8, 12 two workers make (0, 8) and
(4, 12). So ranks, workers and restarts decide who reads a sample, never which sample it is.
"""

from collections.abc import Sequence

import numpy as np

MIXED_SAMPLES = 32_768


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, group: int = 8) -> np.ndarray:
    """The samples of one epoch in their order: int64 [N], a permutation of range(N).

    shard_sizes: samples in each shard; shard s holds a run of sample numbers that follows shard s - 1's.
    seed, epoch: not negative. group: how many shards are mixed at a time.
    """
    # Raw words and a stable sort rather than Generator.permutation: numpy promises the same words from a
    # bit generator in every version, but not the same permutations, and a run may outlive an upgrade.
    words = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    place = np.empty(len(shard_sizes), dtype=np.int64)
    place[np.argsort(words.random_raw(len(shard_sizes)), kind="stable")] = np.arange(len(shard_sizes))
    group_of_sample = np.repeat(place // group, shard_sizes)
    return np.lexsort((words.random_raw(len(group_of_sample)), group_of_sample))


def rank_positions(start: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The positions that one rank takes of the global batch [start, start + batch_size): int64."""
    return np.arange(start + rank, start + batch_size, world_size)


def mixed_shards(shard_sizes: Sequence[int]) -> int:
    """How many shards to mix at a time: at least 8, and as many as hold MIXED_SAMPLES."""
    return max(8, -(-MIXED_SAMPLES * len(shard_sizes) // int(np.sum(shard_sizes))))


class Order:
    """The endless stream over one set. Keeps the last two epochs' permutations, which a batch may span."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, group: int = 8):
        self.shard_sizes, self.seed, self.group = np.asarray(shard_sizes, dtype=np.int64), seed, group
        self.num_samples = int(self.shard_sizes.sum())
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch, int64 [N]."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = epoch_order(self.shard_sizes, self.seed, epoch, self.group)
        return self._epochs[epoch]

    def epoch_at(self, positions) -> np.ndarray:
        """The epoch of each position, int64."""
        return np.asarray(positions, dtype=np.int64) // self.num_samples

    def sample_at(self, positions) -> np.ndarray:
        """The sample number at each position, int64 in [0, N)."""
        positions, epochs = np.asarray(positions, dtype=np.int64), self.epoch_at(positions)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self.epoch(int(epoch))[positions[here] % self.num_samples]
        return samples


def keyed_bits(seed: int, epochs, samples, purpose: int = 0) -> np.ndarray:
    """64 random bits for each (seed, epoch, sample): uint64, the shape of `samples`.

    A hash of counters (SplitMix64's finalizer, Steele, Lea and Flood 2014) instead of a generator with
    state, so that an augmentation is the same whichever rank or worker makes it. `purpose` separates
    the augmentations from each other.
    """
    bits = np.zeros(np.shape(samples), dtype=np.uint64)
    with np.errstate(over="ignore"):  # wrapping round at 2^64 is the point
        for word in (seed, purpose, epochs, samples):
            bits = (bits ^ np.asarray(word, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def flip_at(seed: int, epochs, samples) -> np.ndarray:
    """Whether each sample is mirrored left to right in its epoch: bool, true for half of them."""
    return (keyed_bits(seed, epochs, samples) >> np.uint64(63)).astype(bool)


def window_at(seed: int, epochs, samples, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """The top and left edge of each sample's random crop in its epoch: int64 in 0..margin each, uniform."""
    bits = keyed_bits(seed, epochs, samples, purpose=1)
    halves = bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)
    top, left = ((half * np.uint64(margin + 1)) >> np.uint64(32) for half in halves)
    return top.astype(np.int64), left.astype(np.int64)


def substitute_at(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """The sample that stands in for a damaged one in an epoch, at the given attempt to find a good one."""
    return int(keyed_bits(seed, epoch, sample, purpose=2 + attempt) % np.uint64(num_samples))
