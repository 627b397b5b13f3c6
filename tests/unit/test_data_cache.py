"""Proves of the node's cache of blocks, with real processes and a server that counts: its limit holds while many write, the
least recently used go first, what lies there damaged is fetched again, a hit asks nothing of the server, each block is
fetched once by all workers and runs of a node; and a full or read-only disk, processes that are killed or stopped at any
moment, and a folder that somebody empties are never more than a warning.

    python -m pytest tests/unit/test_data_cache.py
"""

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sivae.data import ImageStream, cache, shards
from sivae.data.cache import BlockCache
from sivae.data.index import Index
from sivae.data.pack import pack
from sivae.storage import Folder
from tests.processes import SLACK_SEC
from tests.proxy import FileServer, Proxy

FORK = multiprocessing.get_context("fork")
COUNT, BATCH = 64, 16
BLOCK = 2000  # bytes, for a few samples each


def key(number: int) -> str:
    return f"{number:032x}"[::-1]  # so that names differ where folders and claims are taken from


def bytes_in(folder) -> int:
    """What blocks take in a folder, those that are being written included."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size if not name.startswith(".") else 0
            except FileNotFoundError:  # just evicted
                pass
    return total


def blocks_in(folder) -> list[Path]:
    return sorted(path for path in Path(folder).glob("*/*") if path.suffix != ".part")


class Child:
    """work(cache, ready, *arguments) in a process of its own; `ready()` there waits for `go` here. What it returns is `result`."""

    def __init__(self, work, *arguments):
        self.pipe, other = FORK.Pipe()
        self.process = FORK.Process(target=self._run, args=(work, other, arguments), daemon=True)
        self.process.start()
        other.close()

    @staticmethod
    def _run(work, pipe, arguments):
        def ready():
            pipe.send("ready")
            pipe.recv()

        pipe.send(("result", work(ready, *arguments)))

    def wait_ready(self):
        assert self.pipe.recv() == "ready"

    def go(self):
        self.pipe.send("go")

    def result(self):
        word, result = self.pipe.recv()
        self.process.join()
        assert word == "result"
        return result

    def send(self, number: signal.Signals):
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join()


# The folder


def test_a_block_is_kept_and_found_by_another(tmp_path):
    kept = BlockCache(str(tmp_path), 100)
    assert kept.get(key(1)) is None
    kept.put(key(1), b"block")
    assert BlockCache(str(tmp_path), 100).get(key(1)) == b"block"
    kept.put(key(2), bytes(101))  # larger than the cache
    assert kept.get(key(2)) is None and kept.get(key(1)) == b"block", "nothing made room for it in vain"
    kept.drop(key(1))
    kept.drop(key(1))
    assert kept.get(key(1)) is None


def test_the_least_recently_used_go_first(tmp_path):
    kept = BlockCache(str(tmp_path), 100)
    for number in range(10):
        kept.put(key(number), bytes(10))
        time.sleep(0.01)  # the clock of files has steps of milliseconds
    for number in (0, 3):
        assert kept.get(key(number)) == bytes(10)
        time.sleep(0.01)
    kept.put(key(10), bytes(10))  # to nine tenths
    assert [number for number in range(11) if kept.get(key(number)) is not None] == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    for number in range(11, 17):
        time.sleep(0.01)
        kept.put(key(number), bytes(10))
    assert bytes_in(tmp_path) <= 100
    held = {int(path.name[::-1], 16) for path in blocks_in(tmp_path)}
    assert {10, *range(11, 17)} <= held and not {1, 2} & held


def test_what_is_there_already_counts_for_a_new_count(tmp_path):
    kept = BlockCache(str(tmp_path), 100)
    for number in range(9):
        kept.put(key(number), bytes(10))
    os.pwrite(kept._open()[0], (10**9).to_bytes(8, "little"), 0)  # a count that has gone wrong
    kept.put(key(10), bytes(10))
    assert bytes_in(tmp_path) == 90 and int.from_bytes(os.pread(kept._open()[0], 8, 0), "little") == 90


def test_the_limit_holds_while_processes_write(tmp_path):
    """Four processes put blocks as fast as they can, many times the limit, which holds few; the folder is watched."""
    limit = 200_000

    def write(ready, first):
        kept, found = BlockCache(str(tmp_path), limit), 0
        ready()
        for number in range(first, 600, 4):
            kept.put(key(number), bytes(30_000))
            found += kept.get(key(number)) is not None
        return found, kept._warned

    children = [Child(write, number) for number in range(4)]
    for child in children:
        child.wait_ready()
    for child in children:
        child.go()
    most = 0
    watched = BlockCache(str(tmp_path), limit)
    while any(child.process.is_alive() for child in children):
        time.sleep(0.002)
        with watched._locked(watched._open()[0]):  # or a look would take long enough to see what goes and what comes
            most = max(most, bytes_in(tmp_path))
    results = [child.result() for child in children]
    assert limit / 2 < most <= limit and bytes_in(tmp_path) <= limit
    assert sum(found for found, _ in results) > 300, "most blocks are kept, if only for a while"
    assert not any(warned for _, warned in results)
    assert not [path for path in tmp_path.glob("*/*.part")]


def test_eviction_while_another_reads(tmp_path):
    """A block comes whole or not at all."""

    def write(ready):
        kept = BlockCache(str(tmp_path), 200_000)
        ready()
        for number in range(600):
            kept.put(key(number % 40), bytes([number % 40]) * 20_000)

    child, kept, found = Child(write), BlockCache(str(tmp_path), 200_000), 0
    child.wait_ready()
    child.go()
    while child.process.is_alive():
        for number in range(40):
            data = kept.get(key(number))
            found += data is not None
            assert data is None or data == bytes([number]) * 20_000
    child.result()
    assert found > 10


def test_threads_of_a_process_do_not_miscount(tmp_path, monkeypatch):
    """Two streams of a process have a cache each; record locks would let both count at once."""
    read = os.pread

    def read_slowly(*arguments):
        data = read(*arguments)
        time.sleep(0.0005)
        return data

    monkeypatch.setattr(cache.os, "pread", read_slowly)

    def work(first):
        kept = BlockCache(str(tmp_path), 10**9)
        for number in range(first, 400, 4):
            kept.put(key(number), bytes(10))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert int.from_bytes((tmp_path / ".bytes").read_bytes(), "little") == 4000 == bytes_in(tmp_path)


# A disk that fails


def warned(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_full_disk_is_a_warning(tmp_path, caplog, monkeypatch):
    """A small file system of its own; without the right to mount one, the kernel's limit of a file."""
    monkeypatch.setattr(cache, "REST_SEC", 0.2)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount")
    try:
        kept = BlockCache(str(tmp_path), 10**6)
        for number in range(20):
            kept.put(key(number), bytes(10_000))
        assert 2 <= len(blocks_in(tmp_path)) < 7 and not list(tmp_path.glob("*/*.part"))
        assert [kept.get(key(number)) for number in range(2)] == [bytes(10_000)] * 2
        (line,) = warned(caplog)
        assert "No space left" in line and str(tmp_path) in line
        time.sleep(0.3)
        kept.drop(key(0))
        kept.put(key(99), bytes(9_000))  # there is room again
        assert kept.get(key(99)) == bytes(9_000) and len(warned(caplog)) == 1
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_limit_of_the_kernel_is_a_warning(tmp_path):
    def write(ready):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        kept = BlockCache(str(tmp_path), 10**6)
        kept.put(key(1), bytes(6000))
        kept.put(key(2), bytes(1000))
        return kept._warned, kept.get(key(1))

    assert Child(write).result() == (True, None) and not blocks_in(tmp_path) and bytes_in(tmp_path) == 0


