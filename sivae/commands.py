"""What the subcommands do; each takes the parsed options and returns an exit code or None."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sivae import config, figures, images, inference
from sivae.cli import EXIT_ERROR, EXIT_INTERRUPTED
from sivae.errors import UserError, shown
from sivae.progress import progress_bar
from sivae.randomness import fixed_latents
from sivae.storage import Folder

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MAX_LINES = 20  # of a list that is printed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sivae.data import ImageStream
    from sivae.data.sources import Sample
    from sivae.encoded import EncodedSet
    from sivae.latents import Direction


def train(options: argparse.Namespace) -> int:
    from sivae import trainer

    settings = config.load(options.config, options.overrides)
    if options.profile_steps < 1:
        raise UserError(f"--profile-steps: {options.profile_steps} is not a number of steps")
    try:
        result = trainer.train(settings, profile_steps=options.profile_steps if options.profile else None)
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error).split(".")[0]) from error
    if int(os.environ.get("RANK", 0)) == 0 and options.profile:
        print(result.profile or "", end="")
    elif int(os.environ.get("RANK", 0)) == 0:
        print(
            f"{result.images_seen:,} images seen; checkpoint {settings.run.directory}/checkpoints/{result.checkpoint}"
        )
        if result.picture:
            print(f"picture: {result.picture}")
        if settings.tracking.tensorboard:
            print(f"log: tensorboard --logdir {settings.run.directory}/tensorboard")
    return EXIT_INTERRUPTED if result.interrupted else 0


def toy2d(options: argparse.Namespace) -> int:
    from sivae import toy2d as trainer

    settings = config.load(options.config, options.overrides, trainer.Toy2dConfig)
    try:
        found = trainer.train(settings)
    except trainer.Stopped as stopped:
        print(f"sivae: {stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED
    for line in trainer.table(found):
        print(line)
    directory = settings.run.directory
    print(f"picture: {directory}/{trainer.PICTURE_FILE}; models: sivae.load('{directory}/models/{found[0]['seed']}')")
    return 0


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
    count = options.count if options.count is not None else 8 if options.truncation_sweep else 64
    _require(count > 0, f"--count: {count} is not a number of images")
    _require(options.seed >= 0, f"--seed: {options.seed} is negative")
    model = _load(options)
    _require(len(model.sample_shape) == 3, "this model is not one of images")
    _require_label(options, model)
    if options.truncation_sweep is not None:
        _require(
            options.truncation_sweep >= 2,
            f"--truncation-sweep: {options.truncation_sweep} is too few, both ends make 2",
        )
        _write_figure(
            options.output,
            figures.truncation_sweep(model, count, options.seed, options.truncation_sweep, options.label),
        )
        return
    labels = None if options.label is None else torch.full((count,), options.label)
    _require(
        options.truncation_layers is None or options.truncation_layers >= 0,
        f"--truncation-layers: {options.truncation_layers} is negative",
    )
    truncation = {"truncation": options.truncation, "truncation_layers": options.truncation_layers}
    samples = model.to_uint8(model.sample(count, seed=options.seed, labels=labels, **truncation)).cpu()
    _write(options.output, images.grid(samples, columns=_columns(count)))
    if options.folder:
        folder = Folder(options.folder)
        with progress_bar(count, "writing", " images") as bar:
            for index, image in enumerate(samples):
                folder.write(images.png_bytes(images.pixels(image)), f"{index:06d}.png")
                bar.update()
        print(f"{options.folder}: {count} images")


def reconstruct(options: argparse.Namespace) -> None:
    _require(options.count > 0, f"--count: {options.count} is not a number of images")
    model = _load(options)
    real, labels = read_images(options.source, model, options.count, options.label)
    if options.levels:
        _write_figure(options.output, figures.levels(model, real, labels))
        return
    again = model.to_uint8(model.reconstruct(real, labels)).cpu()
    columns = _columns(len(real))
    _write(options.output, images.panels({"real": real, "reconstructed": again}, columns))
    error = ((again.float() - real.float()) / 255).square().mean().item()
    print(f"mean squared error {error:.5f} over {len(real)} images (values in [0, 1], rounded to 8 bits)")


def interpolate(options: argparse.Namespace) -> None:
    model = _load(options)
    _require(options.steps >= 2, f"--steps: {options.steps} is too few, both ends make 2")
    _require(options.frames >= 2, f"--frames: {options.frames} is too few, both ends make 2")
    first, labels = read_images(options.first, model, 1, options.label)
    second, _ = read_images(options.second, model, 1, options.label)

    def path(steps: int) -> Tensor:
        return model.to_uint8(model.interpolate(first, second, steps, labels, spherical=options.spherical)[0]).cpu()

    _write(options.output, images.grid(torch.cat([first, path(options.steps), second]), columns=options.steps + 2))
    if options.gif:
        _write_bytes(options.gif, images.gif_bytes(path(options.frames)))


def traverse(options: argparse.Namespace) -> None:
    for name, least in (("count", 1), ("dims", 1), ("steps", 2)):
        value = getattr(options, name)
        _require(value >= least, f"--{name}: {value} is too few, give {least} or more")
    _require(0 < options.reach < math.inf, f"--reach: {options.reach} is not a distance above 0")
    model = _load(options)
    real, labels = read_images(options.source, model, options.count, options.label)
    _write_figure(options.output, figures.traversals(model, real, options.dims, options.steps, labels, options.reach))


def stylemix(options: argparse.Namespace) -> None:
    _require(options.count > 0, f"--count: {options.count} is not a number of rows and columns")
    _require(options.seed >= 0, f"--seed: {options.seed} is negative")
    model = _load(options)
    num_layers = model.num_layers
    _require_label(options, model)
    num_coarse = figures.default_num_coarse(model) if options.coarse_layers is None else options.coarse_layers
    _require(
        0 <= num_coarse <= num_layers,
        f"--coarse-layers: {num_coarse} is not in 0 .. {num_layers}, the layers of this model",
    )
    drawn = fixed_latents(options.seed, 2 * options.count, model.latent_dim).split(options.count)

    def latents(source: str | None, otherwise: Tensor) -> Tensor:
        if source is None:
            return otherwise
        real, labels = read_images(source, model, options.count, options.label)
        return model.encode(real, labels)[0]

    coarse, fine = latents(options.rows, drawn[0]), latents(options.columns, drawn[1])
    _write_figure(options.output, figures.style_mixing(model, coarse, fine, num_coarse, options.label))


def evaluate(options: argparse.Namespace) -> None:
    from sivae import distributed, real_statistics
    from sivae.data import open_stream
    from sivae.evaluate import Evaluation, Protocol, write

    names = ("num_fakes", "num_reals", "seed", "truncation", "truncation_layers", "mode", "batch_size")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    fixed = [f"--{name.replace('_', '-')}" for name in given if name != "seed"]
    if options.protocol:
        _require(not fixed, f"{fixed and fixed[0]}: the published protocol fixes it; leave one of the two out")
        _require(options.weights == "average", "--weights: the published protocol takes the averaged weights")
        _require(options.split == "train", "--split: the published protocol takes the training images")
    _require(given.get("seed", 0) >= 0, f"--seed: {given.get('seed')} is negative")
    detectors = dict(pair.partition("=")[::2] for pair in options.detector)
    _require(all(detectors.values()), "--detector: is written NAME=FILE, for example dinov2=dinov2-vitl14.pt")
    with distributed.join(options.device) as group:
        model = group.together(lambda: inference.load(options.model, device=group.device, weights=options.weights))
        if len(model.sample_shape) != 3:
            raise UserError("this model is not one of images", shared=True)
        channels, resolution, _ = model.sample_shape
        reading = {"split": options.split, "resolution": resolution, "num_channels": channels, "batch_size": 1}
        stream = group.together(lambda: open_stream(options.data, **reading, progress=group.is_main))
        metrics = tuple(options.metrics.split(","))
        if options.protocol:
            protocol = Protocol.published(metrics, model.settings, len(stream))
            protocol = dataclasses.replace(protocol, **given)
        else:
            protocol = Protocol(metrics, **given)
        kept = Folder(options.statistics) if options.statistics else real_statistics.default_folder()
        evaluation = Evaluation(stream, protocol, group, detectors=detectors, lpips=options.lpips, statistics=kept)
        if options.protocol and group.is_main and len(stream) < 50_000:
            print(
                f"{stream.where}: has {len(stream):,} images where the published protocol takes 50,000; all are taken"
            )
        figures = evaluation.run(model)

        def tell() -> None:
            for name, value in figures.items():
                print(f"{name} {value:.6g}")
            run = Folder(_run_of(options.model))
            described = {"weights": options.weights, "info": model.info, "data_url": shown(options.data)}
            print(f"{write(run, evaluation, figures, **described)}: the figures with their protocol")

        group.on_main(tell)


def ood(options: argparse.Namespace) -> None:
    from sivae import outliers

    _require(options.samples > 0, f"--samples: {options.samples} is not a number of draws")
    _require(options.seed >= 0, f"--seed: {options.seed} is negative")
    model = _load(options)
    _require(len(model.sample_shape) == 3, "this model is not one of images")
    folder = Folder(_run_of(options.model))
    if options.judge:
        _require(not (options.inlier or options.outlier), "--judge: goes without --inlier and --outlier")
        image, _ = read_images(options.judge, model, 1)
        verdict = outliers.judge(model, image, outliers.read_calibration(folder, model, options.weights), options.score)
        print(f"{options.judge}: {verdict.sentence}")
        return
    _require(options.inlier and options.outlier, "give both --inlier and --outlier, or --judge IMAGE")
    _require(options.count is None or options.count > 0, f"--count: {options.count} is not a number of images")
    outliers.require_pictures()
    settings = {"num_samples": options.samples, "seed": options.seed, "count": options.count}
    sets = [(options.inlier, options.inlier_split), (options.outlier, options.outlier_split)]
    streams = [outliers.open_set(url, split, model) for url, split in sets]
    _require(streams[0].digest != streams[1].digest, "--outlier: is the same set of images as --inlier")
    inlier, outlier = (outliers.score_set(model, stream, **settings) for stream in streams)
    results = outliers.compare(inlier, outlier, options.seed)
    for line in outliers.table(results):
        print(line)
    folder_of_picture, name = _split(options.output)
    names = [f"{shown(url)} {split}" for url, split in sets]
    folder_of_picture.write(outliers.histograms(inlier, outlier, results, *names), name)
    print(options.output)
    calibration = outliers.calibrate(model, inlier, streams[0], options.weights, options.samples, options.seed)
    outliers.write_calibration(folder, calibration)
    print(f"{folder.url}/{outliers.FILE}: thresholds; judge an image with sivae ood {options.model} --judge IMAGE")


def encode(options: argparse.Namespace) -> None:
    from sivae import distributed
    from sivae.encoded import encode_set

    _require(options.batch_size > 0, f"--batch-size: {options.batch_size} is not a number of images")
    with distributed.join(options.device) as group:
        model = group.together(lambda: inference.load(options.model, device=group.device, weights=options.weights))
        stream = group.together(lambda: _open_set(options.data, options.split, model, progress=group.is_main))
        encoded = encode_set(
            model, stream, Folder(options.dest), group, split=options.split, file_format=options.format,
            batch_size=options.batch_size,
        )  # fmt: skip
        if group.is_main:
            print(
                f"{encoded.where}: {len(encoded):,} images, {encoded.latent_dim} latent dimensions, {len(encoded.parts):,} parts"
            )


def neighbours(options: argparse.Namespace) -> None:
    model = _load(options)
    image, labels = read_images(options.image, model, 1, options.label)
    stream, encoded = _open_latents(options, model)
    _require(
        1 <= options.count <= len(stream),
        f"--count: {options.count} is not in 1 .. {len(stream)}, the images of {stream.where}",
    )
    figure, numbers, distances = figures.neighbours(model, image, stream, options.count, labels, encoded)
    _write_figure(options.output, figure)
    for number, distance in zip(numbers.tolist(), distances.tolist()):
        label = "" if stream.index.label is None else f", label {stream.index.label[number]}"
        print(f"{distance:8.4f}  #{number}, {stream.index.name(number)}{label}")


def attribute(options: argparse.Namespace) -> None:
    from sivae.latents import Direction

    for name, least in (("count", 1), ("steps", 2)):
        value = getattr(options, name)
        _require(value >= least, f"--{name}: {value} is too few, give {least} or more")
    _require(0 < options.reach < math.inf, f"--reach: {options.reach} is not a distance above 0")
    folders = options.positives is not None or options.negatives is not None
    _require(
        (options.label is not None) + folders + (options.direction is not None) == 1,
        "give the attribute once: as --label, as --positives and --negatives, or as the --direction that was found before",
    )
    _require(not folders or (options.positives and options.negatives), "--positives and --negatives go together")
    _require(
        options.label is None or options.data or options.encoded, "--label: of which set? give its --data, or --encoded"
    )
    _require(
        options.images or options.data, "give the --images to change, or --data to take the first ones of that set"
    )
    model = _load(options)
    stream, encoded = _open_latents(options, model)
    if options.images:
        real, labels = read_images(options.images, model, options.count)
    else:
        first = stream.sample(range(min(options.count, len(stream))))
        real, labels = first.images, first.labels
    if options.direction is not None:
        direction = Direction.load(*_split(options.direction))
        direction.check(model.latent_dim, inference.weights_digest(model), options.direction)
    else:
        direction = _find_direction(options, model, stream, encoded)
        direction.save(*_split(options.save))
        print(options.save)
    # Rounded, so that the middle one is 0.
    strengths = np.linspace(-options.reach, options.reach, options.steps).round(9).tolist()
    _write_figure(options.output, figures.attribute(model, real, direction, strengths, labels))
    print(f"{direction.name}: {direction.separation.sentence()}")


def _find_direction(
    options: argparse.Namespace, model: inference.Model, stream: ImageStream | None, encoded: EncodedSet | None
) -> Direction:
    from sivae.encoded import latents_of
    from sivae.latents import DirectionFit

    fit = DirectionFit(model.latent_dim)
    if options.label is None:
        for source, positive in ((options.positives, True), (options.negatives, False)):
            items = _open_images(source, model)
            with progress_bar(len(items), f"encoding {shown(source)}", " images") as bar:
                for first in range(0, len(items), figures.BATCH):
                    numbers = range(first, min(first + figures.BATCH, len(items)))
                    mu, _ = model.encode(*_take(items, numbers, model))
                    fit.add(mu.float().cpu(), torch.full((len(numbers),), positive))
                    bar.update(len(numbers))
        name = f"{shown(options.positives)} against {shown(options.negatives)}"
    else:
        held = encoded or stream
        _require(held.num_classes, f"--label: {held.where} has no labels; pack it with --labels")
        _require(
            0 <= options.label < held.num_classes,
            f"--label: {options.label} is not in 0 .. {held.num_classes - 1}, the labels of {held.where}",
        )
        for part in latents_of(model, stream, encoded):
            fit.add(part.mu, part.label == options.label)
        name = f"label {options.label}"
    return fit.finish(name, inference.weights_digest(model))


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


def plan(options: argparse.Namespace) -> None:
    from sivae import plan

    settings = config.load(options.config, options.overrides)
    made = plan.make(settings, num_gpus=options.gpus, gpu_name=options.gpu, utilization=options.utilization)
    print(json.dumps(made, indent=1) if options.json else plan.render(made))


def doctor(options: argparse.Namespace) -> int:
    from sivae import doctor

    return doctor.run(options.config, options.overrides)


COMMANDS = {
    "train": train, "toy2d": toy2d, "pack": pack, "check": check, "index": index, "sample": sample, "reconstruct": reconstruct,
    "interpolate": interpolate, "traverse": traverse, "stylemix": stylemix, "encode": encode, "neighbours": neighbours,
    "attribute": attribute, "translate": translate, "evaluate": evaluate, "ood": ood, "import": import_, "export": export, "plan": plan, "doctor": doctor,
}  # fmt: skip


def read_images(
    source: str, model: inference.Model, count: int, label: int | None = None, spread: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Up to `count` images as the model takes them: uint8 [N, C, H, W], with labels int64 [N]: `label`, or the source's, or None.

    `source` is an image file, a folder, a packed set, an array file, `digits:` or `shapes:`; with `#N` only its image N.
    The first ones, or with `spread` some from all over it.
    """
    source, _, number = source.partition("#")
    _require(not number or number.isdecimal(), f"{source}#{number}: #N picks an image by its number")
    items = _open_images(source, model)
    if label is not None:
        _require(model.num_classes, "--label: this model is not conditional on classes")
    _require(not number or int(number) < len(items), f"{source}: has images 0 to {len(items) - 1}, not {number}")
    count = min(count, len(items))
    numbers = np.linspace(0, len(items) - 1, count).astype(int).tolist() if spread else list(range(count))
    if number:
        numbers = [int(number)]
    pixels, labels = _take(items, numbers, model)
    return pixels, labels if label is None else torch.full((len(pixels),), label)


