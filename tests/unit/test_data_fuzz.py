"""Proves that what comes from elsewhere can be damaged or hostile in any way: thousands of mutations of every format that is
parsed here give the set or a UserError and nothing else; no other exception, no gigabytes, no file written or program run.

    python -m pytest tests/unit/test_data_fuzz.py

Every format runs in a forked process of its own with limited memory, whose every open, import and system call is watched.
SIVAE_FUZZ_ROUNDS=20000 searches longer than the default run.
"""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import struct
import sys
import tarfile
import traceback
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import scipy.io

from sivae.data import index
from sivae.data.sources import idx as module
from sivae.data.sources import open_source
from sivae.errors import UserError
from tests.unit.source_files import (
    BATCHES,
    cifar_binary,
    cifar_pickle,
    cifar_pickle_of_python_3,
    idx,
    masked,
    noise,
    png,
    tar,
    tfrecord,
    write_ffhq,
)

ROUNDS = int(os.environ.get("SIVAE_FUZZ_ROUNDS", 600))
MORE_MEMORY_BYTES = 2**30  # address space over what the process has already; it is a limit, not what is taken
MORE_RESIDENT_BYTES = 2**27  # what all of it together may take
HUGE = [
    struct.pack(f"{order}{kind}", (1 << bits) - 1) for order in "<>" for kind, bits in (("I", 32), ("Q", 64), ("I", 31))
]
HUGE += [struct.pack(f"{order}{kind}", 2**power) for order in "<>" for kind, power in (("I", 20), ("I", 30), ("Q", 40))]
HUGE += [b"99999999999", b"7777777777", b"-1", b"0", b"1e999", b"null", b"\x00" * 4, b"\x80" + bytes(7)]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to four bytes flipped, stretches cut, doubled or inserted, or numbers made absurd."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        # Half of all changes fall into the first 300 bytes, where headers are.
        at = draw.randrange(min(len(data), 300) if draw.random() < 0.5 and data else len(data) or 1)
        length = draw.choice([1, 2, 4, 8, 16, 100])
        match draw.randrange(7):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([(data[at] if data else 0) ^ 1 << draw.randrange(8)])
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = bytes(draw.randrange(256) for _ in range(length))
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                value = draw.choice(HUGE)
                data[at : at + len(value)] = value
            case 6:
                del data[at:]
    return bytes(data)


def zipped(data: bytes, stop: int) -> bytes:
    """A MATLAB file whose first matrix, from byte 128 to `stop`, is deflated."""
    packed = zlib.compress(data[128:stop])
    return data[:128] + struct.pack("<II", 15, len(packed)) + packed + data[stop:]


