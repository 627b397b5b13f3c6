"""Proves that the stream gives the same global batches on any number of ranks and workers, stopped and resumed anywhere,
each sample once an epoch, from a disk, a web server and a real S3 server; that what a network does wrong heals or is one
sentence that names shard and sample, in time; and that a damaged sample is never silent: it raises, or another one, the
same everywhere, stands in and is told.

    python -m pytest tests/unit/test_data_reader.py

The S3 tests need moto's server (`pip install "moto[server]"`), which runs on loopback.
"""

import dataclasses
import http.server
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from sivae.data import ImageStream, open_stream, reader, shards
from sivae.data.cache import BlockCache
from sivae.data.check import check as check_set
from sivae.data.index import Index
from sivae.data.make_index import make_index
from sivae.data.order import flip_at, substitute_at, window_at
from sivae.data.pack import pack
from sivae.data.shards import plan
from sivae.data.sources.files import split_url
from sivae.errors import UserError, shown
from sivae.storage import Folder
from tests import proxy as faults
from tests.processes import SLACK_SEC
from tests.proxy import FAILURES, WRONG, FileServer, Proxy, address, object_store, s3_options

COUNT, BATCH, SEED = (
    26,
    12,
    3,
)  # twelve does not divide 26, so that batches span epochs; it divides over 1, 2, 3 and 4 ranks
PACKED, CUT = 7, 5  # pixels of the packed images, and of what is cut out of them
RANKS, WORKERS = (1, 2, 3, 4), (0, 1, 3)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT + 6, PACKED, PACKED, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """32 labelled images, label i for image i: 26 to train on, in seven shards, and 6 to validate."""
    path = tmp_path_factory.mktemp("reader")
    np.savez(path / "a.npz", images=images, labels=np.arange(len(images)))
    pack(
        path / "a.npz", path / "set", resolution=PACKED, samples_per_shard=4, splits="validation=26:,train=0:26", progress=False
    )  # fmt: skip
    return str(path / "set")


@pytest.fixture(scope="module")
def index(folder):
    """Of the split that is read."""
    return Index.load(Folder(folder)).split("train")


@pytest.fixture
def copy(folder, tmp_path):
    """The set again, for a test to damage."""
    return shutil.copytree(folder, tmp_path / "set")


def expected(stream: ImageStream, images, start, count, damaged=()):
    """What must come from position `start` on, by numpy from the images that were packed: pixels and labels."""
    positions = np.arange(start, start + count)
    samples, epochs = stream.order.sample_at(positions), stream.order.epoch_at(positions)
    flips = flip_at(stream.seed, epochs, samples)
    top, left = window_at(stream.seed, epochs, samples, PACKED - stream.resolution)
    for i, epoch in enumerate(epochs):
        drawn = (substitute_at(stream.seed, int(epoch), int(samples[i]), n, len(stream)) for n in itertools.count())
        if samples[i] in damaged:
            samples[i] = next(sample for sample in drawn if sample not in damaged)
    labels = stream.index.label[samples]
    pixels = [images[n][y : y + stream.resolution, x : x + stream.resolution] for n, y, x in zip(labels, top, left)]
    pixels = [image[:, ::-1] if flip and stream.flip else image for image, flip in zip(pixels, flips)]
    return np.stack(pixels).transpose(0, 3, 1, 2), labels


def check(stream, images, start, pixels, labels, damaged=()):
    expected_pixels, expected_labels = expected(stream, images, start, len(labels), damaged)
    assert labels.tolist() == expected_labels.tolist()
    assert np.array_equal(pixels.numpy(), expected_pixels)


def streams(url, world_size, num_workers, **settings):
    settings = {"batch_size": BATCH, "seed": SEED, "flip": True, "random_crop": True, "resolution": CUT} | settings
    return [
        ImageStream(url, rank=rank, world_size=world_size, num_workers=num_workers, **settings)
        for rank in range(world_size)
    ]


def read_steps(ranks: list[ImageStream], start: int, steps: int):
    """What all ranks together read: (position, pixels, labels, messages) of each global batch, in the order of positions."""
    batches = [stream.batches(start) for stream in ranks]
    for step in range(steps):
        parts = [next(batch) for batch in batches]
        pixels, labels = (torch.stack(x, dim=1).flatten(0, 1) for x in zip(*((p.images, p.labels) for p in parts)))
        yield start + step * BATCH, pixels, labels, [message for part in parts for message in part.substituted]
    for batch in batches:
        batch.close()


