"""What the subcommands do; each takes the parsed options and returns an exit code or None."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sivae import config, images, inference
from sivae.cli import EXIT_ERROR, EXIT_INTERRUPTED
from sivae.errors import UserError, shown
from sivae.progress import progress_bar
from sivae.storage import Folder

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MAX_LINES = 20  # of a list that is printed

if TYPE_CHECKING:
    from sivae.data.sources import Sample


def train(options: argparse.Namespace) -> int:
    from sivae import trainer

    settings = config.load(options.config, options.overrides)
    try:
        result = trainer.train(settings)
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error).split(".")[0]) from error
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            f"{result.images_seen:,} images seen; checkpoint {settings.run.directory}/checkpoints/{result.checkpoint}"
        )
        if result.picture:
            print(f"picture: {result.picture}")
        if settings.tracking.tensorboard:
            print(f"log: tensorboard --logdir {settings.run.directory}/tensorboard")
    return EXIT_INTERRUPTED if result.interrupted else 0


def pack(options: argparse.Namespace) -> None:
    from sivae.data.pack import pack as pack_set

    started_sec = time.monotonic()
    index = pack_set(
        options.source,
        options.dest,
        resolution=options.resolution,
        num_channels=options.num_channels,
        labels=options.labels,
        image_format=options.format,
        quality=options.quality,
        crop=options.crop,
        filter=options.filter,
        samples_per_shard=options.samples_per_shard,
        shard_size_bytes=_bytes(options.shard_size, "--shard-size"),
        splits=options.splits,
        pyramid=options.pyramid,
        skip_bad=options.skip_bad,
        verify=options.verify,
        licence=options.licence,
        num_workers=_workers(options),
    )
    _tell_left_out(index.skipped)
    level = f"/{index.resolution}" if options.pyramid else ""
    url = options.dest.rstrip("/") + level
    print(
        f"{_describe_set(index)}, in {time.monotonic() - started_sec:.0f} s: train with data.url={shown(url)}"
        + (" (or another level of the pyramid)" if level else "")
    )


def check(options: argparse.Namespace) -> int:
    from sivae.data.check import check as check_set

    report = check_set(options.url, split=options.split, num_workers=_workers(options))
    for line in report.findings.lines:
        print(line)
    left = report.findings.count - len(report.findings.lines)
    if left:
        print(f"... and {left:,} more")
    seen = f"{report.num_images:,} images, {_size(report.num_bytes)}, digest {report.digest[:16]}"
    if report.findings.count:
        print(f"{shown(options.url)}: {report.findings.count:,} findings in {seen}; copy or pack the set again")
        return EXIT_ERROR
    unsure = (
        ""
        if report.has_checksums
        else "; the index has no checksums (sivae index --crc makes them), so images were only decoded"
    )
    print(f"{shown(options.url)}: all right, {seen}{unsure}")
    return 0


def index(options: argparse.Namespace) -> None:
    from sivae.data.make_index import folder_of, make_index

    made = make_index(
        options.urls, output=options.output, crc=options.crc, split=options.split, licence=options.licence
    )
    print(f"{_describe_set(made)}: train with data.url={shown(options.output or folder_of(options.urls))}")


def sample(options: argparse.Namespace) -> None:
    _require(options.count > 0, f"--count: {options.count} is not a number of images")
    _require(options.seed >= 0, f"--seed: {options.seed} is negative")
    model = _load(options)
    _require(len(model.sample_shape) == 3, "this model is not one of images")
    if options.label is not None:
        _require(model.num_classes, "--label: this model is not conditional on classes")
        _require(
            0 <= options.label < model.num_classes, f"--label: {options.label} is not in 0 .. {model.num_classes - 1}"
        )
    labels = None if options.label is None else torch.full((options.count,), options.label)
    _require(
        options.truncation_layers is None or options.truncation_layers >= 0,
        f"--truncation-layers: {options.truncation_layers} is negative",
    )
    truncation = {"truncation": options.truncation, "truncation_layers": options.truncation_layers}
    samples = model.to_uint8(model.sample(options.count, seed=options.seed, labels=labels, **truncation)).cpu()
    _write(options.output, images.grid(samples, columns=_columns(options.count)))
    if options.folder:
        folder = Folder(options.folder)
        with progress_bar(options.count, "writing", " images") as bar:
            for index, image in enumerate(samples):
                folder.write(images.png_bytes(images.pixels(image)), f"{index:06d}.png")
                bar.update()
        print(f"{options.folder}: {options.count} images")


def reconstruct(options: argparse.Namespace) -> None:
    _require(options.count > 0, f"--count: {options.count} is not a number of images")
    model = _load(options)
    real, labels = read_images(options.source, model, options.count, options.label)
    again = model.to_uint8(model.reconstruct(real, labels)).cpu()
    columns = _columns(len(real))
    _write(options.output, images.panels({"real": real, "reconstructed": again}, columns))
    error = ((again.float() - real.float()) / 255).square().mean().item()
    print(f"mean squared error {error:.5f} over {len(real)} images (values in [0, 1], rounded to 8 bits)")


def interpolate(options: argparse.Namespace) -> None:
    model = _load(options)
    _require(options.steps >= 2, f"--steps: {options.steps} is too few, both ends make 2")
    first, labels = read_images(options.first, model, 1, options.label)
    second, _ = read_images(options.second, model, 1, options.label)
    path = model.to_uint8(model.interpolate(first, second, options.steps, labels)[0]).cpu()
    _write(options.output, images.grid(torch.cat([first, path, second]), columns=options.steps + 2))


def translate(options: argparse.Namespace) -> None:
    _require(options.count > 0, f"--count: {options.count} is not a number of images")
    model = _load(options)
    content, _ = read_images(options.content, model, options.count, spread=True)
    class_, _ = read_images(options.class_, model, options.count, spread=True)
    translated = model.to_uint8(model.translate(content, class_)).cpu()
    _write(options.output, images.grid(images.with_margins(translated, content, class_), columns=len(class_) + 1))


def import_(options: argparse.Namespace) -> None:
    from sivae.models import published

    found = published.read(options.source, options.residual)
    model = inference.Model(config.parse_model(found.settings).model_dump())
    model.info = {"imported_from": Path(options.source).name, "kind": found.kind}
    inference.fill(
        model,
        {
            f"{network}.{name}": value
            for network in ("encoder", "decoder")
            for name, value in found.networks[network].items()
        },
        options.source,
    )
    inference.export(model, options.dest, found.networks.get("target_decoder"))
    print(
        f"{options.dest}: {found.kind} model, {_describe(model)}; use it with sivae.load, or train on with run.init_from={options.dest}"
    )


def export(options: argparse.Namespace) -> None:
    model = inference.load(options.model, weights=options.weights)
    inference.export(model, options.dest)
    print(f"{options.dest}: {_describe(model)}; {inference.WEIGHTS_FILE}, {inference.SETTINGS_FILE} and a model card")


def doctor(options: argparse.Namespace) -> int:
    from sivae import doctor

    return doctor.run(options.config, options.overrides)


COMMANDS = {
    "train": train, "pack": pack, "check": check, "index": index, "sample": sample, "reconstruct": reconstruct, "interpolate": interpolate,
    "translate": translate, "import": import_, "export": export, "doctor": doctor,
}  # fmt: skip


def read_images(
    source: str, model: inference.Model, count: int, label: int | None = None, spread: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Up to `count` images as the model takes them: uint8 [N, C, H, W], with labels int64 [N]: `label`, or the source's, or None.

    `source` is an image file, a folder, a packed set, an array file, `digits:` or `shapes:`; with `#N` only its image N.
    The first ones, or with `spread` some from all over it.
    """
    from sivae.data import ImageStream
    from sivae.data.pack import fit
    from sivae.data.sources import DRAWN, IMAGE_SUFFIXES, open_source

    _require(len(model.sample_shape) == 3, "this model is not one of images")
    source, _, number = source.partition("#")
    _require(not number or number.isdecimal(), f"{source}#{number}: #N picks an image by its number")
    channels, resolution, _ = model.sample_shape
    if source.lower().endswith(IMAGE_SUFFIXES):
        items = [_read_file(source)]
    elif source not in DRAWN and Folder(source).exists("index.json"):
        items = ImageStream(source, batch_size=1, resolution=resolution, num_channels=channels)
    else:
        items = open_source(source, resolution=resolution)
    if label is not None:
        _require(model.num_classes, "--label: this model is not conditional on classes")
    _require(not number or int(number) < len(items), f"{source}: has images 0 to {len(items) - 1}, not {number}")
    count = min(count, len(items))
    numbers = np.linspace(0, len(items) - 1, count).astype(int).tolist() if spread else list(range(count))
    if number:
        numbers = [int(number)]
    if isinstance(items, ImageStream):
        batch = items.sample(numbers)
        pixels, labels = batch.images, batch.labels
    else:
        found = [items[i] for i in numbers]
        fitted = [
            np.asarray(fit(sample.pixels, resolution, channels)).reshape(resolution, resolution, -1) for sample in found
        ]
        pixels = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()
        labels = None if found[0].label is None else torch.tensor([sample.label for sample in found])
    return pixels, labels if label is None else torch.full((len(pixels),), label)