def contents() -> dict[str, tuple[str, bytes, list]]:
    """Format -> (file name, valid bytes, what is done to mutated bytes before they are written)."""
    pictures = {f"00000/img{i}.png": noise(4, 4, 3, seed=i) for i in range(2)}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, picture in pictures.items():
            file.writestr(name, png(picture))
        file.writestr("dataset.json", json.dumps({"labels": [[name, 1] for name in pictures]}))
    npz, packed_npz, npy, mat = (io.BytesIO() for _ in range(4))
    arrays = {"images": noise(2, 4, 4, 3), "labels": np.array([0, 1])}
    np.savez(npz, **arrays)
    np.savez_compressed(packed_npz, **arrays)
    np.save(npy, arrays["images"])
    scipy.io.savemat(mat, {"X": noise(32, 32, 3, 2), "y": np.array([[1], [10]], np.uint8)})
    mat = mat.getvalue()
    first = 136 + struct.unpack_from("<I", mat, 132)[0]  # where its second matrix begins
    batches = [(f"cifar-10-batches-py/{name}", cifar_pickle(noise(1, 3072), [3])) for name in BATCHES]
    members = [("a.cls", b"1"), ("a.json", b'{"author": "x"}'), ("a.png", png(noise(4, 4)))]
    members += [("x" * 150 + ".cls", b"0"), ("x" * 150 + ".png", png(noise(4, 4)))]
    return {
        "zip": ("a.zip", archive.getvalue(), []),
        "npz": ("a.npz", npz.getvalue(), []),
        "npz, deflated": ("a.npz", packed_npz.getvalue(), []),
        "npy": ("a.npy", npy.getvalue(), []),
        "idx": ("train-images-idx3-ubyte", idx(noise(2, 4, 4)), []),
        "idx, gzipped": ("train-images-idx3-ubyte.gz", gzip.compress(idx(noise(2, 4, 4))), []),
        "idx inside of gzip": ("train-images-idx3-ubyte.gz", idx(noise(2, 4, 4)), [gzip.compress]),
        "tfrecords": ("a.tfrecords", tfrecord(noise(3, 4, 4)) * 3, []),
        "tf.train.Example": ("a.tfrecords", tfrecord(noise(3, 4, 4))[12:-4], [framed]),
        "mat": ("a.mat", mat, []),
        "mat, deflated": ("a.mat", zipped(mat, first), []),
        "mat inside of deflate": ("a.mat", mat, [lambda data: zipped(data, first)]),
        "cifar pickle": ("data_batch_1", cifar_pickle(noise(1, 3072), [3]), []),
        "cifar pickle of python 3": ("data_batch_1", cifar_pickle_of_python_3(noise(1, 3072), [3]), []),
        "cifar binary": ("data_batch_1.bin", cifar_binary(noise(1, 3072), [3]), []),
        "cifar archive": ("cifar-10-python.tar.gz", tar(batches, "w:gz"), []),
        "cifar tar inside of gzip": ("cifar-10-python.tar.gz", tar(batches), [gzip.compress]),
        "tar": ("a.tar", tar(members), []),
        "png": ("in/a.png", png(noise(4, 4, 3)), []),
        "ffhq": ("ffhq-dataset-v2.json", b"", []),
    }


def framed(example: bytes) -> bytes:
    """A record with right checksums around anything."""
    length = struct.pack("<Q", len(example))
    return length + masked(length) + example + masked(example)


FORMATS = contents()


def read_all(path: str):
    source = open_source(path, resolution=4)
    for i in range(min(len(source), 5)):
        try:
            sample = source[i]
        except UserError:
            continue
        assert sample.pixels.dtype == np.uint8 and sample.pixels.ndim == 3 and sample.pixels.shape[2] in (1, 3)
        assert sample.label is None or sample.label >= 0
    assert source.num_channels in (1, 3)


def watch(folder: str) -> list[str]:
    """What this process does from now on that reading a file is no reason for."""
    found = []

    def look(event: str, arguments: tuple):
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not str(path).startswith(folder):
                found.append(f"open {path} {mode} {flags}")
        elif event.split(".")[0] in ("subprocess", "socket", "shutil", "exec", "pickle") or event in (
            "os.system", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.exec", "os.posix_spawn", "os.symlink",
        ):  # fmt: skip
            # numpy's header parser compiles a literal, and CIFAR's stand-ins are looked up through find_class
            if event not in ("exec", "pickle.find_class"):
                found.append(f"{event} {arguments}")

    sys.addaudithook(look)
    return found