# The order of what is read


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("world_size", RANKS)
def test_ranks_and_workers_and_restarts_change_nothing(folder, images, world_size, num_workers):
    draw = random.Random(10 * world_size + num_workers)
    seen, step = [], 0
    for stop in (*sorted(draw.sample(range(1, 13), 2)), 13):  # each part is another run, which knows images_seen alone
        ranks = streams(folder, world_size, num_workers)
        for position, pixels, labels, _ in read_steps(ranks, step * BATCH, stop - step):
            check(ranks[0], images, position, pixels, labels)
            seen += labels.tolist()
        step = stop
    assert len(seen) == 6 * COUNT
    for epoch in range(6):
        assert sorted(seen[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))


def elastic(url, images, seed, **settings):
    """Runs of one or two steps each on every number of ranks and workers, one after the other."""
    draw = random.Random(seed)
    combinations = [(r, w) for r in RANKS for w in WORKERS]
    draw.shuffle(combinations)
    seen, step = [], 0
    for world_size, num_workers in combinations:
        ranks, steps = streams(url, world_size, num_workers, **settings), draw.choice([1, 2])
        for position, pixels, labels, messages in read_steps(ranks, step * BATCH, steps):
            check(ranks[0], images, position, pixels, labels)
            assert not messages
            seen += labels.tolist()
        step += steps
    epochs = len(seen) // COUNT
    assert epochs >= 4
    for epoch in range(epochs):
        assert sorted(seen[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))


def test_every_epoch_holds_the_set_on_s3(s3, s3_set, images):
    elastic(s3_set, images, 0, storage_options=s3)


def test_every_epoch_holds_the_set_from_a_cache(web, web_set, images, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1000)  # a sample or two
    url, _ = web_set
    elastic(url, images, 1, cache=BlockCache(str(tmp_path / "cache"), 10_000))  # less than the set: blocks come and go
    assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("*/*")) <= 10_000


def test_resuming_at_any_position_and_batch_size(folder):
    def labels(batch_size, start, steps):
        stream = ImageStream(folder, batch_size=batch_size, seed=SEED).batches(start)
        return torch.cat([next(stream).labels for _ in range(steps)])

    whole = labels(1, 0, 80)
    for batch_size, start in ((7, 1), (26, 25), (3, 50)):
        steps = (80 - start) // batch_size
        assert torch.equal(labels(batch_size, start, steps), whole[start : start + steps * batch_size])


def test_splits(folder, images):
    for split, members in (("train", range(26)), ("validation", range(26, 32)), ("all", range(32))):
        stream = ImageStream(folder, batch_size=len(members), split=split, seed=SEED)
        batch = stream.at(0)
        assert sorted(batch.labels.tolist()) == list(members) and len(stream) == len(members)
        check(stream, images, 0, batch.images, batch.labels)
    assert ImageStream(folder, batch_size=1, split="validation").digest != ImageStream(folder, batch_size=1).digest


def test_seed_and_flip(folder, images):
    first = ImageStream(folder, batch_size=BATCH, seed=3).at(0)
    assert not torch.equal(first.labels, ImageStream(folder, batch_size=BATCH, seed=4).at(0).labels)
    stream = ImageStream(folder, batch_size=26, seed=3, flip=True)
    batch = stream.at(26)
    check(stream, images, 26, batch.images, batch.labels)
    mirrored = flip_at(3, 1, stream.order.sample_at(range(26, 52)))
    assert 0 < mirrored.sum() < 26


def test_random_crop_is_a_slice_of_the_packed_image(folder, images):
    stream = ImageStream(folder, batch_size=26, resolution=CUT, random_crop=True, seed=SEED)
    windows = set()
    for epoch in range(8):
        batch = stream.at(epoch * COUNT)
        for image, label in zip(batch.images.numpy(), batch.labels.tolist()):
            packed = images[label].transpose(2, 0, 1)
            places = [
                (y, x) for y in range(3) for x in range(3) if np.array_equal(packed[:, y : y + CUT, x : x + CUT], image)
            ]
            assert len(places) == 1
            windows |= {(label, *places[0])}
        check(stream, images, epoch * COUNT, batch.images, batch.labels)
    # 8 epochs of 9 places: a sample is cut at 5.5 of them on average
    assert 4.5 < len(windows) / COUNT < 6.5