def _read_file(path: str) -> Sample:
    """One image file, as a source would give it."""
    from sivae.data.sources import Sample
    from sivae.data.sources.pictures import decode

    folder, name = _split(path)
    return Sample(path, decode(folder.read(name), f"{path}:")[0])


def _load(options: argparse.Namespace) -> inference.Model:
    from sivae.distributed import pick_device

    return inference.load(options.model, device=pick_device(options.device), weights=options.weights)


def _write(path: str, picture: np.ndarray) -> None:
    folder, name = _split(path)
    folder.write(images.png_bytes(picture), name)
    print(path)


def _split(path: str) -> tuple[Folder, str]:
    """The folder of a file, at a path or URL, and its name."""
    folder, slash, name = path.rpartition("/")
    return Folder(folder or slash or "."), name


def _columns(count: int) -> int:
    return min(16, max(1, round(count**0.5)))


def _describe(model: inference.Model) -> str:
    parameters = sum(p.numel() for network in (model.encoder, model.decoder) for p in network.parameters())
    shape = "x".join(map(str, model.sample_shape))
    return f"{model.settings['family']} family, {shape}, latent {model.latent_dim}, {parameters:,} parameters"


def _describe_set(index) -> str:
    classes = f", {index.num_classes} classes" if index.num_classes else ""
    splits = ""
    if len(index.splits) > 1:
        splits = " (" + ", ".join(f"{name} {count:,}" for name, count in index.splits.items()) + ")"
    num_bytes = _size(sum(shard.size_bytes for shard in index.shards))
    channels = "1 channel" if index.num_channels == 1 else f"{index.num_channels} channels"
    return f"{index.count:,} images{splits} of {index.resolution} pixels, {channels}{classes}, {num_bytes}"


