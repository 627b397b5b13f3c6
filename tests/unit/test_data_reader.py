"""Proves that the stream gives the same global batches on any number of ranks and workers, stopped and
resumed anywhere, each sample once an epoch; the same over S3 and HTTP; and that damaged, cut, missing or
unreachable data heals or raises one UserError naming shard and sample, never a silent loss, never a hang.

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
import threading
import time

import numpy as np
import pytest
import torch

from sivae.data import ImageStream, open_stream, reader
from sivae.data.index import Index
from sivae.data.order import flip_at
from sivae.data.pack import pack
from sivae.data.shards import Storage, plan, shown
from sivae.errors import UserError

COUNT, BATCH = 26, 6  # six does not divide 26, so that batches span epochs


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 5, 5, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """26 labelled images, label i for image i, in seven shards."""
    path = tmp_path_factory.mktemp("reader")
    np.savez(path / "a.npz", images=images, labels=np.arange(COUNT))
    pack(path / "a.npz", path / "set", resolution=5, samples_per_shard=4, progress=False)
    return str(path / "set")


@pytest.fixture
def copy(folder, tmp_path):
    """The set again, for a test to damage."""
    return shutil.copytree(folder, tmp_path / "set")


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return list(itertools.islice(ImageStream(folder, batch_size=BATCH, seed=3, flip=True).batches(), 20))


def global_batches(folder, start, steps, world_size, num_workers, **settings):
    """What all ranks together read, as global batches in the order of positions."""
    settings = {"batch_size": BATCH, "seed": 3, "flip": True} | settings
    settings |= {"world_size": world_size, "num_workers": num_workers}
    streams = [ImageStream(folder, rank=rank, **settings).batches(start) for rank in range(world_size)]
    for _ in range(steps):
        parts = [next(stream) for stream in streams]
        yield [torch.stack(x, dim=1).flatten(0, 1) for x in zip(*((p.images, p.labels) for p in parts))]
    for stream in streams:
        stream.close()


# The order of what is read


def test_every_epoch_holds_the_set(folder, images):
    batches = ImageStream(folder, batch_size=BATCH, seed=1).batches()
    seen = [next(batches) for _ in range(3 * COUNT // BATCH)]  # three whole epochs: 78 samples, 13 batches
    labels = torch.cat([b.labels for b in seen])
    pixels = torch.cat([b.images for b in seen])
    for epoch in range(3):
        assert sorted(labels[epoch * COUNT : (epoch + 1) * COUNT].tolist()) == list(range(COUNT))
    assert np.array_equal(pixels.numpy(), images[labels].transpose(0, 3, 1, 2))
    assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_workers_and_restarts_change_nothing(folder, uninterrupted, world_size, num_workers):
    draw = random.Random(10 * world_size + num_workers)
    stops = sorted(draw.sample(range(1, 20), 2))
    step = 0
    for stop in (*stops, 20):  # each part is another run, which knows images_seen alone
        for pixels, labels in global_batches(folder, step * BATCH, stop - step, world_size, num_workers):
            assert torch.equal(labels, uninterrupted[step].labels)
            assert torch.equal(pixels, uninterrupted[step].images)
            step += 1
    assert step == 20


def test_resuming_at_any_position_and_batch_size(folder):
    def labels(batch_size, start, steps):
        stream = ImageStream(folder, batch_size=batch_size, seed=3).batches(start)
        return torch.cat([next(stream).labels for _ in range(steps)])

    whole = labels(1, 0, 80)
    for batch_size, start in ((7, 1), (26, 25), (3, 50)):
        steps = (80 - start) // batch_size
        assert torch.equal(labels(batch_size, start, steps), whole[start : start + steps * batch_size])


def test_seed_and_flip(folder, images):
    first = ImageStream(folder, batch_size=BATCH, seed=3).at(0)
    assert not torch.equal(first.labels, ImageStream(folder, batch_size=BATCH, seed=4).at(0).labels)
    flipped = ImageStream(folder, batch_size=26, seed=3, flip=True).at(26)
    expected = images[flipped.labels].transpose(0, 3, 1, 2)
    mirrored = flip_at(3, 1, flipped.labels.numpy())
    expected[mirrored] = expected[mirrored][..., ::-1]
    assert 0 < mirrored.sum() < 26 and np.array_equal(flipped.images.numpy(), expected)


def test_sample_in_the_order_given(folder, images):
    stream = ImageStream(folder, batch_size=1, flip=True)
    batch = stream.sample([25, 0, 13, 0])
    assert batch.labels.tolist() == [25, 0, 13, 0] and len(stream) == COUNT and stream.num_classes == COUNT
    assert np.array_equal(batch.images.numpy(), images[[25, 0, 13, 0]].transpose(0, 3, 1, 2))
    for bad in ([26], [-1]):
        with pytest.raises(UserError, match="0 to 25"):
            stream.sample(bad)


def test_neighbours_are_read_together(folder):
    index = Index.load(folder)
    assert [r.samples for r in plan(index, [5, 4, 6, 0, 5, 25])] == [[0], [4, 5, 6], [25]]
    assert plan(index, []) == []


# Settings that do not fit


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 6, "world_size": 4}, "6 does not divide among 4"),
        ({"batch_size": 27}, "27 .*26 images"),
        ({"batch_size": 6, "resolution": 8}, "resolution 5 .* 8; pack it with --resolution 8"),
        ({"batch_size": 6, "num_channels": 1}, "3 channels .* 1;"),
        ({"batch_size": 0}, "0"),
        ({"batch_size": 6, "world_size": 2, "rank": 2}, "rank 2"),
        ({"batch_size": 6, "seed": -1}, "seed -1"),
    ],
)
def test_settings_are_refused_with_their_numbers(folder, settings, message):
    with pytest.raises(UserError, match=message):
        ImageStream(folder, **settings)


@pytest.mark.parametrize("url", ["{tmp}/absent", "memory://absent", "nosuchprotocol://x", "{tmp}"])
def test_no_set_there(tmp_path, url):
    with pytest.raises(UserError, match="sivae pack|cannot be opened"):
        open_stream(url.format(tmp=tmp_path), batch_size=1)


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
    stream = ImageStream(url, batch_size=COUNT, num_workers=num_workers, **settings)
    return next(stream.batches())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_byte_is_found(copy, num_workers):
    index, draw = Index.load(copy), random.Random(0)
    for sample in (0, 13, 25):
        path = copy / index.shards[index.shard[sample]].name
        whole = path.read_bytes()
        data = bytearray(whole)
        data[index.offset[sample] + draw.randrange(index.size[sample])] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"sample {sample:08d} of {path.name} .*damaged, crc32"):
            read_all(copy, num_workers)
        path.write_bytes(whole)
    assert read_all(copy).images.shape[0] == COUNT


def test_a_cut_shard_is_found_at_every_boundary(copy):
    index = Index.load(copy)
    path = copy / "shard-000001.tar"  # samples 4 to 7
    whole = path.read_bytes()
    last = int(index.offset[7] + index.size[7]) - 1
    for cut in sorted({0, 1, 511, 512, 1024, last, *(int(o) for o in index.offset[4:8])}):
        path.write_bytes(whole[:cut])
        first = next(s for s in range(4, 8) if index.offset[s] + index.size[s] > cut)
        with pytest.raises(UserError, match=f"sample {first:08d} of shard-000001.tar .*cut short"):
            read_all(copy)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_deleted_shard_is_found(copy, num_workers):
    os.remove(copy / "shard-000002.tar")
    with pytest.raises(UserError, match="sample 00000008 of shard-000002.tar .*missing"):
        read_all(copy, num_workers)


def test_shards_of_another_size_are_found(tmp_path):
    np.save(tmp_path / "b.npy", np.zeros((COUNT, 7, 7, 3), np.uint8))
    other = pack(tmp_path / "b.npy", tmp_path / "other", resolution=7, samples_per_shard=4, progress=False)
    lying = dataclasses.replace(other, resolution=5)
    os.remove(tmp_path / "other" / "index.json")
    lying.dump(tmp_path / "other")
    with pytest.raises(UserError, match="sample 00000009 of shard-000002.tar is 7x7 .*5x5"):
        ImageStream(tmp_path / "other", batch_size=1).sample([9])


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


def test_a_hanging_worker_is_an_error_not_a_hang(copy, monkeypatch):
    monkeypatch.setattr(reader, "GRACE_SEC", 0)
    os.remove(copy / "shard-000002.tar")
    os.mkfifo(copy / "shard-000002.tar")  # opening it waits for ever
    start = time.monotonic()
    with pytest.raises(UserError, match="hung"):
        read_all(copy, num_workers=1, timeout_sec=1)
    assert time.monotonic() - start < 20


def test_stopping_early_leaves_no_process(folder):
    batches = ImageStream(folder, batch_size=BATCH, num_workers=2).batches()
    next(batches)
    batches.close()
    assert not torch.multiprocessing.active_children()


def test_urls_are_shown_without_secrets():
    text = shown("https://me:secret@host/a?X-Amz-Signature=secret and s3://reader/a@b")
    assert "secret" not in text and "s3://reader/a@b" in text


# Other storage


def test_memory_filesystem(folder, uninterrupted, tmp_path):
    import fsspec

    fsspec.filesystem("memory").put(folder, "memory://packed", recursive=True)
    for num_workers in (0, 2):
        stream = ImageStream("memory://packed", batch_size=BATCH, seed=3, flip=True, num_workers=num_workers)
        batches = stream.batches(5 * BATCH)
        assert all(same(next(batches), uninterrupted[step]) for step in range(5, 9))
        if num_workers:
            batches.close()


@pytest.fixture(scope="module")
def s3():
    """Storage options of a bucket `reader` on a real S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    import s3fs

    s3fs.S3FileSystem(**options).mkdir("reader")
    yield options
    server.stop()