@pytest.mark.parametrize("margin", [1, 2, 7, 128])
def test_windows_are_uniform_and_of_all_places(margin):
    samples = np.arange(200_000)
    top, left = window_at(7, 3, samples, margin)
    places = margin + 1
    for edges in (top, left):
        assert edges.min() == 0 and edges.max() == margin
        counts = np.bincount(edges, minlength=places)
        # Pearson's chi-squared has mean margin and variance 2 * margin
        assert ((counts - 200_000 / places) ** 2 / (200_000 / places)).sum() < margin + 5 * (2 * margin) ** 0.5 + 5
    both = np.bincount(top * places + left, minlength=places**2)
    assert ((both - both.mean()) ** 2 / both.mean()).sum() < places**2 + 5 * (2 * places**2) ** 0.5
    other, _ = window_at(7, 4, samples, margin)  # another epoch: other places, equal ones by chance
    assert abs((other == top).mean() - 1 / places) < 0.01
    assert abs((flip_at(7, 3, samples)[top == 0]).mean() - 0.5) < 0.06


def test_sample_in_the_order_given(folder, images):
    stream = ImageStream(folder, batch_size=1, flip=True)
    batch = stream.sample([25, 0, 13, 0])
    assert batch.labels.tolist() == [25, 0, 13, 0] and len(stream) == COUNT and stream.num_classes == len(images)
    assert np.array_equal(batch.images.numpy(), images[[25, 0, 13, 0]].transpose(0, 3, 1, 2))
    for bad in ([26], [-1]):
        with pytest.raises(UserError, match="0 to 25"):
            stream.sample(bad)


@pytest.mark.parametrize("size", [1, 4, 5, 6])
def test_sample_cuts_the_middle(folder, images, size):
    batch = ImageStream(folder, batch_size=1, resolution=size, random_crop=True).sample([3, 4])
    first = (PACKED - size) // 2
    middle = images[3:5, first : first + size, first : first + size]
    assert np.array_equal(batch.images.numpy(), middle.transpose(0, 3, 1, 2))


def test_neighbours_are_read_together(index):
    assert [r.samples for r in plan(index, [5, 4, 6, 0, 5, 25])] == [[0], [4, 5, 6], [25]]
    assert plan(index, []) == []


# Settings that do not fit


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 3, "world_size": 4}, "3 is too small for 4 ranks"),
        ({"batch_size": 6, "world_size": 0}, "6 is too small for 0 ranks"),
        ({"batch_size": 27}, "27 .*26 images"),
        ({"batch_size": 7, "split": "validation"}, "7 .*6 images"),
        (
            {"batch_size": 6, "split": "test"},
            r": there is no split 'test'.* validation \(6 images\), train \(26 images\).*`all`",
        ),
        (
            {"batch_size": 6, "resolution": 8},
            "resolution 7 .* 8; pack it with --resolution 8, or train with model.resolution=7$",
        ),
        ({"batch_size": 6, "resolution": 5}, "resolution 7 .* 5; .*data.random_crop=true"),
        (
            {"batch_size": 6, "resolution": 7, "random_crop": True},
            "data.random_crop: .*7 pixels.*nothing to cut images of 7",
        ),
        (
            {"batch_size": 6, "resolution": 8, "random_crop": True},
            "data.random_crop: .*7 pixels.*nothing to cut images of 8",
        ),
        ({"batch_size": 6, "random_crop": True}, "data.random_crop: "),
        ({"batch_size": 6, "num_channels": 1}, "3 channels .* 1; .* or train with model.num_channels=3$"),
        ({"batch_size": 0}, "0"),
        ({"batch_size": 6, "world_size": 2, "rank": 2}, "rank 2"),
        ({"batch_size": 6, "seed": -1}, "seed -1"),
        ({"batch_size": 6, "num_workers": -1}, "num_workers -1"),
    ],
)
def test_settings_are_refused_with_their_numbers(folder, settings, message):
    with pytest.raises(UserError, match=message):
        ImageStream(folder, **settings)