def test_a_folder_that_may_only_be_read_is_read(tmp_path, caplog):
    BlockCache(str(tmp_path / "cache"), 10**6).put(key(1), b"block")
    with read_only(tmp_path / "cache"):
        kept = BlockCache(str(tmp_path / "cache"), 10**6)
        assert kept.get(key(1)) == b"block"
        assert kept.claim(key(2)), "who cannot say who fetches fetches"
        kept.release()
        kept.put(key(2), b"other")
        kept.put(key(3), b"other")
    assert len(warned(caplog)) == 1 and kept.get(key(2)) is None


class read_only:
    """A folder that this process may not write, root or not."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __enter__(self):
        if os.getuid():
            for root, _, _ in os.walk(self.folder):
                os.chmod(root, 0o555)
            for path in Path(self.folder).rglob(".*"):
                os.chmod(path, 0o444)
        else:
            done = subprocess.run(["mount", "--bind", self.folder, self.folder], capture_output=True)
            if done.returncode:
                pytest.skip("this root may not mount")
            subprocess.run(["mount", "-o", "remount,ro,bind", self.folder], check=True)

    def __exit__(self, *_):
        if os.getuid():
            for root, _, _ in os.walk(self.folder):
                os.chmod(root, 0o755)
        else:
            subprocess.run(["umount", "-l", self.folder], check=True)


def test_a_folder_that_cannot_be_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    kept = BlockCache(str(tmp_path / "file"), 10**6)
    assert kept.get(key(1)) is None and kept.claim(key(1))
    kept.release()
    kept.put(key(1), b"block")
    assert len(warned(caplog)) == 1


def test_a_folder_that_somebody_empties(tmp_path, caplog):
    kept = BlockCache(str(tmp_path / "cache"), 100)
    for number in range(9):
        kept.put(key(number), bytes(10))
    shutil.rmtree(tmp_path / "cache")
    assert kept.get(key(0)) is None and kept.claim(key(1))
    kept.release()
    other = BlockCache(str(tmp_path / "cache"), 100)
    for number in range(20):
        (kept, other)[number % 2].put(key(number), bytes(10))
        assert bytes_in(tmp_path) <= 100, "both count in the same file"
    assert bytes_in(tmp_path) >= 90 and not warned(caplog)


# Processes that end


def test_a_process_killed_while_it_writes_leaves_no_block(tmp_path):
    """It is killed when the bytes are on the disk, before they have the block's name."""

    def write(ready):
        cache.os.replace = lambda *_: ready()
        BlockCache(str(tmp_path), 100).put("a" * 32, bytes(50))

    child = Child(write)
    child.wait_ready()
    child.send(signal.SIGKILL)
    kept = BlockCache(str(tmp_path), 100)
    assert kept.get("a" * 32) is None
    (part,) = tmp_path.glob("*/*.part")
    kept.put(key(1), bytes(30))
    kept.put(key(2), bytes(30))  # there is no room beside what may still be being written
    assert part.exists() and kept.get(key(2)) == bytes(30) and bytes_in(tmp_path) <= 100
    os.utime(part, (0, time.time() - 2 * cache.ABANDONED_SEC))
    kept.put(key(3), bytes(30))
    assert not part.exists() and kept.get(key(3)) == bytes(30)