def _open_images(source: str, model: inference.Model) -> Sequence[Sample] | ImageStream:
    """What `read_images` takes images from, for `_take`."""
    from sivae.data import ImageStream
    from sivae.data.sources import DRAWN, IMAGE_SUFFIXES, open_source

    _require(len(model.sample_shape) == 3, "this model is not one of images")
    channels, resolution, _ = model.sample_shape
    if source.lower().endswith(IMAGE_SUFFIXES):
        return [_read_file(source)]
    if source not in DRAWN and Folder(source).exists("index.json"):
        return ImageStream(source, batch_size=1, resolution=resolution, num_channels=channels)
    return open_source(source, resolution=resolution)


def _take(
    items: Sequence[Sample] | ImageStream, numbers: Sequence[int], model: inference.Model
) -> tuple[Tensor, Tensor | None]:
    """The images of these numbers as the model takes them, uint8 [N, C, H, W], and the labels that they have."""
    from sivae.data import ImageStream
    from sivae.data.pack import fit

    if isinstance(items, ImageStream):
        batch = items.sample(numbers)
        return batch.images, batch.labels
    channels, resolution, _ = model.sample_shape
    found = [items[number] for number in numbers]
    fitted = [
        np.asarray(fit(sample.pixels, resolution, channels)).reshape(resolution, resolution, -1) for sample in found
    ]
    pixels = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()
    return pixels, None if found[0].label is None else torch.tensor([sample.label for sample in found])