@pytest.mark.parametrize("url", ["{tmp}/absent", "memory://absent", "nosuchprotocol://x", "{tmp}"])
def test_no_set_there(tmp_path, url):
    with pytest.raises(UserError, match="sivae pack|cannot be opened"):
        open_stream(url.format(tmp=tmp_path), batch_size=1)


def test_a_remote_index_may_not_name_this_machines_disk(folder, index):
    import fsspec

    named = dataclasses.replace(index, base=folder)
    named.dump(Folder("memory://hostile"))
    assert fsspec.filesystem("memory").exists("/hostile/index.json")
    with pytest.raises(UserError, match="names shards on this machine's disk"):
        ImageStream("memory://hostile", batch_size=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_local_index_of_remote_shards(web_set, index, images, tmp_path, num_workers):
    url, _ = web_set
    dataclasses.replace(index, base=url).dump(Folder(tmp_path))
    ranks = streams(str(tmp_path), 1, num_workers)
    assert ranks[0]._context().get_start_method() == "forkserver", "a fork would share connections"
    for position, pixels, labels, _ in read_steps(ranks, 0, 3):
        check(ranks[0], images, position, pixels, labels)


def test_negative_position(folder):
    with pytest.raises(UserError, match="-6"):
        ImageStream(folder, batch_size=6).batches(-6)


def test_open_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("SIVAE_CACHE", str(tmp_path / "env"))
    stream = open_stream("digits:", resolution=16, batch_size=64, progress=False)
    assert (len(stream), stream.num_classes) == (1797, 10) and os.listdir(tmp_path / "env") == ["digits-16"]
    before = os.stat(tmp_path / "env" / "digits-16").st_mtime_ns
    again = open_stream("digits:", resolution=16, batch_size=64, cache_dir=tmp_path / "env")
    assert again.digest == stream.digest and os.stat(tmp_path / "env" / "digits-16").st_mtime_ns == before
    assert stream.at(0).images.shape == (64, 1, 16, 16)
    with pytest.raises(UserError, match="model.resolution"):
        open_stream("digits:", batch_size=64)


# Damage


def read_all(url, num_workers=0, **settings):
    stream = ImageStream(url, batch_size=COUNT, num_workers=num_workers, seed=SEED, **settings)
    stream.shards.folder.backoff_sec = 0.01
    return next(stream.batches())


def named_first(index, damaged) -> str:
    """The damaged sample that comes first, as an error must name it."""
    order = reader.Order(index.shard_sizes, SEED, reader.mixed_shards(index.shard_sizes))
    return index.name(next(int(sample) for sample in order.sample_at(range(COUNT)) if sample in damaged))


def flip_bit(path, index, sample, draw):
    data = bytearray(path.read_bytes())
    data[index.offset[sample] + draw.randrange(index.size[sample])] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_bit_is_found(copy, index, num_workers):
    draw = random.Random(0)
    for sample in range(COUNT) if num_workers == 0 else (0, 25):
        path = copy / index.shards[index.shard[sample]].name
        whole = path.read_bytes()
        flip_bit(path, index, sample, draw)
        with pytest.raises(UserError, match=f"{index.name(sample)} .*damaged, crc32"):
            read_all(copy, num_workers)
        path.write_bytes(whole)
    assert len(read_all(copy).labels) == COUNT


def test_what_lies_between_samples_is_nobodys_business(copy, index, images):
    for number, shard in enumerate(index.shards):
        data = bytearray(b"\xff" * shard.size_bytes)
        whole = (copy / shard.name).read_bytes()
        for sample in np.flatnonzero(index.shard == number):
            rows = slice(index.offset[sample], index.offset[sample] + index.size[sample])
            data[rows] = whole[rows]
        (copy / shard.name).write_bytes(data)
    stream = ImageStream(copy, batch_size=COUNT, seed=SEED)
    batch = stream.at(0)
    check(stream, images, 0, batch.images, batch.labels)


@pytest.mark.parametrize("remote", [False, True])
def test_a_cut_shard_is_found_at_every_boundary(index, web_set, copy, remote):
    url, path = web_set if remote else (copy, copy)
    path = path / index.shards[1].name
    mine = np.flatnonzero(index.shard == 1)
    stops = index.offset[mine] + index.size[mine]
    cuts = {0, 1, 511, 512, 1024, int(stops[-1]) - 1}  # inside a header, at a header, one byte short
    for offset, size in zip(index.offset[mine].tolist(), index.size[mine].tolist()):
        cuts |= {offset - 512, offset - 100, offset, offset + size // 2, offset + size}
    whole = path.read_bytes()
    try:
        for cut in sorted(cuts - {int(stops[-1])}):
            path.write_bytes(whole[:cut])
            damaged = mine[stops > cut]
            with pytest.raises(UserError, match=f"{named_first(index, damaged)} .*cut short"):
                read_all(url, retries=0)
            messages = read_all(url, retries=0, on_corrupt="substitute").substituted
            assert len(messages) == len(damaged)
        path.write_bytes(whole[: int(stops[-1])])  # without the end of the tar
        assert len(read_all(url).labels) == COUNT
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_deleted_shard_is_found(copy, index, num_workers):
    os.remove(copy / index.shards[2].name)
    first = named_first(index, np.flatnonzero(index.shard == 2))
    with pytest.raises(UserError, match=f"{first} .*missing"):
        read_all(copy, num_workers)


def test_shards_of_another_size_are_found(tmp_path):
    np.save(tmp_path / "b.npy", np.zeros((COUNT, 7, 7, 3), np.uint8))
    other = pack(tmp_path / "b.npy", tmp_path / "other", resolution=7, samples_per_shard=4, progress=False)
    lying = dataclasses.replace(other, resolution=5)
    os.remove(tmp_path / "other" / "index.json")
    lying.dump(Folder(tmp_path / "other"))
    with pytest.raises(UserError, match=f"{other.name(9)} is 7x7 .*5x5"):
        ImageStream(tmp_path / "other", batch_size=1).sample([9])


@pytest.fixture
def damaged(copy, index):
    """A set in which a shard is cut, bits are flipped and one is missing: the folder, and the samples that are lost."""
    draw = random.Random(1)
    first = int(np.flatnonzero(index.shard == 1)[2])
    path = copy / index.shards[1].name
    path.write_bytes(path.read_bytes()[: int(index.offset[first]) + 3])
    lost = set(np.flatnonzero(index.shard == 1)[2:].tolist())
    for sample in (0, 13, 25):
        flip_bit(copy / index.shards[index.shard[sample]].name, index, sample, draw)
        lost.add(sample)
    (copy / index.shards[2].name).unlink()
    return copy, lost | set(np.flatnonzero(index.shard == 2).tolist())


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 0), (1, 3), (3, 1), (4, 0)])
def test_substitutes_are_the_same_everywhere(damaged, images, index, world_size, num_workers):
    path, lost = damaged
    step, told = 0, 0
    for stop in (2, 3, 13):  # restarts
        ranks = streams(path, world_size, num_workers, on_corrupt="substitute")
        for position, pixels, labels, messages in read_steps(ranks, step * BATCH, stop - step):
            check(ranks[0], images, position, pixels, labels, lost)
            assert not lost & set(index.label.searchsorted(labels).tolist())
            samples = ranks[0].order.sample_at(range(position, position + BATCH))
            names = sorted(index.name(sample) for sample in samples if sample in lost)
            assert sorted(message.partition(" at ")[0].removeprefix("cannot read ") for message in messages) == names
            told += len(messages)
        step = stop
    assert told == 6 * len(lost)  # in each of six epochs