def _tell_left_out(skipped: tuple[str, ...]) -> None:
    for line in skipped[:MAX_LINES]:
        print(line.encode("utf-8", "backslashreplace").decode())  # names of files need not be text
    if len(skipped) > MAX_LINES:
        print(f"... and {len(skipped) - MAX_LINES:,} more; the index lists them all under skipped")
    if skipped:
        print(f"{len(skipped):,} images cannot be read and were left out")


def _size(num_bytes: int) -> str:
    unit = next((unit for unit in ("TB", "GB", "MB", "kB") if num_bytes >= UNITS[unit]), None)
    return f"{num_bytes / UNITS[unit]:.1f} {unit}" if unit else f"{num_bytes} bytes"


def _bytes(text: str, option: str) -> int:
    """A number of bytes such as 4096, 500MB or 1GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text, re.ASCII)
    factor = {unit.lower(): value for unit, value in UNITS.items()}.get(match[2].lower()) if match else None
    _require(factor, f"{option}: {text!r} is no size; give bytes, or a number with kB, MB, GB, KiB, MiB or GiB")
    _require(float(match[1]) * factor >= 1, f"{option}: {text!r} is less than a byte")
    return round(float(match[1]) * factor)


def _workers(options: argparse.Namespace) -> int:
    """Processes to use; 0 is this one alone."""
    _require(options.workers is None or options.workers >= 0, f"--workers: {options.workers} is negative")
    if options.workers is not None:
        return options.workers
    # The cores that this process may use, where the system can tell
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require(condition: object, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)