def test_what_is_about_to_be_written_counts(tmp_path):
    def write(ready):
        kept = BlockCache(str(tmp_path), 100)
        reserve = kept._reserve
        kept._reserve = lambda *arguments: (reserve(*arguments), ready())[0]
        kept.put(key(0), bytes(50))

    child, kept = Child(write), BlockCache(str(tmp_path), 100)
    child.wait_ready()
    for number in range(1, 6):
        kept.put(key(number), bytes(30))
    child.go()
    child.result()
    assert kept.get(key(0)) == bytes(50) and kept.get(key(5)) == bytes(30) and bytes_in(tmp_path) == 80


def hold(ready, folder):
    """The lock of the count, and the claim of one block."""
    kept = BlockCache(str(folder), 100)
    assert kept.claim(key(1))
    fcntl.lockf(kept._open()[0], fcntl.LOCK_EX)
    ready()


def test_locks_end_with_a_process(tmp_path):
    child, kept = Child(hold, tmp_path), BlockCache(str(tmp_path), 100)
    child.wait_ready()
    assert not kept.claim(key(1)) and kept.claim(key(2))
    kept.release()
    child.send(signal.SIGKILL)
    start = time.monotonic()
    assert kept.claim(key(1))
    kept.release()
    kept.put(key(1), bytes(50))
    assert kept.get(key(1)) == bytes(50) and time.monotonic() - start < SLACK_SEC < cache.LOCK_SEC


