"""Proves that a checkpoint reads back as it was saved, that damage of any kind is found and the one before it used, that a
killed save does not count, that a full disk publishes nothing and harms nothing, and that all of it holds in memory and on S3.

    python -m pytest tests/unit/test_checkpoint.py
"""

import io
import json
import pickletools
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest
import torch

from sivae import checkpoint
from sivae.checkpoint import Damaged
from sivae.errors import UserError
from sivae.storage import Folder
from tests import proxy as faults
from tests.proxy import Proxy

ROOT = Path(__file__).parents[2]  # where a subprocess finds both sivae and these tests


@pytest.fixture(scope="module")
def s3():
    """A real S3 server on loopback: its storage options."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "test", "secret": "test", "endpoint_url": f"http://{host}:{port}"}
    Folder("s3://bucket", options).fs.mkdir("bucket")
    yield options
    server.stop()


@pytest.fixture(params=["local", "memory", "s3"])
def run(request, tmp_path):
    """A run directory, wherever it may lie."""
    if request.param == "local":
        return Folder(str(tmp_path / "run"))
    if request.param == "memory":
        return Folder(f"memory://{uuid.uuid4().hex}/run")
    return Folder(f"s3://bucket/{uuid.uuid4().hex}/run", request.getfixturevalue("s3"))


@pytest.fixture
def local(tmp_path):
    return Folder(str(tmp_path / "run"))


def tensors(seed=0, size=40):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": {
            "encoder.a": torch.randn(size, 3, generator=generator),
            "decoder.b": torch.randn(3, size, generator=generator).T,  # not contiguous
            "decoder.count": torch.tensor(seed),
        },
        "average": {"encoder.a": torch.randn(size, 3, generator=generator).bfloat16()},
    }


def save(run, images_seen, keep=10, seed=None):
    seed = images_seen if seed is None else seed
    name = checkpoint.save(run, {"images_seen": images_seen, "seed": seed}, tensors(seed))
    checkpoint.prune(run, keep)
    return name


def newest(run):
    """What is read, and what is reported."""
    told = []
    return checkpoint.read_newest(run, told.append), told


def same(found, seed):
    expected = tensors(seed)
    return {file: set(named) for file, named in found.tensors.items()} == {
        file: set(named) for file, named in expected.items()
    } and all(
        torch.equal(found.tensors[file][name], value) and found.tensors[file][name].dtype == value.dtype
        for file, named in expected.items()
        for name, value in named.items()
    )


def damage(run, name, file, change):
    data = run.read("checkpoints", name, file)
    run.write(bytes(change(bytearray(data))), "checkpoints", name, file)


def flip(data, place=None):
    data[len(data) // 2 if place is None else place] ^= 1
    return data


def test_nothing_there_is_nothing(run):
    assert checkpoint.list_names(run) == [] and newest(run) == (None, [])


def test_save_list_read_prune(run):
    names = [save(run, images, keep=2) for images in (100, 9000, 12_000)]
    assert names == ["000000000100", "000000009000", "000000012000"]
    assert checkpoint.list_names(run) == names[1:] == run.names("checkpoints")
    found, told = newest(run)
    assert found.name == names[2] and found.images_seen == 12_000 and told == []
    assert found.state == {"images_seen": 12_000, "seed": 12_000} and same(found, 12_000)
    assert same(checkpoint.read(run, names[1]), 9000)
    some = checkpoint.read(run, names[1], files=("average",))
    assert set(some.tensors) == {"average"}


def test_nothing_in_a_checkpoint_is_a_pickle(local):
    name = save(local, 100)
    files = local.names("checkpoints", name)
    assert files == ["average.safetensors", "manifest.json", "state.json", "weights.safetensors"]
    for file in files:
        data = local.read("checkpoints", name, file)
        if file.endswith(".json"):
            json.loads(data)
        else:
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # a safetensors header
        with pytest.raises(ValueError):
            list(pickletools.genops(io.BytesIO(data)))
        assert not data.startswith(b"PK")  # the zip of torch.save


def test_a_damaged_newest_is_reported_and_the_one_before_it_used(run):
    save(run, 100), save(run, 200)
    damage(run, "000000000200", "weights.safetensors", flip)
    found, told = newest(run)
    assert found.images_seen == 100 and same(found, 100)
    assert len(told) == 1 and "000000000200" in told[0] and "weights.safetensors does not match" in told[0]


DAMAGE = {
    "a byte of a header": lambda run, name: damage(run, name, "weights.safetensors", lambda data: flip(data, 10)),
    "a truncated tensor file": lambda run, name: damage(run, name, "weights.safetensors", lambda data: data[:-1]),
    "an emptied tensor file": lambda run, name: damage(run, name, "average.safetensors", lambda data: b""),
    "a longer file": lambda run, name: damage(run, name, "average.safetensors", lambda data: data + b"x"),
    "a missing tensor file": lambda run, name: run.remove("checkpoints", name, "average.safetensors"),
    "a byte of the state": lambda run, name: damage(run, name, "state.json", lambda data: data.replace(b"200", b"201")),
    "a missing state": lambda run, name: run.remove("checkpoints", name, "state.json"),
    "an empty manifest": lambda run, name: damage(run, name, "manifest.json", lambda data: b""),
    "a garbage manifest": lambda run, name: damage(run, name, "manifest.json", lambda data: b"\xff\x00garbage"),
    "a truncated manifest": lambda run, name: damage(run, name, "manifest.json", lambda data: data[: len(data) // 2]),
    "a manifest of another kind": lambda run, name: damage(run, name, "manifest.json", lambda data: b"[1, 2]"),
    "a manifest without files": lambda run, name: damage(run, name, "manifest.json", lambda data: b'{"files": {}}'),
    "files that are a list": lambda run, name: damage(run, name, "manifest.json", lambda data: b'{"files": [1]}'),
}


@pytest.fixture
def distant(s3):
    """(a run on S3, the proxy before it)."""
    proxy = Proxy(
        (s3["endpoint_url"].removeprefix("http://").split(":")[0], int(s3["endpoint_url"].rpartition(":")[2]))
    )
    # As of a store that sends no checksums, which botocore would compare
    config = {"response_checksum_validation": "when_required"}
    options = s3 | {"endpoint_url": proxy.url, "config_kwargs": config}
    yield Folder(f"s3://bucket/{uuid.uuid4().hex}", options, timeout_sec=5, retries=2, backoff_sec=0.01), proxy
    proxy.close()


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "weights.safetensors"])
@pytest.mark.parametrize("fault", [faults.WRONG, faults.SHORT])
def test_a_wrong_answer_is_no_damage(distant, file, fault):
    run, proxy = distant
    save(run, 100)
    proxy.disturb(fault, times=2, match=file)
    found, told = newest(run)
    assert same(found, 100) and not told and proxy.times == 0


def test_a_wrong_answer_does_not_cost_the_best(distant):
    run, proxy = distant
    best = save(run, 100)
    checkpoint.set_best(run, best, {})
    save(run, 200)
    proxy.disturb(faults.WRONG, times=2, match="best.json")
    checkpoint.prune(run, 1)
    assert checkpoint.list_names(run) == [best, "000000000200"] and proxy.times == 0


def test_a_large_file_may_come_slowly(distant):
    run, proxy = distant
    checkpoint.save(run, {"images_seen": 100}, {"optimizer": {"step": torch.zeros(500_000)}})
    run.timeout_sec, run.retries = 0.5, 0
    proxy.disturb(faults.SLOW, match="optimizer")
    found, _ = newest(run)
    assert found.tensors["optimizer"]["step"].numel() == 500_000


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_is_found(local, kind):
    save(local, 100), save(local, 200)
    assert newest(local)[0].images_seen == 200
    DAMAGE[kind](local, "000000000200")
    found, told = newest(local)
    assert found.images_seen == 100 and len(told) == 1 and "damaged" in told[0]
    with pytest.raises(Damaged, match="000000000200"):
        checkpoint.read(local, "000000000200")


def test_every_byte_counts(local):
    save(local, 100)
    for file in local.names("checkpoints", "000000000100"):
        if file != "manifest.json":
            size = len(local.read("checkpoints", "000000000100", file))
            for place in range(0, size, 97):
                damage(local, "000000000100", file, lambda data: flip(data, place))
                with pytest.raises(Damaged):
                    checkpoint.read(local, "000000000100")
                damage(local, "000000000100", file, lambda data: flip(data, place))
    assert same(checkpoint.read(local, "000000000100"), 100)


def test_all_damaged_is_an_error_that_names_them(run):
    for images in (100, 200):
        damage(run, save(run, images), "weights.safetensors", flip)
    told = []
    with pytest.raises(UserError, match="every checkpoint is damaged .*000000000100, 000000000200"):
        checkpoint.read_newest(run, told.append)
    assert len(told) == 2


def test_another_format_is_no_damage(local):
    """A checkpoint of a later version is not passed over in silence for an older one."""
    save(local, 100), save(local, 200)
    damage(local, "000000000200", "manifest.json", lambda data: data.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(UserError, match="has format 2"):
        newest(local)


def test_a_killed_save_does_not_count_and_is_cleaned_up(run):
    save(run, 100)
    save(run, 200)
    run.remove("checkpoints", "000000000200", "manifest.json")  # what a kill before publishing leaves
    assert checkpoint.list_names(run) == ["000000000100"]
    found, told = newest(run)
    assert found.images_seen == 100 and told == []
    save(run, 300)
    assert run.names("checkpoints") == ["000000000100", "000000000300"]


def test_a_really_killed_save(tmp_path):
    """A process that is SIGKILLed after its second file: no checkpoint, and the next save at that count is whole."""
    local = Folder(str(tmp_path / "run"))
    save(local, 100)
    code = f"""
        import os, signal
        from sivae import storage
        from tests.unit.test_checkpoint import save, Folder
        write, written = storage.Folder.write, []
        def counted(self, *arguments):
            write(self, *arguments)
            written.append(1)
            if len(written) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        storage.Folder.write = counted
        save(Folder({str(tmp_path / "run")!r}), 200)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -9, done.stderr
    assert len(local.names("checkpoints", "000000000200")) == 2 and newest(local)[0].images_seen == 100
    name = save(local, 200)
    assert newest(local)[0].name == name and same(newest(local)[0], 200)


