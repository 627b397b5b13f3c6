"""Figures of a loaded model: what its latents, styles and levels of detail do to an image. Every one is a grid of tiles.

After the figures of Soft-IntroVAE (arXiv 2012.13253) and StyleGAN (arXiv 1812.04948).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae.data import ImageStream
from sivae.encoded import EncodedSet, latents_of
from sivae.errors import UserError
from sivae.images import to_float, with_margins
from sivae.inference import Model
from sivae.latents import Direction, nearest
from sivae.objectives import kl
from sivae.randomness import fixed_latents

BATCH = 16  # images that are decoded at once
TRAINING_PIXELS = 128


@dataclass(frozen=True)
class Figure:
    """Tiles uint8 [rows * columns, C, H, W], row by row, with a name for each row and column ("" for none)."""

    tiles: Tensor
    rows: list[str]
    columns: list[str]


def style_mixing(model: Model, coarse: Tensor, fine: Tensor, num_coarse: int, label: int | None = None) -> Figure:
    """Rows follow a coarse source in their first `num_coarse` layers, columns a fine source in the others.

    coarse [R, latent_dim] and fine [C, latent_dim] are latents; the images that they make by themselves stand at the left and
    at the top. Raises UserError for a family without styles and for layers that there are not.
    """
    rows = []
    for latent in coarse:
        parts = [
            model.mix(latent.expand(len(part), -1), part, num_coarse, _labels(model, len(part), label))
            for part in fine.split(BATCH)
        ]
        rows.append(model.to_uint8(torch.cat(parts)).cpu())
    top, left = _decode(model, fine, label), _decode(model, coarse, label)
    tiles = with_margins(torch.stack(rows), left, top)
    return Figure(tiles, [""] * (len(coarse) + 1), [""] * (len(fine) + 1))


def truncation_sweep(model: Model, count: int, seed: int, num_steps: int, label: int | None = None) -> Figure:
    """Samples, a row each, with styles from the far side of the average (psi -1) over it (0) to as they are (1).

    Of a conditional model they have one label, or where it is None classes evenly.
    """
    labels = None if label is None else torch.full((count,), label)
    values = [2 * step / (num_steps - 1) - 1 for step in range(num_steps)]
    columns = [
        model.to_uint8(model.sample(count, seed=seed, labels=labels, batch_size=BATCH, truncation=psi)).cpu()
        for psi in values
    ]
    tiles = torch.stack(columns, dim=1).flatten(0, 1)
    return Figure(tiles, [""] * count, [f"psi {psi:.3g}" for psi in values])


def levels(model: Model, images: Tensor, labels: Tensor | None = None) -> Figure:
    """Images uint8 [B, C, H, W], a column each, then what the encoder and decoder make of them at each level of detail."""
    low, high = model.value_range
    size = images.shape[-1]
    rows, names = [images], ["real"]
    for level in range(model.num_layers // 2):
        pixels = 4 << level
        small = F.avg_pool2d(to_float(images.to(model.device), low, high), size // pixels)
        made = torch.cat([model.reconstruct_level(part, level, own) for part, own in _batches(small, labels)])
        rows.append(F.interpolate(model.to_uint8(made), scale_factor=size // pixels, mode="nearest").cpu())
        names.append(f"{pixels} px")
    return Figure(torch.cat(rows), names, [""] * len(images))


def interpolation(
    model: Model, first: Tensor, second: Tensor, num_steps: int, labels: Tensor | None = None,
    second_labels: Tensor | None = None,
) -> Figure:  # fmt: skip
    """The straight way in latent space between two images uint8 [1, C, H, W], which stand at its ends."""
    path = model.to_uint8(model.interpolate(first, second, num_steps, labels, second_labels)[0]).cpu()
    columns = ["real", *[""] * num_steps, "real"]
    return Figure(torch.cat([first.cpu(), path, second.cpu()]), [""], columns)


def traversals(
    model: Model, images: Tensor, num_dims: int, num_steps: int, labels: Tensor | None = None, reach: float = 3.0
) -> Figure:
    """The first image with one latent value moved from -`reach` to `reach`; the prior has standard deviation 1.

    images: uint8 [B, C, H, W]. Rows are the latent dimensions with the highest mean KL divergence over them: those that tell
    most about an image.
    """
    parts = [model.encode(part, own) for part, own in _batches(images, labels)]
    mu, logvar = (torch.cat(values).float() for values in zip(*parts))
    # A latent dimension is a latent of its own: [B, D] as [B * D, 1].
    divergence = kl(mu.reshape(-1, 1), logvar.reshape(-1, 1)).view_as(mu).mean(0)
    dims = divergence.topk(min(num_dims, model.latent_dim)).indices.tolist()
    values = torch.linspace(-reach, reach, num_steps, device=mu.device)
    z = mu[0].repeat(len(dims), num_steps, 1)
    for row, dim in enumerate(dims):
        z[row, :, dim] = values
    label = None if labels is None else int(labels[0])
    tiles = _decode(model, z.flatten(0, 1), label)
    return Figure(
        tiles, [f"z{dim}\n{divergence[dim]:.2g} nats" for dim in dims], [f"{value:.3g}" for value in values.tolist()]
    )


def neighbours(
    model: Model, image: Tensor, stream: ImageStream, count: int, labels: Tensor | None = None,
    encoded: EncodedSet | None = None,
) -> tuple[Figure, Tensor, Tensor]:  # fmt: skip
    """An image, its reconstruction, and the `count` images of a set whose latent means are nearest to its own.

    image: uint8 [1, C, H, W]. encoded: the set's latents, where they are kept; otherwise the set is encoded now. Also returns
    the neighbours' numbers int64 [count] and Euclidean distances float32 [count], the nearest first: `latents.nearest`.
    """
    if not 1 <= count <= len(stream):
        raise UserError(f"{count} neighbours are asked for, and {stream.where} has {len(stream):,} images")
    mu = model.encode(image, labels)[0].float().cpu()
    blocks = ((part.number, part.mu) for part in latents_of(model, stream, encoded))
    distances, numbers = (found[0] for found in nearest(mu, blocks, count))
    again = model.to_uint8(model.reconstruct(image, labels)).cpu()
    tiles = torch.cat([image, again, stream.sample(numbers).images])
    names = [f"#{number}\n{distance:.2f}" for number, distance in zip(numbers.tolist(), distances.tolist())]
    return Figure(tiles, [""], ["real", "rec", *names]), numbers, distances


def attribute(
    model: Model, images: Tensor, direction: Direction, strengths: list[float], labels: Tensor | None = None
) -> Figure:
    """Images uint8 [B, C, H, W], a row each, then what they become with an attribute added at each strength; 0 reconstructs.

    strengths: in standard deviations along the direction; below 0 they take the attribute away.
    """
    rows = []
    for part, own in _batches(images, labels):
        moved = direction.move(model.encode(part, own)[0], torch.tensor(strengths)).flatten(0, 1)
        own = None if own is None else own.repeat_interleave(len(strengths))
        made = torch.cat([model.decode(z, label) for z, label in _batches(moved, own)])
        made = model.to_uint8(made).cpu().unflatten(0, (len(part), len(strengths)))
        rows.append(torch.cat([part[:, None], made], dim=1))
    tiles = torch.cat(rows).flatten(0, 1)
    return Figure(
        tiles, [""] * len(images), ["real", *(f"{strength:+.3g}" if strength else "0" for strength in strengths)]
    )


def of_training(model: Model, images: Tensor, labels: Tensor | None, seed: int) -> dict[str, Figure]:
    """By name, what training shows beside its samples: always the same images and latents, in tiles of 128 pixels at most."""
    found = {"traversals": traversals(model, images, num_dims=6, num_steps=7, labels=labels)}
    if len(images) > 1:
        own = (None, None) if labels is None else (labels[:1], labels[1:2])
        found["interpolation"] = interpolation(model, images[:1], images[1:2], 8, *own)
    if model.settings["family"] == "style":
        if model.stage:  # one that did not grow knows only the highest
            found["levels"] = levels(model, images[:8], labels if labels is None else labels[:8])
        z = fixed_latents(seed, 8, model.latent_dim)
        found["stylemix"] = style_mixing(model, z[:4], z[4:], default_num_coarse(model))
        found["truncation"] = truncation_sweep(model, 4, seed, num_steps=7)
    return {name: replace(figure, tiles=_shrunk(figure.tiles)) for name, figure in found.items()}


def default_num_coarse(model: Model) -> int:
    """Layers of 4 and 8 pixels, which set pose and shape (StyleGAN); of a small model the lower half."""
    return min(4, model.num_layers // 2)


def _shrunk(tiles: Tensor) -> Tensor:
    factor = max(1, tiles.shape[-1] // TRAINING_PIXELS)
    return tiles if factor == 1 else F.avg_pool2d(tiles.float(), factor).round().to(torch.uint8)


def _batches(images: Tensor, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for first in range(0, len(images), BATCH):
        part = slice(first, first + BATCH)
        yield images[part], None if labels is None else labels[part]


def _decode(model: Model, z: Tensor, label: int | None) -> Tensor:
    """uint8 on the CPU."""
    parts = [model.decode(part, _labels(model, len(part), label)) for part in z.split(BATCH)]
    return model.to_uint8(torch.cat(parts)).cpu()


def _labels(model: Model, count: int, label: int | None) -> Tensor | None:
    """One class for all tiles of a conditional model; class 0 when none is asked for."""
    return torch.full((count,), label or 0) if model.num_classes else None