def test_a_substitute_is_another_one_in_each_epoch(damaged):
    path, _ = damaged
    stream = ImageStream(path, batch_size=COUNT, on_corrupt="substitute")
    labels = [sorted(stream.at(epoch * COUNT).labels.tolist()) for epoch in range(4)]
    assert len(set(map(tuple, labels))) == 4


def test_sample_substitutes_too(damaged, images):
    path, lost = damaged
    stream = ImageStream(path, batch_size=1, on_corrupt="substitute")
    batch = stream.sample(range(COUNT))
    assert len(batch.substituted) == len(lost)
    assert np.array_equal(batch.images.numpy(), images[batch.labels].transpose(0, 3, 1, 2))
    with pytest.raises(UserError):
        ImageStream(path, batch_size=1).sample(range(COUNT))


def test_a_set_that_is_lost_raises_even_so(copy, index):
    for shard in index.shards:
        (copy / shard.name).write_bytes(b"")
    with pytest.raises(
        UserError, match=f"8 samples in a row are damaged.* first cannot read {named_first(index, range(COUNT))}"
    ):
        read_all(copy, on_corrupt="substitute")


def test_a_killed_worker_is_an_error_not_a_hang(folder):
    batches = ImageStream(folder, batch_size=BATCH, num_workers=2).batches()
    next(batches)
    victims = torch.multiprocessing.active_children()
    assert len(victims) == 2
    start = time.monotonic()
    os.kill(victims[0].pid, signal.SIGKILL)
    time.sleep(0.2)  # nothing is raised here: it could be in the midst of a collective
    with pytest.raises(UserError, match="died"):
        for _ in range(100):
            next(batches)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_read_that_hangs_is_an_error_not_a_hang(copy, index, monkeypatch, num_workers):
    monkeypatch.setattr(reader, "GRACE_SEC", 0)
    os.remove(copy / index.shards[2].name)
    os.mkfifo(copy / index.shards[2].name)  # opening it waits for ever
    start = time.monotonic()
    with pytest.raises(UserError, match="hung"):
        read_all(copy, num_workers=num_workers, timeout_sec=1)
    assert time.monotonic() - start < 20


