"""Commands on the latents of a whole set: encode, neighbours, attribute."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from sivae import figures, inference
from sivae.commands.files import (
    given,
    load_model,
    load_on_all,
    open_images,
    open_set,
    read_image,
    read_images,
    require,
    require_unused,
    split_path,
    take,
    write_figure,
)
from sivae.errors import shown
from sivae.progress import progress_bar
from sivae.storage import Folder

if TYPE_CHECKING:
    from sivae.data import ImageStream
    from sivae.encoded import EncodedSet
    from sivae.latents import Direction


def encode(options: argparse.Namespace) -> None:
    from sivae import distributed
    from sivae.encoded import encode_set

    require(options.batch_size > 0, f"--batch-size: {options.batch_size} is not a number of images")
    with distributed.join(options.device) as group:
        model = load_on_all(options, group)
        stream = group.together(lambda: open_set(options.data, options.split, model, progress=group.is_main))
        encoded = encode_set(
            model, stream, Folder(options.dest), group, split=options.split, file_format=options.format,
            batch_size=options.batch_size,
        )  # fmt: skip
        if group.is_main:
            print(
                f"{encoded.where}: {len(encoded):,} images, {encoded.latent_dim} latent dimensions, {len(encoded.parts):,} parts"
            )


def neighbours(options: argparse.Namespace) -> None:
    model = load_model(options)
    image, labels = read_image(options.image, model, options.label)
    stream, encoded = _open_latents(options, model)
    require(
        1 <= options.count <= len(stream),
        f"--count: {options.count} is not in 1 .. {len(stream)}, the images of {stream.where}",
    )
    figure, numbers, distances = figures.neighbours(model, image, stream, options.count, labels, encoded)
    picks = _picks(options.data, stream, numbers.tolist())
    names = [f"#{pick}\n{distance:.2f}" for pick, distance in zip(picks, distances.tolist())]
    write_figure(options.output, dataclasses.replace(figure, columns=["real", "rec", *names]))
    for pick, number, distance in zip(picks, numbers.tolist(), distances.tolist()):
        label = "" if stream.index.label is None else f", label {stream.index.label[number]}"
        name = stream.names.get(stream.index.key[number], "")
        named = f", {name if name.isprintable() else repr(name)}" if name else ""
        print(f"{distance:8.4f}  #{pick}{named}, {stream.index.name(number)}{label}")


def _picks(data: str, stream: ImageStream, numbers: list[int]) -> list[int]:
    """The N by which `SET#N` picks these images of a stream, which may be one split: their numbers in the whole set."""
    from sivae.data import Index
    from sivae.data.sources import DRAWN

    keys = stream.index.key
    if data in DRAWN:  # packed split by split, and picked in the order of its drawing, which its keys tell
        return [int(keys[number]) for number in numbers]
    first = Index.load(stream.folder).key.index(keys[0])
    return [first + number for number in numbers]


def attribute(options: argparse.Namespace) -> None:
    from sivae.latents import Direction

    for name, least in (("count", 1), ("steps", 2)):
        value = getattr(options, name)
        require(value >= least, f"--{name}: {value} is too few, give {least} or more")
    require(0 < options.reach < math.inf, f"--reach: {options.reach} is not a distance above 0")
    folders = options.positives is not None or options.negatives is not None
    require(
        (options.label is not None) + folders + (options.direction is not None) == 1,
        "give the attribute once: as --label, as --positives and --negatives, or as the --direction that was found before",
    )
    require(not folders or (options.positives and options.negatives), "--positives and --negatives go together")
    require(
        options.label is None or options.data or options.encoded, "--label: of which set? give its --data, or --encoded"
    )
    if options.direction is not None:
        require_unused(options, ("save", "encoded"), "goes without --direction, which is there already")
    else:
        options.save = given(options.save, "attribute.safetensors")
    if folders:
        require_unused(options, ("encoded",), "goes with --label; --positives and --negatives are encoded now")
    if not (options.data or options.encoded):
        require_unused(options, ("split",), "goes with --data")
    require(options.image_label is None or options.images, "--image-label: goes with --images")
    require(options.images or options.data, "give the --images to change, or --data to take the first ones of that set")
    model = load_model(options)
    stream, encoded = _open_latents(options, model)
    if options.images:
        real, labels = read_images(options.images, model, options.count, options.image_label)
        require(
            not model.num_classes or labels is not None,
            f"--images: have no labels, and this model is conditional on {model.num_classes} classes; give theirs as --image-label",
        )
    else:
        first = stream.sample(range(min(options.count, len(stream))))
        real, labels = first.images, first.labels
    if options.direction is not None:
        direction = Direction.load(*split_path(options.direction))
        direction.check(model.latent_dim, inference.weights_digest(model), options.direction)
    else:
        direction = _find_direction(options, model, stream, encoded)
        direction.save(*split_path(options.save))
        print(options.save)
    # Rounded, so that the middle one is 0.
    strengths = np.linspace(-options.reach, options.reach, options.steps).round(9).tolist()
    write_figure(options.output, figures.attribute(model, real, direction, strengths, labels))
    print(f"{direction.name}: {direction.separation.sentence()}")


def _find_direction(
    options: argparse.Namespace, model: inference.Model, stream: ImageStream | None, encoded: EncodedSet | None
) -> Direction:
    from sivae.encoded import latents_of
    from sivae.latents import DirectionFit, check_examples

    fit = DirectionFit(model.latent_dim)
    if options.label is None:
        name = f"{shown(options.positives)} against {shown(options.negatives)}"
        opened = [(source, open_images(source, model)) for source in (options.positives, options.negatives)]
        check_examples(name, *(len(items) for _, items in opened))
        for (source, items), positive in zip(opened, (True, False)):
            with progress_bar(len(items), f"encoding {shown(source)}", " images") as bar:
                for first in range(0, len(items), figures.BATCH):
                    numbers = range(first, min(first + figures.BATCH, len(items)))
                    mu, _ = model.encode(*take(items, numbers, model))
                    fit.add(mu.float().cpu(), torch.full((len(numbers),), positive))
                    bar.update(len(numbers))
    else:
        held = encoded or stream
        require(held.num_classes, f"--label: {held.where} has no labels; pack it with --labels")
        require(
            0 <= options.label < held.num_classes,
            f"--label: {options.label} is not in 0 .. {held.num_classes - 1}, the labels of {held.where}",
        )
        name = f"label {options.label}"
        if encoded is None:
            num_positives = int((stream.index.label == options.label).sum())
            check_examples(name, num_positives, len(stream) - num_positives)
        for part in latents_of(model, stream, encoded):
            fit.add(part.mu, part.label == options.label)
    return fit.finish(name, inference.weights_digest(model))


def _open_latents(options: argparse.Namespace, model: inference.Model) -> tuple[ImageStream | None, EncodedSet | None]:
    """The set of --data and its latents of --encoded, each None where it is not given; they belong to each other and the model."""
    from sivae.encoded import EncodedSet

    encoded = EncodedSet(Folder(options.encoded)) if options.encoded else None
    if encoded is not None:
        encoded.check(model)
    split = options.split or (encoded.split if encoded is not None else "all")
    require(
        encoded is None or split == encoded.split,
        f"--split: {options.encoded} holds the split {encoded and encoded.split}, not {split}",
    )
    stream = open_set(options.data, split, model) if options.data else None
    if encoded is not None and stream is not None:
        encoded.check_set(stream)
    return stream, encoded