def _open_set(url: str, split: str, model: inference.Model, progress: bool = True) -> ImageStream:
    from sivae.data import open_stream

    _require(len(model.sample_shape) == 3, "this model is not one of images")
    channels, resolution, _ = model.sample_shape
    return open_stream(url, split=split, resolution=resolution, num_channels=channels, batch_size=1, progress=progress)


def _open_latents(options: argparse.Namespace, model: inference.Model) -> tuple[ImageStream | None, EncodedSet | None]:
    """The set of --data and its latents of --encoded, each None where it is not given; they belong to each other and the model."""
    from sivae.encoded import EncodedSet

    encoded = EncodedSet(Folder(options.encoded)) if options.encoded else None
    if encoded is not None:
        encoded.check(model)
    split = options.split or (encoded.split if encoded is not None else "all")
    _require(
        encoded is None or split == encoded.split,
        f"--split: {options.encoded} holds the split {encoded and encoded.split}, not {split}",
    )
    stream = _open_set(options.data, split, model) if options.data else None
    if encoded is not None and stream is not None:
        encoded.check_set(stream)
    return stream, encoded


def _read_file(path: str) -> Sample:
    """One image file, as a source would give it."""
    from sivae.data.sources import Sample
    from sivae.data.sources.pictures import decode

    folder, name = _split(path)
    return Sample(path, decode(folder.read(name), f"{path}:")[0])


def _load(options: argparse.Namespace) -> inference.Model:
    from sivae.distributed import pick_device

    return inference.load(options.model, device=pick_device(options.device), weights=options.weights)


def _run_of(model: str) -> str:
    """The run directory that a checkpoint lies in; another model's own folder."""
    return re.sub(r"/checkpoints/[^/]+/*$", "", model)


def _write(path: str, picture: np.ndarray) -> None:
    _write_bytes(path, images.png_bytes(picture))


def _write_figure(path: str, figure: figures.Figure) -> None:
    _write(path, images.table(figure.tiles, figure.rows, figure.columns))


def _write_bytes(path: str, data: bytes) -> None:
    folder, name = _split(path)
    folder.write(data, name)
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


def _require_label(options: argparse.Namespace, model: inference.Model) -> None:
    if options.label is not None:
        _require(model.num_classes, "--label: this model is not conditional on classes")
        _require(
            0 <= options.label < model.num_classes, f"--label: {options.label} is not in 0 .. {model.num_classes - 1}"
        )


def _require(condition: object, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)
