"""What feeding images costs: CPU time per image of decoding alone, of sivae's reader over local disk and over S3, and of others.

    python -m benchmarks.data [--images 160] [--work FOLDER] [--output benchmarks/results] [--peer]

One table from one run on one machine, on photo-like 1024-pixel images with FFHQ's bytes (benchmarks/photos.py). CPU time is the
whole reading process's, all threads and the kernel's work for it; the S3 server (moto, on loopback) is another process. Every
row is measured in each of several rounds, in turn, so that a slow minute of the machine falls on all; the median is shown.
A ratio tells more than its milliseconds. --peer adds mosaicml-streaming where it is installed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sivae
from benchmarks import photos
from benchmarks.digits import machine
from sivae.data import ImageStream
from sivae.data.decode import DECODERS
from sivae.data.pack import pack

BATCH = 8
ROUNDS = 5
FORMATS = {"png": {}, "qoi": {}, "webp": {}, "jpeg": {"quality": 95}}


def cpu_sec() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def s3_server() -> Iterator[dict]:
    """fsspec's storage options of a moto server in a process of its own, with a bucket `bench`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    options = {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"}}
    try:
        import s3fs

        for attempt in itertools.count():
            try:
                s3fs.S3FileSystem(**options, skip_instance_cache=True).mkdir("bench")
                break
            except Exception:  # noqa: BLE001 - it is still starting
                if attempt > 60 or server.poll() is not None:
                    raise
                time.sleep(0.5)
        yield options
    finally:
        server.kill()


# Rows: each returns a function that reads n images and returns how many bytes of pixels came


def decode_alone(folder: str) -> Callable[[int], int]:
    """Encoded bytes are in memory already."""
    stream = ImageStream(folder, batch_size=1)
    index = stream.index
    encoded = stream.shards.read(range(len(stream)))
    decode = DECODERS[index.image_format]

    def read(count: int) -> int:
        total = 0
        for i in range(count):
            total += decode(encoded[i % len(encoded)], index.resolution, index.num_channels, "").nbytes
        return total

    return read


def pillow_alone(folder: str) -> Callable[[int], int]:
    """The same bytes, decoded by Pillow."""
    stream = ImageStream(folder, batch_size=1)
    encoded = stream.shards.read(range(len(stream)))

    def read(count: int) -> int:
        return sum(np.asarray(Image.open(io.BytesIO(encoded[i % len(encoded)]))).nbytes for i in range(count))

    return read