def fuzz(name: str, folder: str, answer):
    """Runs in a process of its own; sends what went wrong, or how often the content was still read."""
    sys.dont_write_bytecode = True
    file_name, valid, steps = FORMATS[name]
    draw = random.Random(name)
    read = 0
    try:
        if name == "ffhq":
            write_ffhq(folder, "images1024x1024")
            with open(f"{folder}/{file_name}", "rb") as file:
                valid = file.read()
        path = f"{folder}/{file_name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for batch in BATCHES if file_name.startswith("data_batch_1") else ():
            encode = cifar_binary if file_name.endswith(".bin") else cifar_pickle
            with open(f"{folder}/{batch}{'.bin' if file_name.endswith('.bin') else ''}", "wb") as file:
                file.write(encode(noise(1, 3072), [3]))
        single = not file_name.startswith(("data_batch", "ffhq", "in/"))
        for round in range(ROUNDS + 1):
            data = mutated(valid, draw) if round else valid
            for step in steps:
                data = step(data)
            with open(path, "wb") as file:
                file.write(data)
            try:
                read_all(path if single else os.path.dirname(path))
                read += 1
            except UserError as error:
                assert round, f"the valid file is refused: {error}"
                assert "\n" not in str(error).strip() and len(str(error)) < 2000, str(error)
            if not round:  # all is imported and warm
                size = int(re.search(r"VmSize:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
                resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY_BYTES,) * 2)
                found, resident = watch(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
        assert not found, found[:5]
        assert more < MORE_RESIDENT_BYTES, f"{more:,} bytes more"
        answer.send(read)
    except BaseException:
        answer.send(f"round {round}\n{traceback.format_exc()}")


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_are_read_or_refused(name, tmp_path):
    context = multiprocessing.get_context("fork")  # with the imports of this process
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=fuzz, args=(name, str(tmp_path), send))
    child.start()
    send.close()
    try:
        read = receive.recv()
    except EOFError:
        read = "the process died"
    child.join()
    assert isinstance(read, int) and child.exitcode == 0, f"{child.exitcode} {read}"
    assert 1 <= read < ROUNDS  # some mutations change nothing that matters, and most do


def test_mutations_of_an_index_are_refused():
    data = tar([("00000000.png", png(noise(4, 4)))])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        member = archive.next()
    made = index.Index(
        resolution=4, num_channels=1, num_classes=2, image_format="png", source="x", splits={"train": 1},
        shards=(index.Shard("a.tar", len(data), 1),), key=["00000000"], offset=np.array([member.offset_data]),
        size=np.array([member.size]), crc32=np.array([1]), label=np.array([1]),
    )  # fmt: skip
    whole = index._canonical(made._content() | {"base": None, "digest": made.digest})
    assert index.parse(whole, "x").digest == made.digest
    draw = random.Random(0)
    for _ in range(10 * ROUNDS):
        try:
            assert index.parse(mutated(whole, draw), "x").digest == made.digest
        except UserError as error:
            assert str(error).startswith("x ")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """A megabyte that becomes 256, in formats that unpack: declared or not, no more is unpacked than can be right."""
    zeros = bytes(2**28)
    mat = b"MATLAB 5.0".ljust(124) + b"\x00\x01IM"
    packed = zlib.compress(struct.pack("<II", 14, 100) + zeros, 1)
    bombs = {
        "zeros-images-idx3-ubyte.gz": gzip.compress(zeros, 1),
        "image-images-idx3-ubyte.gz": gzip.compress(idx(noise(1, 4, 4)) + zeros, 1),
        "a.mat": mat + struct.pack("<II", 15, len(packed)) + packed,
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
        tracemalloc.start()
        with pytest.raises(UserError, match=name):
            open_source(tmp_path / name, resolution=4)
        assert tracemalloc.get_traced_memory()[1] < 2**26, name
        tracemalloc.stop()


@pytest.mark.parametrize("fault", ["exception", "memory", "write", "death"])
def test_the_fuzzer_finds_what_it_is_there_for(fault, tmp_path, monkeypatch):
    """The parser of idx made wrong on purpose."""
    whole, kept = module.read_exactly, []

    def wrong(stream, size, bound):
        if size > bound:
            if fault == "write":
                os.mkdir(tmp_path / f"made-{size}")
            elif fault == "death":
                os._exit(1)
            elif fault == "memory" and not kept:
                kept.append(np.ones(2**28, np.uint8))
        return whole(stream, size, bound)

    monkeypatch.setattr(module, "read_exactly", wrong)
    if fault == "exception":
        monkeypatch.setattr(module, "damage", lambda *_: contextlib.nullcontext())
    expected = {"exception": "ValueError", "write": "os.mkdir", "death": "the process died", "memory": "bytes more"}
    with pytest.raises(AssertionError, match=expected[fault]):
        test_mutations_are_read_or_refused("idx", tmp_path)
