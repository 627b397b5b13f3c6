"""What the subcommands do; each takes the parsed options and returns an exit code or None."""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sivae import config, images, inference
from sivae.cli import EXIT_INTERRUPTED
from sivae.errors import UserError
from sivae.storage import Folder


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

    index = pack_set(
        options.source,
        options.dest,
        resolution=options.resolution,
        num_channels=options.num_channels,
        labels=options.labels,
    )
    classes = f", {index.num_classes} classes" if index.num_classes else ""
    print(
        f"{index.count:,} images of {index.resolution} pixels, {index.num_channels} channels{classes}: train with data.url={options.dest}"
    )


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
    samples = model.to_uint8(model.sample(options.count, seed=options.seed, labels=labels)).cpu()
    _write(options.output, images.grid(samples, columns=_columns(options.count)))
    if options.folder:
        folder = Folder(options.folder)
        for index, image in enumerate(tqdm(samples, desc="writing", unit=" images")):
            folder.write(images.png_bytes(images.pixels(image)), f"{index:06d}.png")
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
    "train": train, "pack": pack, "sample": sample, "reconstruct": reconstruct, "interpolate": interpolate,
    "import": import_, "export": export, "doctor": doctor,
}  # fmt: skip


def read_images(
    source: str, model: inference.Model, count: int, label: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Up to `count` images as the model takes them: uint8 [N, C, H, W], with labels int64 [N]: `label`, or the source's, or None.

    `source` is an image file, a folder, a packed set, an array file or `digits:`; with `#N` only its image N.
    """
    from sivae.data import ImageStream
    from sivae.data.pack import fit
    from sivae.data.sources import IMAGE_SUFFIXES, open_source

    _require(len(model.sample_shape) == 3, "this model is not one of images")
    source, _, number = source.partition("#")
    _require(not number or number.isdecimal(), f"{source}#{number}: #N picks an image by its number")
    channels, resolution, _ = model.sample_shape
    if source.lower().endswith(IMAGE_SUFFIXES):
        items = [_read_file(source)]
    elif source != "digits:" and Folder(source).exists("index.json"):
        items = ImageStream(source, batch_size=1, resolution=resolution, num_channels=channels)
    else:
        items = open_source(source, resolution=resolution)
    if label is not None:
        _require(model.num_classes, "--label: this model is not conditional on classes")
    _require(not number or int(number) < len(items), f"{source}: has images 0 to {len(items) - 1}, not {number}")
    numbers = [int(number)] if number else list(range(min(count, len(items))))
    if isinstance(items, ImageStream):
        batch = items.sample(numbers)
        pixels, labels = batch.images, batch.labels
    else:
        found = [items[i] for i in numbers]
        fitted = [
            np.asarray(fit(image, resolution, channels)).reshape(resolution, resolution, -1) for _, image, _ in found
        ]
        pixels = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()
        labels = None if found[0][2] is None else torch.tensor([own for _, _, own in found])
    return pixels, labels if label is None else torch.full((len(pixels),), label)


def _read_file(path: str) -> tuple[str, np.ndarray, None]:
    """One image file, as a source would give it."""
    from PIL import Image

    from sivae.data.sources import to_uint8

    folder, name = _split(path)
    data = folder.read(name)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return path, to_uint8(image), None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


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


def _require(condition: object, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)