def reader(url: str, **settings) -> Callable[[int], int]:
    """Whole batches, as training gets them; each call goes on where the last one ended."""
    batches = ImageStream(url, batch_size=BATCH, **settings).batches()
    next(batches)

    def read(count: int) -> int:
        return sum(batch.images.nbytes for batch in itertools.islice(batches, count // BATCH))

    return read


def first_epoch(url: str, **settings) -> Callable[[int], int]:
    """A new stream each time, over all of the set: nothing is kept from before. The index is read before the clock starts."""
    streams = [ImageStream(url, batch_size=BATCH, **settings) for _ in range(ROUNDS + 1)]

    def read(count: int) -> int:
        return sum(batch.images.nbytes for batch in itertools.islice(streams.pop().batches(), count // BATCH))

    return read


def plain_webdataset(folder: str, shards: int) -> Callable[[int], int]:
    import webdataset

    urls = os.path.join(folder, f"train-{{000000..{shards - 1:06d}}}.tar")
    source = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None).shuffle(64).decode("rgb8")
    images = itertools.chain.from_iterable(source for _ in itertools.count())

    def read(count: int) -> int:
        total = 0
        for _ in range(count // BATCH):
            batch = [torch.tensor(next(images)["png"]).permute(2, 0, 1) for _ in range(BATCH)]
            total += torch.stack(batch).nbytes
        return total

    return read


def pillow_folder(paths: list[str], resolution: int) -> Callable[[int], int]:
    """As the published code: open, RGB, resize with Pillow where needed, to float32 in [0, 1] with channels first (ToTensor), stack."""
    images = itertools.cycle(paths)

    def read(count: int) -> int:
        total = 0
        for _ in range(count // BATCH):
            batch = []
            for path in itertools.islice(images, BATCH):
                picture = Image.open(path).convert("RGB")
                if picture.width != resolution:
                    picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC)
                batch.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255))
            total += torch.stack(batch).nbytes
        return total

    return read


def peer(folder: str, paths: list[str], resolution: int) -> Callable[[int], int]:
    """mosaicml-streaming's MDS with PNG bytes, decoded by its own Pillow."""
    from streaming import MDSWriter, StreamingDataset

    if not os.path.exists(folder):
        with MDSWriter(out=folder, columns={"x": "png"}) as writer:
            for path in paths:
                picture = Image.open(path).convert("RGB")
                writer.write({"x": picture.resize((resolution, resolution), Image.Resampling.LANCZOS)})
    data = StreamingDataset(local=folder, shuffle=True, batch_size=BATCH)
    images = itertools.chain.from_iterable(data for _ in itertools.count())

    def read(count: int) -> int:
        total = 0
        for _ in range(count // BATCH):
            batch = [torch.from_numpy(np.array(next(images)["x"])).permute(2, 0, 1) for _ in range(BATCH)]
            total += torch.stack(batch).nbytes
        return total

    return read


def measure(rows: dict[str, Callable], count: int) -> dict[str, float]:
    """CPU milliseconds per image of each row: the median over the rounds."""
    found: dict[str, list[float]] = {name: [] for name in rows}
    for read in rows.values():
        read(BATCH)  # open files, import codecs
    for _ in range(ROUNDS):
        for name, read in rows.items():
            start = cpu_sec()
            read(count)
            found[name].append((cpu_sec() - start) / count * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def table(title: str, times: dict[str, float], base: str, sizes: dict[str, float]) -> list[str]:
    lines = [f"**{title}**", "", f"| | KB an image | CPU ms an image | ratio to {base} |", "|---|---|---|---|"]
    for name, ms in times.items():
        size = f"{sizes[name] / 1e3:,.0f}" if name in sizes else ""
        lines.append(f"| {name} | {size} | {ms:.2f} | {ms / times[base]:.2f} |")
    return [*lines, ""]


def run(options: argparse.Namespace, work: str) -> str:
    source = os.path.join(work, f"photos-{options.images}")
    photos.make(source, options.images, 1024)
    paths = sorted(os.path.join(source, name) for name in os.listdir(source) if name.endswith(".png"))
    sets, sizes = {}, {}
    for resolution in (1024, 256):
        for name, settings in FORMATS.items():
            folder = os.path.join(work, f"{resolution}-{name}-{options.images}")
            if not os.path.exists(os.path.join(folder, "index.json")):
                pack(
                    source, folder, resolution=resolution, image_format=name, num_workers=os.cpu_count(),
                    shard_size_bytes=32 * 2**20, **settings,
                )  # fmt: skip
            sets[resolution, name] = folder
    for key, folder in sets.items():
        index = ImageStream(folder, batch_size=1).index
        sizes[key] = int(index.size.sum()) / index.count
    lines = [
        "# The cost of feeding images", "",
        f"Made by `python -m benchmarks.data --images {options.images}` on {time.strftime('%Y-%m-%d')} with sivae {sivae.__version__}, torch {torch.__version__}, on {machine()}.",
        f"{options.images} images, batches of {BATCH}, median of {ROUNDS} rounds; CPU time of the reading process alone.", "",
    ]  # fmt: skip
    shards = {key: len(ImageStream(folder, batch_size=1).index.shards) for key, folder in sets.items()}
    with s3_server() as storage_options:
        import s3fs

        fs = s3fs.S3FileSystem(**storage_options, skip_instance_cache=True)
        for resolution in (1024, 256):
            fs.put(sets[resolution, "png"], f"bench/{resolution}-png", recursive=True)
            remote = f"s3://bench/{resolution}-png"
            rows = {
                "decode alone, PNG (the limit)": decode_alone(sets[resolution, "png"]),
                "sivae, local disk": reader(sets[resolution, "png"]),
                "sivae, S3 on loopback, first epoch": first_epoch(remote, storage_options=storage_options),
                "sivae, S3 on loopback, later": reader(remote, storage_options=storage_options),
                "webdataset, local disk": plain_webdataset(sets[resolution, "png"], shards[resolution, "png"]),
                "folder of 1024-pixel PNG, as published": pillow_folder(paths, resolution),
            }
            if options.peer:
                rows["mosaicml-streaming, local disk"] = peer(
                    os.path.join(work, f"{resolution}-mds"), paths, resolution
                )
            png = {name: sizes[resolution, "png"] for name in rows if "1024" not in name}
            lines += table(
                f"Training at {resolution} pixels", measure(rows, options.images), "decode alone, PNG (the limit)", png
            )
            rows = {f"sivae, {name}": reader(sets[resolution, name]) for name in FORMATS}
            rows["QOI, decode alone"] = decode_alone(sets[resolution, "qoi"])
            rows["PNG by Pillow, decode alone"] = pillow_alone(sets[resolution, "png"])
            rows["PNG by Pillow, as published"] = pillow_folder(paths, 1024)
            if resolution == 1024:
                times = measure(rows, options.images)
                lines += table(
                    "By format at 1024 pixels, local disk",
                    times,
                    "PNG by Pillow, decode alone",
                    {f"sivae, {n}": sizes[1024, n] for n in FORMATS},
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=160, help="a multiple of 8")
    parser.add_argument("--work", help="keep images and packed sets here; a temporary folder when not given")
    parser.add_argument("--output", help="also write data.md into this folder")
    parser.add_argument("--peer", action="store_true", help="compare mosaicml-streaming, which must be installed")
    options = parser.parse_args()
    if (
        options.images < BATCH or options.images % BATCH
    ):  # a row reads whole batches, and divides by the images asked for
        parser.error(f"--images {options.images} is not a multiple of {BATCH}")
    if options.output:
        Path(options.output).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        text = run(options, options.work or scratch)
    print(text)
    if options.output:
        Path(options.output, "data.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