def test_a_stopped_process_that_counts_holds_up_the_others_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_SEC", 0.5)
    child, kept = Child(hold, tmp_path), BlockCache(str(tmp_path), 100)
    child.wait_ready()
    child.send(signal.SIGSTOP)
    try:
        start = time.monotonic()
        for number in range(10):
            kept.put(key(number), bytes(5))
        assert (
            time.monotonic() - start < SLACK_SEC < 10 * cache.LOCK_SEC
            and len(warned(caplog)) == 1
            and not blocks_in(tmp_path)
        )
    finally:
        child.send(signal.SIGKILL)
    kept._rests_until = 0
    kept.put(key(1), bytes(5))
    assert kept.get(key(1)) == bytes(5)


# With a stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 images in four shards, label i for image i."""
    path = tmp_path_factory.mktemp("cached")
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 12, 12, 3), dtype=np.uint8)
    np.savez(path / "a.npz", images=images, labels=np.arange(COUNT))
    pack(path / "a.npz", path / "set", resolution=12, samples_per_shard=16, progress=False)
    return path / "set"


@pytest.fixture(scope="module")
def server(folder):
    server = FileServer(folder)
    yield server
    server.kill()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.address)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", BLOCK)


def open_cached(url, path, limit=10**7, **settings):
    settings = {"batch_size": BATCH, "seed": 1, "timeout_sec": 5} | settings
    return ImageStream(url, cache=BlockCache(str(path), limit) if path else None, **settings)


def epochs(stream, count=1):
    steps = count * COUNT // BATCH
    if stream.num_workers:
        batches = stream.batches()
        read = [next(batches) for _ in range(steps)]
        batches.close()
    else:  # without reading ahead, so that nothing goes on when it is done
        read = [stream.at(step * BATCH) for step in range(steps)]
    return torch.cat([batch.images for batch in read]), torch.cat([batch.labels for batch in read])


def same(found, wanted) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.fixture(scope="module")
def wanted(folder):
    return {(seed, n): epochs(ImageStream(folder, batch_size=BATCH, seed=seed), n) for seed in (1, 2) for n in (1, 2)}


def num_blocks(folder) -> int:
    return len(shards.block_starts(Index.load(Folder(folder))))


def test_a_hit_asks_nothing(proxy, folder, tmp_path, wanted):
    assert num_blocks(folder) > 12
    assert same(epochs(open_cached(proxy.url, tmp_path), 2), wanted[1, 2])
    asked = proxy.reads()
    assert len(asked) == num_blocks(folder) == len({(request.path, request.span) for request in asked})
    assert same(epochs(open_cached(proxy.url, tmp_path), 2), wanted[1, 2])
    assert same(epochs(open_cached(proxy.url, tmp_path, seed=2), 2), wanted[2, 2]), "another run shares it"
    assert len(proxy.reads()) == len(asked)