def test_the_same_count_again_is_another_checkpoint(run):
    """After a damaged newest one a run comes by the same count again: nothing is written over."""
    first, second, third = save(run, 100, seed=1), save(run, 100, seed=2), save(run, 100, seed=3)
    assert [first, second, third] == ["000000000100", "000000000100.1", "000000000100.2"]
    assert checkpoint.list_names(run) == [first, second, third]
    assert same(newest(run)[0], 3) and same(checkpoint.read(run, first), 1)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_same_count_often_and_pruned_still_reads_the_last(local, keep):
    """However many were pruned, the last save is the newest."""
    for seed in range(6):
        there = checkpoint.list_names(local)
        name = save(local, 100, keep=keep, seed=seed)
        assert name not in there, "nothing is written over"
        assert same(checkpoint.read(local, name), seed)
        assert checkpoint.list_names(local)[-1] == name, f"save {seed} is not the newest"
        assert len(checkpoint.list_names(local)) <= keep


def test_every_tensor_begins_at_a_multiple_of_its_elements():
    """So that a reader may map the file and use it as it lies."""
    kinds = (torch.bool, torch.float32, torch.uint8, torch.int64, torch.bfloat16)
    named = {f"{index}": torch.ones(3, dtype=kind) for index, kind in enumerate(kinds)}
    data = b"".join(checkpoint.to_safetensors(named))
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 8 == 0
    for name, described in json.loads(data[8 : 8 + length]).items():
        assert described["data_offsets"][0] % named[name].element_size() == 0, name


