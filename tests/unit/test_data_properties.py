"""Proves, for sets, seeds, batch sizes, ranks, workers and stops that a machine thinks of: an epoch is a permutation that
keeps to its shards' groups, ranks part every global batch, and a run that is stopped anywhere and goes on with other ranks
and workers reads what an uninterrupted one does; so do sets of any images, packed and read back.

    python -m pytest tests/unit/test_data_properties.py

Needs hypothesis (`pip install hypothesis`).
"""

import tempfile

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sivae.data import ImageStream, shards
from sivae.data.cache import BlockCache
from sivae.data.index import Index, Shard, parse
from sivae.data.order import (
    Order,
    epoch_order,
    flip_at,
    mixed_shards,
    rank_positions,
    substitute_at,
    window_at,
)  # fmt: skip
from sivae.data.pack import pack
from sivae.data.shards import MAX_GAP_BYTES, MAX_MERGED_BYTES, block_starts, plan
from sivae.errors import UserError
from sivae.storage import Folder

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None)
SLOW = settings(QUICK, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30)
seeds = st.integers(0, 2**63 - 1)


@QUICK
@given(sizes, seeds, st.integers(0, 10**6), st.integers(1, 40))
def test_an_epoch_is_a_permutation_that_keeps_to_its_groups(shard_sizes, seed, epoch, group):
    samples = epoch_order(shard_sizes, seed, epoch, group)
    assert sorted(samples) == list(range(sum(shard_sizes)))
    shard = np.repeat(np.arange(len(shard_sizes)), shard_sizes)[samples]
    rest, met = list(shard), set()
    while rest:  # the next group: as many shards, whole, none of them before
        mine, count = set(), 0
        for s in rest:
            if len(mine | {s}) > group:
                break
            mine.add(s)
        count = sum(shard_sizes[s] for s in mine)
        if (
            set(rest[:count]) != mine
        ):  # the first of the next group may have been taken for one of this, if that is the last
            assert len(set(rest)) <= group
        assert not mine & met
        met |= set(rest[:count])
        rest = rest[count:]


@QUICK
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=200))
def test_enough_shards_are_mixed(shard_sizes):
    mixed = mixed_shards(shard_sizes)
    assert mixed >= 8 and mixed * np.mean(shard_sizes) >= 32_768 - 1e-3
    assert mixed == 8 or (mixed - 1) * np.mean(shard_sizes) < 32_768


@QUICK
@given(sizes, seeds, st.integers(1, 8), st.integers(1, 8), st.integers(0, 5000))
def test_ranks_part_the_batch(shard_sizes, seed, world_size, share, start):
    batch_size, order = world_size * share, Order(shard_sizes, seed)
    whole = order.sample_at(range(start, start + batch_size))
    parts = [
        Order(shard_sizes, seed).sample_at(rank_positions(start, batch_size, r, world_size)) for r in range(world_size)
    ]
    assert {len(part) for part in parts} == {share}
    assert np.array_equal(np.stack(parts, axis=1).reshape(-1), whole)
    count = sum(shard_sizes)
    for position, sample in zip(range(start, start + batch_size), whole):
        assert sample == epoch_order(shard_sizes, seed, position // count)[position % count]


@QUICK
@given(seeds, st.integers(0, 2**40), st.integers(1, 2**40), st.integers(0, 2**20), st.integers(0, 20))
def test_draws_stay_in_their_range(seed, epoch, num_samples, margin, attempt):
    samples = np.array([0, num_samples - 1])
    top, left = window_at(seed, epoch, samples, margin)
    assert top.min() >= 0 and left.min() >= 0 and max(top.max(), left.max()) <= margin
    assert 0 <= substitute_at(seed, epoch, num_samples - 1, attempt, num_samples) < num_samples
    assert flip_at(seed, epoch, samples).dtype == bool


@st.composite
def indices(draw):
    """Indices of sets that need not exist: samples of any size, with any gaps between them."""
    shard_sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    count = sum(shard_sizes)
    size = draw(st.lists(st.sampled_from([1, 100, 5000, 400_000, 3_000_000]), min_size=count, max_size=count))
    gap = draw(st.lists(st.sampled_from([0, 512, MAX_GAP_BYTES, MAX_GAP_BYTES + 1]), min_size=count, max_size=count))
    offset, first, made = [], 0, []
    for number, n in enumerate(shard_sizes):
        end = 0
        for i in range(first, first + n):
            offset.append(end + gap[i])
            end = offset[-1] + size[i]
        first += n
        made.append(Shard(f"{number}.tar", end, n))
    column = [np.array(values, dtype=np.int64) for values in (offset, size)]
    return Index(
        resolution=1024, num_channels=3, num_classes=None, image_format="png", source="", splits={"train": count},
        shards=tuple(made), key=[str(i) for i in range(count)], offset=column[0], size=column[1],
        crc32=np.zeros(count, dtype=np.int64), label=None,
    )  # fmt: skip


@QUICK
@given(indices(), st.data())
def test_ranges_and_blocks_cover_what_is_wanted(index, data):
    wanted = data.draw(st.lists(st.integers(0, index.count - 1), max_size=20))
    ranges = plan(index, wanted)
    assert [sample for r in ranges for sample in r.samples] == sorted(set(wanted))
    for r in ranges:
        assert r.stop - r.start <= MAX_MERGED_BYTES or len(r.samples) == 1
        for sample in r.samples:
            assert index.shard[sample] == r.shard
            assert r.start <= index.offset[sample] and index.offset[sample] + index.size[sample] <= r.stop
    starts = block_starts(index).tolist()
    assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < index.count
    for first, stop in zip(starts, [*starts[1:], index.count]):
        assert len(set(index.shard[first:stop])) == 1
        assert index.offset[stop - 1] - index.offset[first] < shards.BLOCK_BYTES


@QUICK
@given(indices())
def test_an_index_is_read_as_it_was_written(index):
    folder = Folder("memory://index")
    index.dump(folder)
    assert parse(folder.read("index.json"), "here").digest == index.digest


@QUICK
@given(indices(), st.integers(0, 10**6), st.integers(0, 7))
def test_an_index_with_any_bit_flipped_is_refused_or_the_same(index, place, bit):
    folder = Folder("memory://index")
    index.dump(folder)
    data = bytearray(folder.read("index.json"))
    data[place % len(data)] ^= 1 << bit
    try:
        assert parse(bytes(data), "here").digest == index.digest
    except UserError as error:
        assert "here" in str(error)


# With bytes


@st.composite
def runs(draw):
    """A set of `count` images, and a run on it that stops and goes on with other ranks and workers."""
    batch_size = draw(st.sampled_from([6, 12]))
    return {
        "count": draw(st.integers(batch_size + 1, 30)), "batch_size": batch_size, "resolution": draw(st.integers(2, 6)),
        "num_channels": draw(st.sampled_from([1, 3])), "per_shard": draw(st.integers(1, 9)), "split": draw(st.booleans()),
        "crop": draw(st.booleans()), "flip": draw(st.booleans()), "seed": draw(seeds), "start": draw(st.integers(0, 200)),
        "cache_bytes": draw(st.sampled_from([100, 1000, 10**6])),
        "parts": draw(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=3)),
    }  # fmt: skip


