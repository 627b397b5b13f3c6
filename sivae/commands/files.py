"""What the commands read and write: models, images of any source, pictures; and the sentence for an option that is wrong."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sivae import figures, images, inference
from sivae.errors import UserError, shown
from sivae.storage import Folder

if TYPE_CHECKING:
    from sivae.data import ImageStream
    from sivae.data.sources import Sample
    from sivae.distributed import Group


def read_images(
    source: str, model: inference.Model, count: int, label: int | None = None, spread: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Up to `count` images as the model takes them: uint8 [N, C, H, W], with labels int64 [N]: `label`, or else the source's, or None.

    `source` is an image file, a folder, a packed set or a pyramid of them, an array file, `digits:` or `shapes:`; with `#N`
    only its image N, of all splits together. The first ones, or with `spread` some from all over it.
    """
    source, number = _split_number(source)
    items = open_images(source, model)
    if label is not None:
        require(model.num_classes, "--label: this model is not conditional on classes")
    require(number is None or number < len(items), f"{source}: has images 0 to {len(items) - 1}, not {number}")
    count = min(count, len(items))
    numbers = np.linspace(0, len(items) - 1, count).astype(int).tolist() if spread else list(range(count))
    if number is not None:
        numbers = [number]
    pixels, labels = take(items, numbers, model)
    return pixels, labels if label is None else torch.full((len(pixels),), label)


def read_image(source: str, model: inference.Model, label: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The one image that a source is or `#N` picks, as `read_images` gives it. Raises UserError where there are more."""
    image, labels = read_images(source, model, 2, label)
    require(
        len(image) == 1, f"{source}: has more than one image, and one is to be picked; write {source}#N for image N"
    )
    return image, labels


def open_images(source: str, model: inference.Model) -> Sequence[Sample] | ImageStream:
    """What `read_images` takes images from, for `take`."""
    from sivae.data.fit import SMALLEST_LEVEL
    from sivae.data.sources import DRAWN, IMAGE_SUFFIXES, open_source

    require(len(model.sample_shape) == 3, "this model is not one of images")
    _, resolution, _ = model.sample_shape
    folder = Folder(source)
    has_query = folder.is_web and "?" in source  # which files alone have; elsewhere it is part of a name
    names = (source, source.partition("?")[0]) if has_query else (source,)
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return [_read_file(source)]
    # A packed set has an index, and a pyramid one in each of its levels.
    places = ((), (str(resolution),), (str(SMALLEST_LEVEL),))
    if source not in DRAWN and not has_query and any(folder.exists(*place, "index.json") for place in places):
        return open_set(source, "all", model)
    return open_source(source, resolution=resolution)


def take(
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


def _split_number(source: str) -> tuple[str, int | None]:
    """A source and the N of its `#N`; None where it has none, or is a file or folder with such a name."""
    match = re.fullmatch(r"(.*)#([0-9]+)", source, re.DOTALL)
    folder = Folder(source)
    # A web server never sees what follows a #.
    if match is None or (not folder.is_web and folder.exists()):
        return source, None
    return match[1], int(match[2])


def open_set(url: str, split: str, model: inference.Model, progress: bool = True) -> ImageStream:
    from sivae.data import open_stream

    require(len(model.sample_shape) == 3, "this model is not one of images")
    channels, resolution, _ = model.sample_shape
    fitting = {"resolution": resolution, "num_channels": channels, "random_crop": model.random_crop}
    return open_stream(url, split=split, batch_size=1, progress=progress, **fitting)


def _read_file(path: str) -> Sample:
    """One image file, as a source would give it."""
    from sivae.data.sources import Sample
    from sivae.data.sources.pictures import decode

    folder, name = split_path(path)
    return Sample(path, decode(folder.read(name), f"{shown(path)}:")[0])


def load_model(options: argparse.Namespace) -> inference.Model:
    """The model of a command, after a look at the names of the files that it is to write, and whether they can be. It raises
    UserError for images that are not finite, which a picture would show as black."""
    from sivae.distributed import pick_device

    paths = {option: getattr(options, option, None) for option in ("output", "gif", "save")}
    for option, suffix in (("output", ".png"), ("gif", ".gif")):
        path = paths[option]
        require(
            path is None or path.lower().endswith(suffix),
            f"--{option}: {path} is written as {suffix}; name it like that",
        )
    model = inference.load(options.model, device=pick_device(options.device), weights=options.weights)
    for path in filter(None, paths.values()):
        folder, _ = split_path(path)
        if not folder.is_web:  # which may take files and delete none
            folder.try_writing()

    def check(decoder: torch.nn.Module, latents: tuple[Tensor, ...], made: Tensor) -> None:
        require(
            made.isfinite().all(),
            f"{shown(options.model)}: makes images that are not finite; take an earlier checkpoint",
        )

    model.decoder.register_forward_hook(check)
    return model


def load_on_all(options: argparse.Namespace, group: Group) -> inference.Model:
    """What `inference.load` gives rank 0, on every rank: a run that goes on may have a newer checkpoint for whoever looks later."""
    model = None

    def find() -> tuple[dict[str, Any], dict[str, Any], str | None]:
        nonlocal model
        model = inference.load(options.model, device=group.device, weights=options.weights)
        return model.settings, model.info, model.weights

    settings, info, weights = group.on_main(find)
    tensors = group.broadcast(None if model is None else inference.tensors_of(model))
    if model is None:
        model = inference.Model(settings, group.device, info, weights)
        inference.fill(model, tensors, options.model)
    return model


def write_picture(path: str, picture: np.ndarray) -> None:
    write_bytes(path, images.png_bytes(picture))


def write_figure(path: str, figure: figures.Figure) -> None:
    write_picture(path, images.table(figure.tiles, figure.rows, figure.columns))


def write_bytes(path: str, data: bytes) -> None:
    folder, name = split_path(path)
    folder.write(data, name)
    print(path)


def split_path(path: str) -> tuple[Folder, str]:
    """The folder of a file, at a path or URL, and its name, with which a query stays. Raises UserError for one in no folder."""
    from sivae.data.sources.files import split_url

    folder, name = split_url(path)
    require(not re.fullmatch(r"\w+:/{2,}", folder), f"{path}: lies in no folder; give one, as in {folder}folder/{name}")
    return Folder(folder), name


def given(value: Any, default: Any) -> Any:
    """An option's value, or the default of one that was not given."""
    return default if value is None else value


def require_unused(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raises UserError when one of these options was given: it would count for nothing."""
    used = [name for name in names if getattr(options, name) is not None]
    require(not used, f"--{used and used[0].replace('_', '-')}: {why}")


def require(condition: object, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)