def test_a_worker_that_hangs_in_other_ways_is_ended_by_its_alarm(folder, monkeypatch):
    monkeypatch.setattr(reader, "GRACE_SEC", 0)
    monkeypatch.setitem(reader.DECODERS, "png", lambda *_: time.sleep(1000))  # the worker is a fork of this process
    start = time.monotonic()
    with pytest.raises(UserError, match="died or hung"):
        read_all(folder, num_workers=1, timeout_sec=1)
    assert time.monotonic() - start < 20


def test_stopping_early_leaves_no_process(folder):
    batches = ImageStream(folder, batch_size=BATCH, num_workers=2).batches()
    next(batches)
    batches.close()
    assert not torch.multiprocessing.active_children()


def test_urls_are_shown_without_secrets():
    text = shown("https://me:secret@host/a?X-Amz-Signature=secret and https://me:p@secret@host and s3://reader/a@b")
    assert "secret" not in text and "s3://reader/a@b" in text
    for text in ("Max retries exceeded with url: /a?X-Amz-Signature=secret", "https://host/my set/a.tar?sig=secret"):
        assert "secret" not in shown(text)


def test_a_question_mark_in_a_local_path_is_no_query():
    for path in ("/data/wh?t/set", "wh?t", "file:///data/wh?t"):
        assert shown(path) == path
    assert split_url("/data/wh?t/a.tar") == ("/data/wh?t", "a.tar")
    assert split_url("https://host/set/a.tar?at=x/y") == ("https://host/set", "a.tar?at=x/y")


# Other storage


def test_memory_filesystem(folder, images):
    import fsspec

    fsspec.filesystem("memory").put(folder, "memory://packed", recursive=True)
    for num_workers in (0, 2):
        ranks = streams("memory://packed", 1, num_workers)
        for position, pixels, labels, _ in read_steps(ranks, 5 * BATCH, 4):
            check(ranks[0], images, position, pixels, labels)


@pytest.fixture(scope="module")
def s3():
    with object_store("reader") as options:
        yield options


@pytest.fixture(scope="module")
def s3_set(s3, folder):
    Folder("s3://reader", s3).fs.put(folder, "reader/set", recursive=True)
    return "s3://reader/set"


@pytest.fixture(scope="module")
def web(folder, tmp_path_factory):
    """A web server of a folder, where `set` is the set and tests put others."""
    path = tmp_path_factory.mktemp("web")
    shutil.copytree(folder, path / "set")
    server = FileServer(path)
    yield server
    server.kill()


@pytest.fixture
def web_set(web, folder):
    """A set of one's own on the web server: its URL, and the folder."""
    name = uuid.uuid4().hex
    path = shutil.copytree(folder, os.path.join(web.folder, name))
    return f"{web.url}/{name}", Path(path)