@pytest.mark.parametrize("where", ["local", "memory", "cached"])
@SLOW
@given(run=runs())
def test_what_is_packed_is_read_and_resumed(where, run):
    count, resolution = run["count"], run["resolution"]
    shape = (count, resolution, resolution, run["num_channels"])
    images = np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as path:
        # Cleanup errors: a thread that reads ahead may still put a block into the cache.
        np.savez(f"{path}/a.npz", images=images, labels=np.arange(count))
        splits = f"train=0:{count - 1},validation={count - 1}:" if run["split"] else None
        packing = {"resolution": resolution, "samples_per_shard": run["per_shard"], "splits": splits, "progress": False}
        pack(f"{path}/a.npz", f"{path}/set", **packing)
        url = f"{path}/set"
        if where != "local":
            url = f"memory:/{path}/set"
            fsspec.filesystem("memory").put(f"{path}/set", url, recursive=True)
        cache = BlockCache(f"{path}/cache", run["cache_bytes"]) if where == "cached" else None
        read_in_parts(url, images, run, cache)
        if where != "local":
            fsspec.filesystem("memory").rm(url, recursive=True)


def read_in_parts(url, images, run, cache):
    size, batch_size, seed = run["resolution"] - run["crop"], run["batch_size"], run["seed"]
    index = Index.load(Folder(url)).split("train")
    order = Order(index.shard_sizes, seed, mixed_shards(index.shard_sizes))
    reading = {"flip": run["flip"], "random_crop": run["crop"], "resolution": size, "cache": cache}
    start = run["start"]
    for world_size, num_workers, steps in run["parts"]:
        workers = [num_workers] + [0] * (world_size - 1)  # a process takes its time to start; one rank stands for all
        streams = [
            ImageStream(
                url, batch_size=batch_size, seed=seed, rank=r, world_size=world_size, num_workers=workers[r], **reading
            )
            for r in range(world_size)
        ]
        batches = [stream.batches(start) for stream in streams]
        for _ in range(steps):
            parts = [next(batch) for batch in batches]
            pixels = torch.stack([part.images for part in parts], dim=1).flatten(0, 1).numpy()
            labels = torch.stack([part.labels for part in parts], dim=1).flatten().numpy()
            positions = np.arange(start, start + batch_size)
            samples, epochs = order.sample_at(positions), order.epoch_at(positions)
            assert np.array_equal(labels, index.label[samples])
            top, left = window_at(seed, epochs, samples, run["resolution"] - size)
            for image, label, y, x, mirrored in zip(pixels, labels, top, left, flip_at(seed, epochs, samples)):
                packed = images[label, y : y + size, x : x + size]
                packed = packed[:, ::-1] if run["flip"] and mirrored else packed
                assert np.array_equal(image, packed.transpose(2, 0, 1))
            start += batch_size
        for batch in batches:
            batch.close()
