"""Commands that draw what a model makes of latents and images."""

from __future__ import annotations

import argparse
import math
import re

import torch
from torch import Tensor

from sivae import figures, images, inference
from sivae.commands.files import (
    given,
    load_model,
    read_image,
    read_images,
    require,
    require_unused,
    write_bytes,
    write_figure,
    write_picture,
)
from sivae.errors import shown
from sivae.progress import progress_bar
from sivae.randomness import fixed_latents
from sivae.storage import Folder

NUM_SHOWN = 64  # of the samples that go into a folder, in the picture
SAMPLE_BATCH = 64  # samples made at once


def sample(options: argparse.Namespace) -> None:
    count = given(options.count, 8 if options.truncation_sweep else 64)
    require(count > 0, f"--count: {count} is not a number of images")
    require(options.seed >= 0, f"--seed: {options.seed} is negative")
    if options.truncation_sweep is not None:
        require_unused(
            options, ("truncation", "truncation_layers", "folder"), "goes without --truncation-sweep, which is one picture"
        )  # fmt: skip
    model = load_model(options)
    require(len(model.sample_shape) == 3, "this model is not one of images")
    _require_label(options, model)
    if options.truncation_sweep is not None:
        require(
            options.truncation_sweep >= 2,
            f"--truncation-sweep: {options.truncation_sweep} is too few, both ends make 2",
        )
        write_figure(
            options.output,
            figures.truncation_sweep(model, count, options.seed, options.truncation_sweep, options.label),
        )
        return
    folder = Folder(options.folder) if options.folder else None
    if folder is not None:
        _require_no_others(folder, count)
    num_shown = count if folder is None else min(count, NUM_SHOWN)
    truncation = {"truncation": given(options.truncation, 1.0), "truncation_layers": options.truncation_layers}
    pictured = []
    with progress_bar(count, "writing", " images", enabled=folder is not None) as bar:
        for first in range(0, count, SAMPLE_BATCH):
            num = min(SAMPLE_BATCH, count - first)
            labels = None if options.label is None else torch.full((num,), options.label)
            made = model.sample(num, seed=options.seed, labels=labels, first=first, **truncation)
            made = model.to_uint8(made).cpu()
            pictured.append(made[: max(0, num_shown - first)])
            if folder is not None:
                for number, image in enumerate(made, first):
                    folder.write(images.png_bytes(images.pixels(image)), _name(number))
                    bar.update()
    write_picture(options.output, images.grid(torch.cat(pictured), columns=_columns(num_shown)))
    if folder is not None:
        print(f"{options.folder}: {count} images; the picture shows the first {num_shown}")


def reconstruct(options: argparse.Namespace) -> None:
    require(options.count > 0, f"--count: {options.count} is not a number of images")
    model = load_model(options)
    real, labels = read_images(options.source, model, options.count, options.label)
    if options.levels:
        write_figure(options.output, figures.levels(model, real, labels))
        return
    again, error = [], 0.0
    for first in range(0, len(real), figures.BATCH):
        part = slice(first, first + figures.BATCH)
        made = model.reconstruct(real[part], None if labels is None else labels[part])
        again.append(model.to_uint8(made).cpu())
        error += ((again[-1].double() - real[part].double()) / 255).square().sum().item()
    write_picture(options.output, images.panels({"real": real, "reconstructed": torch.cat(again)}, _columns(len(real))))
    error /= real.numel()
    print(f"mean squared error {error:.5f} over {len(real)} images (values in [0, 1], rounded to 8 bits)")


def interpolate(options: argparse.Namespace) -> None:
    frames = given(options.frames, 30)
    require(options.steps >= 2, f"--steps: {options.steps} is too few, both ends make 2")
    require(frames >= 2, f"--frames: {frames} is too few, both ends make 2")
    if options.gif is None:
        require_unused(options, ("frames",), "goes with --gif")
    model = load_model(options)
    first, labels = read_image(options.first, model, options.label)
    second, second_labels = read_image(options.second, model, options.label)

    def path(steps: int) -> Tensor:
        between = model.interpolate(first, second, steps, labels, second_labels, spherical=options.spherical)
        return model.to_uint8(between[0]).cpu()

    write_picture(
        options.output, images.grid(torch.cat([first, path(options.steps), second]), columns=options.steps + 2)
    )
    if options.gif:
        write_bytes(options.gif, images.gif_bytes(path(frames)))


def traverse(options: argparse.Namespace) -> None:
    for name, least in (("count", 1), ("dims", 1), ("steps", 2)):
        value = getattr(options, name)
        require(value >= least, f"--{name}: {value} is too few, give {least} or more")
    require(0 < options.reach < math.inf, f"--reach: {options.reach} is not a distance above 0")
    model = load_model(options)
    real, labels = read_images(options.source, model, options.count, options.label)
    write_figure(options.output, figures.traversals(model, real, options.dims, options.steps, labels, options.reach))


def stylemix(options: argparse.Namespace) -> None:
    require(options.count > 0, f"--count: {options.count} is not a number of rows and columns")
    require(options.seed >= 0, f"--seed: {options.seed} is negative")
    model = load_model(options)
    num_layers = model.num_layers
    _require_label(options, model)
    num_coarse = figures.default_num_coarse(model) if options.coarse_layers is None else options.coarse_layers
    require(
        0 <= num_coarse <= num_layers,
        f"--coarse-layers: {num_coarse} is not in 0 .. {num_layers}, the layers of this model",
    )
    drawn = fixed_latents(options.seed, 2 * options.count, model.latent_dim).split(options.count)

    def latents(source: str | None, otherwise: Tensor) -> Tensor:
        if source is None:
            return otherwise
        require(
            not model.num_classes or options.label is not None,
            "--label: this model is conditional on classes, and the mixed images are of one; give it",
        )
        real, labels = read_images(source, model, options.count)
        if labels is None and options.label is not None:
            labels = torch.full((len(real),), options.label)
        return model.encode(real, labels)[0]

    coarse, fine = latents(options.rows, drawn[0]), latents(options.columns, drawn[1])
    write_figure(options.output, figures.style_mixing(model, coarse, fine, num_coarse, options.label))


def translate(options: argparse.Namespace) -> None:
    require(options.count > 0, f"--count: {options.count} is not a number of images")
    model = load_model(options)
    content, _ = read_images(options.content, model, options.count, spread=True)
    class_, _ = read_images(options.class_, model, options.count, spread=True)
    translated = model.to_uint8(model.translate(content, class_)).cpu()
    write_picture(
        options.output, images.grid(images.with_margins(translated, content, class_), columns=len(class_) + 1)
    )


def _name(number: int) -> str:
    """Of the file of one sample."""
    return f"{number:06d}.png"


def _require_no_others(folder: Folder, count: int) -> None:
    """Raises UserError for a folder with samples that `count` new ones would not replace: it would hold those of two calls."""
    own = {_name(number) for number in range(count)}
    others = [name for name in folder.names() if re.fullmatch(r"\d{6,}\.png", name) and name not in own]
    require(
        not others,
        f"--folder: {shown(folder.url)} holds {len(others):,} images that these {count:,} would not replace, the first is"
        f" {others and others[0]}; delete them, or give another folder",
    )


def _columns(count: int) -> int:
    return min(16, max(1, round(count**0.5)))


def _require_label(options: argparse.Namespace, model: inference.Model) -> None:
    if options.label is not None:
        require(model.num_classes, "--label: this model is not conditional on classes")
        require(
            0 <= options.label < model.num_classes, f"--label: {options.label} is not in 0 .. {model.num_classes - 1}"
        )