def test_s3_packs_and_reads_back_the_same(s3, folder, images):
    source = os.path.join(os.path.dirname(folder), "a.npz")
    settings = {"resolution": PACKED, "samples_per_shard": 4, "splits": "validation=26:,train=0:26", "progress": False}
    made = pack(source, "s3://reader/packed", storage_options=s3, **settings)
    assert made.digest == Index.load(Folder(folder)).digest
    stream = ImageStream("s3://reader/packed", batch_size=COUNT, storage_options=s3)
    batch = stream.at(0)
    check(stream, images, 0, batch.images, batch.labels)
    with pytest.raises(UserError, match="already holds"):
        pack(source, "s3://reader/packed", storage_options=s3, **settings)


def test_s3_damage_is_found(s3, folder, index):
    fs = Folder("s3://reader", s3).fs
    fs.put(folder, "reader/damaged", recursive=True)
    name, mine = index.shards[3].name, np.flatnonzero(index.shard == 3)
    fs.rm(f"reader/damaged/{name}")
    settings = {"storage_options": s3, "retries": 1}
    with pytest.raises(UserError, match=f"{named_first(index, mine)} at s3://.*missing"):
        read_all("s3://reader/damaged", **settings)
    with open(os.path.join(folder, name), "rb") as file:
        whole = file.read()
    at = int(index.offset[mine[1]]) + 5
    fs.pipe_file(f"reader/damaged/{name}", whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(UserError, match=f"{index.name(mine[1])} .*damaged.*tried 2 times"):
        read_all("s3://reader/damaged", num_workers=1, **settings)
    for cut, damaged in ((at, mine[1:]), (at - 5, mine[1:]), (100, mine), (0, mine)):  # the last two: past the end
        fs.pipe_file(f"reader/damaged/{name}", whole[:cut])
        with pytest.raises(UserError, match=f"{named_first(index, damaged)} .*cut short"):
            read_all("s3://reader/damaged", **settings)
    with pytest.raises(UserError, match="sivae pack"):
        read_all("s3://reader/absent", **settings)


# What a network does


@pytest.fixture(scope="module")
def networks(web, s3, s3_set):
    """For each transport its proxy, the URL of the set, and settings of a stream that goes through the proxy."""
    web_proxy, s3_proxy = Proxy(web.address), Proxy(address(s3))
    yield {
        "http": (web_proxy, f"{web_proxy.url}/set", {"timeout_sec": 0.5}),
        "s3": (s3_proxy, s3_set, {"storage_options": s3_options(("127.0.0.1", s3_proxy.port)), "timeout_sec": 2.0}),
    }
    web_proxy.close()
    s3_proxy.close()


def stream_through(networks, transport, **settings):
    proxy, url, through = networks[transport]
    proxy.behave()
    stream = streams(url, 1, 0, **through, **settings)[0]
    stream.folder.backoff_sec = 0.01
    return proxy, stream


@pytest.mark.parametrize("fault", [*FAILURES, WRONG])
@pytest.mark.parametrize("transport", ["http", "s3"])
def test_faults_heal(networks, images, transport, fault):
    if (transport, fault) == ("s3", faults.FORBIDDEN_403):
        pytest.skip("an object store means it")
    proxy, stream = stream_through(networks, transport, retries=4)
    proxy.disturb(fault, times=10)
    batch = stream.at(0)  # of seven shards
    check(stream, images, 0, batch.images, batch.labels)
    assert proxy.times == 0 or transport == "s3"  # whose driver asks again by itself, each range as it fails


def test_an_outage_heals(networks, images):
    """Where the attempts alone would not be enough for seven shards."""
    proxy, stream = stream_through(networks, "http", retries=1, outage_sec=60)
    proxy.disturb(faults.ERROR_503, times=30)
    batch = stream.at(0)
    check(stream, images, 0, batch.images, batch.labels)
    assert proxy.times == 0


S3_FAULTS = (
    faults.CUT, faults.STALL, faults.SHORT, faults.ERROR_500, faults.FORBIDDEN_403, faults.WHOLE_FILE, faults.WRONG,
)  # fmt: skip


@pytest.mark.parametrize("on_corrupt", ["raise", "substitute"])
@pytest.mark.parametrize(
    "transport, fault", [*(("http", f) for f in (*FAILURES, WRONG)), *(("s3", f) for f in S3_FAULTS)]
)
def test_faults_that_stay_are_one_sentence_in_time(networks, transport, fault, on_corrupt):
    proxy, stream = stream_through(networks, transport, retries=1, on_corrupt=on_corrupt)
    proxy.disturb(fault)
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        stream.at(0)
    elapsed, sentence = time.monotonic() - start, str(raised.value)
    assert elapsed < stream.shards.patience_sec + SLACK_SEC
    assert any(stream.index.name(sample) in sentence for sample in range(COUNT)) and "\n" not in sentence
    once = fault == faults.WHOLE_FILE or (transport, fault) == ("s3", faults.FORBIDDEN_403)
    assert ("tried 2 times" in sentence) != once
    # Only what is in the shard itself makes it another sample's turn.
    assert ("in a row are damaged" in sentence) == (fault == WRONG and on_corrupt == "substitute")
    advice = {WRONG: "copy this shard", faults.WHOLE_FILE: "copy the set to a disk"}
    assert advice.get(fault, "check the network, the server") in sentence


def test_what_is_known_to_be_damaged_is_not_tried_again(web, web_set, index):
    url, path = web_set
    flip_bit(path / index.shards[1].name, index, int(np.flatnonzero(index.shard == 1)[1]), random.Random(0))
    proxy = Proxy(web.address)
    try:
        stream = ImageStream(url.replace(web.url, proxy.url), batch_size=1, retries=2, on_corrupt="substitute")
        stream.folder.backoff_sec = 0.01
        mine = np.flatnonzero(index.shard == 1)
        assert len(stream.sample(mine[:2]).substituted) == 1
        asked = [request for request in proxy.reads() if index.shards[1].name in request.path]
        assert len(asked) == 3
        stream.shards.memory.clear()
        assert len(stream.sample(mine).substituted) == 1
        assert len([request for request in proxy.reads() if index.shards[1].name in request.path]) == 4
    finally:
        proxy.close()


def test_a_server_that_is_killed_and_comes_back_in_the_middle(web, images):
    ranks = streams(f"{web.url}/set", 1, 0, timeout_sec=5, retries=6)
    ranks[0].folder.backoff_sec = 0.2
    for position, pixels, labels, _ in read_steps(ranks, 0, 6):
        check(ranks[0], images, position, pixels, labels)
        if position == 2 * BATCH:
            ranks[0].shards.memory.clear()
            web.kill()
            again = threading.Timer(0.5, web.start, kwargs={"wait": False})
            again.start()
    again.join()


def test_a_server_that_ignores_ranges_altogether(folder, tmp_path, monkeypatch):
    """Python's own file server, for one. Training, check, index and pack say so."""
    monkeypatch.setitem(Folder.__init__.__kwdefaults__, "backoff_sec", 0.01)
    sentence = (
        r"^http\S* .*the server ignores ranges \(\d+ bytes came where \d+ were .*; use one .* copy the set to a disk$"
    )

    class Plain(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    name = Index.load(Folder(folder)).shards[0].name
    try:
        with pytest.raises(UserError, match=sentence.replace("http", ".* at http")):
            read_all(url, retries=1, on_corrupt="substitute")
        for ask in (
            lambda: check_set(url, progress=False),
            lambda: make_index(f"{url}/{name}", output=tmp_path / "index", progress=False),
            lambda: pack(f"{url}/{name}", tmp_path / "set", resolution=4, progress=False),
        ):
            with pytest.raises(UserError, match=sentence):
                ask()
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_is_gone():
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot read http://127.0.0.1:9/set/index.json"):
        ImageStream("http://127.0.0.1:9/set", batch_size=1, retries=1)
    assert time.monotonic() - start < 10


def test_a_child_opens_its_own_filesystem(web):
    storage = Folder(web.url)
    opened = storage.fs
    assert storage.fs is opened
    storage._pid = -1  # what a forked child finds
    assert storage.fs is not opened


def test_a_process_that_ends_while_it_reads_ahead_ends_well():
    """A daemon thread that is at work in torch when Python ends would abort it."""
    code = (
        "import itertools, torch\n"
        "from sivae.data.reader import one_ahead\n"
        "x = torch.randn(400, 400)\n"
        "def work(i):\n"
        "    for _ in range(60 if i else 1):\n"
        "        y = torch.from_numpy((x @ x).numpy())\n"
        "    return y\n"
        "items = one_ahead(work, itertools.count(), 60)\n"
        "next(items)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