def test_s3_packs_and_reads_back_the_same(s3, folder, uninterrupted, tmp_path):
    source = os.path.join(os.path.dirname(folder), "a.npz")
    url, settings = "s3://reader/set", {"storage_options": s3}
    made = pack(source, url, resolution=5, samples_per_shard=4, progress=False, **settings)
    assert made.digest == Index.load(folder).digest
    step = 0
    for stop, world_size, num_workers in ((4, 1, 0), (9, 2, 1), (11, 1, 2)):
        found = global_batches(url, step * BATCH, stop - step, world_size, num_workers, **settings)
        for pixels, labels in found:
            assert torch.equal(labels, uninterrupted[step].labels)
            assert torch.equal(pixels, uninterrupted[step].images)
            step += 1
    assert step == 11
    with pytest.raises(UserError, match="already holds"):
        pack(source, url, resolution=5, progress=False, **settings)


def test_s3_damage_is_found(s3, folder):
    import s3fs

    fs = s3fs.S3FileSystem(**s3)
    fs.put(folder, "reader/damaged", recursive=True)
    fs.rm("reader/damaged/shard-000003.tar")
    settings = {"storage_options": s3, "retries": 1}
    with pytest.raises(UserError, match="sample 00000012 of shard-000003.tar at s3://.*missing"):
        read_all("s3://reader/damaged", **settings)
    with open(os.path.join(folder, "shard-000003.tar"), "rb") as file:
        whole = file.read()
    index = Index.load(folder)
    at = int(index.offset[13]) + 5
    fs.pipe_file("reader/damaged/shard-000003.tar", whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(UserError, match="sample 00000013 of shard-000003.tar .*damaged.*tried 2 times"):
        read_all("s3://reader/damaged", num_workers=1, **settings)
    fs.pipe_file("reader/damaged/shard-000003.tar", whole[: at - 5])
    with pytest.raises(UserError, match=r"sample 0000001[23] of shard-000003.tar"):
        read_all("s3://reader/damaged", **settings)
    with pytest.raises(UserError, match="sivae pack"):
        read_all("s3://reader/absent", **settings)


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """Serves a folder with ranges; `server.faults` names what goes wrong with the next shard requests."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = os.path.join(self.server.folder, os.path.basename(self.path))
        if not os.path.exists(path):
            return self.send_error(404)
        with open(path, "rb") as file:
            data = file.read()
        fault = self.server.faults.pop(0) if body and path.endswith(".tar") and self.server.faults else None
        status, span = 200, self.headers.get("Range")
        if span and fault != "whole file":
            start, stop = span.removeprefix("bytes=").split("-")
            data, status = data[int(start) : int(stop) + 1], 206
        if fault == "stall":
            time.sleep(1.5)
        if fault in ("500", "403"):
            return self.send_error(int(fault))
        if fault == "wrong content":
            data = b"\0" * len(data)
        if fault == "short":
            data = data[: len(data) // 2]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = fault == "cut"

    def log_message(self, *_):
        pass


@pytest.fixture
def web(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.folder, server.faults = folder, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/set"
    yield server
    server.shutdown()
    server.server_close()


FAULTS = ["500", "403", "cut", "short", "wrong content", "whole file", "stall"]


@pytest.mark.parametrize("fault", FAULTS)
def test_http_faults_heal(web, uninterrupted, fault):
    stream = ImageStream(web.url, batch_size=BATCH, seed=3, flip=True, timeout_sec=0.5, retries=2)
    stream.storage.backoff_sec = 0.05
    web.faults[:] = [fault] * 2
    assert same(stream.at(0), uninterrupted[0]) and not web.faults


@pytest.mark.parametrize("fault", FAULTS)
def test_http_faults_that_stay_are_named(web, fault):
    stream = ImageStream(web.url, batch_size=BATCH, seed=3, timeout_sec=0.5, retries=1)
    stream.storage.backoff_sec = 0.05
    web.faults[:] = [fault] * 1000
    start = time.monotonic()
    with pytest.raises(UserError, match=r"sample \d{8} of shard-00000\d\.tar at http://.*tried 2 times"):
        stream.at(0)
    assert time.monotonic() - start < stream.storage.patience_sec + 1


def test_a_server_that_is_gone(folder):
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot read http://127.0.0.1:9/set/index.json"):
        ImageStream("http://127.0.0.1:9/set", batch_size=1, retries=1)
    assert time.monotonic() - start < 10


def test_a_child_opens_its_own_filesystem(web):
    storage = Storage(web.url)
    opened = storage.fs
    assert storage.fs is opened
    storage._pid = -1  # what a forked child finds
    assert storage.fs is not opened