def test_what_was_set_aside_stays_until_the_run_is_past_it(local):
    """A person may want to look at a damaged checkpoint, and it is newer than all that the run has made since."""
    for images_seen in (100, 300):
        save(local, images_seen)
    damage(local, "000000000300", "weights.safetensors", flip)
    found = checkpoint.read_newest(local, lambda line: None, set_aside=True)
    assert found.name == "000000000100" == checkpoint.list_names(local)[-1]
    save(local, 200, keep=1)
    assert local.names("checkpoints") == ["000000000200", "000000000300"]
    save(local, 300, keep=1)
    assert local.names("checkpoints") == ["000000000300.1"]


def test_the_best_is_kept_and_is_none_once_it_is_gone(local):
    assert checkpoint.best(local) is None
    save(local, 100)
    checkpoint.set_best(local, "000000000100", {"value": 0.5})
    for images_seen in (200, 300):
        save(local, images_seen, keep=1)
    assert checkpoint.list_names(local) == ["000000000100", "000000000300"]
    assert checkpoint.best(local) == {"name": "000000000100", "value": 0.5}
    local.remove("checkpoints", "000000000100")
    assert checkpoint.best(local) is None
    for damaged in (b"{", b"[]", b'{"value": 1}', b"7"):
        local.write(damaged, "checkpoints", checkpoint.BEST)
        assert checkpoint.best(local) is None, damaged