def test_workers_and_runs_of_a_node_fetch_each_block_once(proxy, folder, tmp_path, wanted):
    streams = [open_cached(proxy.url, tmp_path, seed=seed, num_workers=2) for seed in (1, 2)]
    batches = [stream.batches() for stream in streams]
    for step in range(COUNT // BATCH):
        for seed, run in enumerate(batches, 1):
            images, labels = wanted[seed, 1]
            batch, rows = next(run), slice(step * BATCH, (step + 1) * BATCH)
            assert torch.equal(batch.images, images[rows]) and torch.equal(batch.labels, labels[rows])
    for run in batches:
        run.close()
    asked = proxy.reads()
    assert len({(request.path, request.span) for request in asked}) == num_blocks(folder) == len(asked)


def test_a_cache_that_is_too_small_changes_nothing(proxy, folder, tmp_path, wanted):
    limit = 4 * BLOCK
    assert same(epochs(open_cached(proxy.url, tmp_path, limit), 2), wanted[1, 2])
    assert 0 < bytes_in(tmp_path) <= limit
    assert len(proxy.reads()) > num_blocks(folder)


@pytest.mark.parametrize("limit", [1, 20_000])
def test_a_cache_that_keeps_next_to_nothing_costs_nothing(proxy, folder, tmp_path, wanted, limit, monkeypatch):
    """No block is read for each of its samples again."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 10_000)
    stream = open_cached(proxy.url, tmp_path, limit, batch_size=1)
    images = torch.cat([stream.at(position).images for position in range(COUNT)])
    assert torch.equal(images, wanted[1, 1][0])
    spans = [request.span.removeprefix("bytes=").split("-") for request in proxy.reads()]
    asked = sum(int(last) + 1 - int(first) for first, last in spans)
    assert asked <= sum(shard.size_bytes for shard in Index.load(Folder(folder)).shards)


@pytest.mark.parametrize("crc32", [True, False])
@pytest.mark.parametrize("fault", ["a flipped bit", "cut", "empty", "longer", "another block", "a folder"])
def test_what_is_damaged_in_the_cache_is_fetched_again(folder, proxy, tmp_path, wanted, fault, crc32):
    url, path = proxy.url, tmp_path / "cache"
    if not crc32:  # an index made from headers alone
        index = dataclasses.replace(Index.load(Folder(folder)), crc32=None, base=url)
        index.dump(Folder(tmp_path / "headers"))
        url = str(tmp_path / "headers")
    assert same(epochs(open_cached(url, path)), wanted[1, 1])
    blocks = blocks_in(path)
    first = blocks[0].read_bytes()
    for number, block in enumerate(blocks):
        data = bytearray(block.read_bytes())
        data[(7919 * number) % (len(data) - 8)] ^= 1 << number % 8
        damaged = {
            "a flipped bit": data, "cut": data[: len(data) // 2], "empty": b"", "longer": block.read_bytes() + b"x",
            "another block": first,
        }  # fmt: skip
        if fault == "a folder":
            block.unlink()
            block.mkdir()
        else:
            block.write_bytes(damaged[fault])
    before = len(proxy.reads())
    assert same(epochs(open_cached(url, path)), wanted[1, 1])
    again = len(proxy.reads()) - before
    if fault in ("a flipped bit", "a folder"):  # a bit between samples is nobody's business
        assert num_blocks(folder) / 2 < again <= num_blocks(folder)
    else:
        assert num_blocks(folder) - 1 <= again <= num_blocks(folder)
    if fault != "a folder":
        assert same(epochs(open_cached(url, path)), wanted[1, 1]) and len(proxy.reads()) == before + again, "mended"


@pytest.mark.parametrize("crc32", [True, False])
def test_a_sample_that_is_damaged_in_storage_heals_when_the_shard_does(folder, tmp_path, wanted, crc32):
    served = Path(shutil.copytree(folder, tmp_path / "set"))
    server, whole = FileServer(served), Index.load(Folder(folder))
    try:
        index = dataclasses.replace(whole, crc32=whole.crc32 if crc32 else None, base=server.url)
        index.dump(Folder(tmp_path / "index"))
        shard = served / index.shards[1].name
        data = shard.read_bytes()
        shard.write_bytes(data[: int(index.offset[20]) + 3])
        settings = {"on_corrupt": "substitute", "retries": 0}
        stream = open_cached(tmp_path / "index", tmp_path / "cache", **settings)
        assert len([m for b in (stream.at(i * BATCH) for i in range(4)) for m in b.substituted]) == 12
        assert len(stream.at(0).substituted) == sum(20 <= n < 32 for n in stream.order.sample_at(range(BATCH)))
        shard.write_bytes(data)
        assert same(epochs(open_cached(tmp_path / "index", tmp_path / "cache", **settings)), wanted[1, 1])
    finally:
        server.kill()


def test_a_repacked_set_is_another(folder, tmp_path, wanted):
    """Of the same name, at the same place."""
    served = Path(shutil.copytree(folder, tmp_path / "set"))
    server = FileServer(served)
    try:
        epochs(open_cached(server.url, tmp_path / "cache"))
        images = np.random.default_rng(9).integers(0, 256, (COUNT, 12, 12, 3), dtype=np.uint8)
        np.savez(tmp_path / "b.npz", images=images, labels=np.arange(COUNT))
        shutil.rmtree(served)
        pack(tmp_path / "b.npz", served, resolution=12, samples_per_shard=16, progress=False)
        found, labels = epochs(open_cached(server.url, tmp_path / "cache"))
        assert np.array_equal(found.numpy(), images[labels].transpose(0, 3, 1, 2))
        assert len(blocks_in(tmp_path / "cache")) == 2 * num_blocks(folder), (
            "the blocks of the one do not push out the other's"
        )
    finally:
        server.kill()


def test_a_stopped_process_that_claims_is_waited_for_and_then_not(proxy, tmp_path, wanted):

    def claim(ready):
        fcntl.lockf(BlockCache(str(tmp_path), 10**7)._open()[1], fcntl.LOCK_EX)  # all blocks there are
        ready()

    child = Child(claim)
    child.wait_ready()
    child.send(signal.SIGSTOP)
    try:
        stream = open_cached(proxy.url, tmp_path, timeout_sec=SLACK_SEC)
        start = time.monotonic()
        batch = stream.at(0)
        elapsed = time.monotonic() - start
        assert SLACK_SEC <= elapsed < stream.shards.patience_sec
        assert torch.equal(batch.labels, wanted[1, 1][1][:BATCH])
        start = time.monotonic()
        assert same((stream.at(0).images, batch.labels), [part[:BATCH] for part in wanted[1, 1]])
        assert time.monotonic() - start < SLACK_SEC, "what is in the cache is not waited for"
    finally:
        child.send(signal.SIGKILL)


def test_a_process_killed_while_it_fetches_is_not_waited_for(proxy, folder, tmp_path, wanted):
    def read(ready):
        stream = open_cached(proxy.url, tmp_path, timeout_sec=60)
        ready()
        stream.at(0)

    child = Child(read)
    child.wait_ready()
    proxy.disturb("stall in the body")
    child.go()
    while not proxy.reads():
        time.sleep(0.01)
    time.sleep(0.2)
    kept = BlockCache(str(tmp_path), 10**7)
    reader = open_cached(proxy.url, tmp_path).shards
    claimed = [kept.claim(reader._key(reader._block(block))) for block in range(num_blocks(folder))]
    kept.release()
    assert not all(claimed), "it holds claims"
    child.send(signal.SIGKILL)
    proxy.behave()
    start = time.monotonic()
    assert same(epochs(open_cached(proxy.url, tmp_path, timeout_sec=60)), wanted[1, 1])
    assert time.monotonic() - start < 10


def test_processes_killed_at_any_moment_leave_what_others_can_use(server, tmp_path, wanted):
    """Readers are killed again and again while they read through a cache that is too small for the set."""

    def read(ready):
        stream = open_cached(server.url, tmp_path, 10_000)
        ready()
        for position in range(0, 10**9, BATCH):
            stream.at(position)

    draw = np.random.default_rng(0)
    for _ in range(8):
        children = [Child(read) for _ in range(2)]
        for child in children:
            child.wait_ready()
            child.go()
        time.sleep(draw.uniform(0.02, 0.3))
        for child in children:
            child.send(signal.SIGKILL)
        assert bytes_in(tmp_path) <= 10_000
    assert same(epochs(open_cached(server.url, tmp_path, 10_000), 2), wanted[1, 2])
    assert bytes_in(tmp_path) <= 10_000


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_when_the_cache_cannot_be_written(proxy, tmp_path, wanted, num_workers):
    (tmp_path / "file").write_text("")
    assert same(epochs(open_cached(proxy.url, tmp_path / "file", num_workers=num_workers)), wanted[1, 1])


def test_a_stream_goes_on_when_the_disk_is_full(proxy, wanted):
    with tempfile.TemporaryDirectory() as path:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", path], capture_output=True)
        if mounted.returncode:
            pytest.skip("this user may not mount")
        try:
            assert same(epochs(open_cached(proxy.url, path, num_workers=1), 2), wanted[1, 2])
            full = os.statvfs(path)
            assert full.f_bavail == 0 or bytes_in(path) > 4 * BLOCK
        finally:
            subprocess.run(["umount", "-l", path], check=True)


def test_claims_end_with_a_read_that_fails(proxy, folder, tmp_path):
    stream = open_cached(proxy.url, tmp_path, retries=0, timeout_sec=1)
    proxy.disturb("500")
    with pytest.raises(Exception, match="cannot read"):
        stream.at(0)

    def claim(ready):
        fcntl.lockf(BlockCache(str(tmp_path), 10**7)._open()[1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # all blocks there are
        return "claimed"

    assert Child(claim).result() == "claimed"


def test_locks_that_the_file_system_does_not_have(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    kept = BlockCache(str(tmp_path), 100)
    kept._open()
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert kept.claim(key(1))
    kept.put(key(1), b"block")  # what cannot be counted is not kept
    assert kept.get(key(1)) is None