def test_names_sort_by_number():
    names = ["000000000100.10", "000000000100.9", "000000000099", "000000000100", "1000000000000"]
    assert sorted(names, key=checkpoint._order)[:4] == [
        "000000000099", "000000000100", "000000000100.9", "000000000100.10",
    ]  # fmt: skip


def test_other_folders_are_left_alone(local):
    local.write(b"mine", "checkpoints", "notes", "manifest.json")
    for images in (100, 200, 300):
        save(local, images, keep=1)
    assert local.names("checkpoints") == ["000000000300", "notes"]


LIMITED = """
    import resource, signal, sys
    from tests.unit.test_checkpoint import save, Folder, UserError, tensors, checkpoint
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    try:
        checkpoint.save(Folder(sys.argv[1]), {"images_seen": 300}, tensors(3, size=5000))
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("limit", [0, 4096, 100_000])
def test_a_full_disk_publishes_nothing_and_harms_nothing(tmp_path, limit):
    """The process really cannot write more than `limit` bytes into a file; 100,000 stops in the middle of the weights."""
    local = Folder(str(tmp_path / "run"))
    save(local, 100), save(local, 200)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), local.path, str(limit)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    assert "weights.safetensors: cannot write, the disk is full" in done.stdout and "free space" in done.stdout
    assert local.names("checkpoints") == ["000000000100", "000000000200"]
    assert same(newest(local)[0], 200) and same(checkpoint.read(local, "000000000100"), 100)


def test_a_real_full_file_system(tmp_path):
    """/dev/full answers every write with ENOSPC, as a full disk does."""
    local = Folder(str(tmp_path))
    (tmp_path / "file").symlink_to("/dev/full")
    with pytest.raises(UserError, match="disk is full"):
        local._guard("write", lambda: open(tmp_path / "file", "wb", buffering=0).write(b"x"), "file")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write") as caught:
        save(Folder(str(tmp_path / "run")), 100)
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_and_a_dead_server_are_one_sentence():
    with pytest.raises(UserError, match=r"nowhere://x: cannot be opened"):
        Folder("nowhere://x").exists("y")
    pytest.importorskip("s3fs")
    dead = {
        "key": "x",
        "secret": "x",
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    with pytest.raises(UserError, match="s3://bucket/run") as caught:
        checkpoint.list_names(Folder("s3://bucket/run", dead, retries=0))
    assert "\n" not in str(caught.value)
