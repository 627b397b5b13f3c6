"""Geometry of latents: the way between two, the nearest of many, the direction of an attribute. Tensors in, numbers out.

Distances are Euclidean between the means of q(z | x), the practice of the field. The prior has the same scale in every
dimension, and one that tells nothing about images has a mean near 0 for all of them, so it adds nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sivae.errors import UserError, shown
from sivae.metrics.ood import auroc
from sivae.storage import Folder

HELD_OUT_EVERY, MAX_HELD_OUT = 5, 10_000  # of each class, every fifth example, and so many at most
MIN_EXAMPLES = 10  # of each class
SIGNIFICANT = 1.96  # standard errors


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation of latents [..., D] (Shoemake 1985; for latents White, arXiv 1609.04468); weights broadcast, [..., 1].

    The direction turns at a constant rate along the great circle, and the norm goes evenly from one to the other. Parallel
    latents are joined by the straight line, opposite ones by one of their great circles, always the same one. The straight
    line is also taken from or to the zero vector, and in one dimension, where there is nothing to turn in.
    """
    dtype = first.dtype
    first, second, weights = first.double(), second.double(), weights.double()
    straight = torch.lerp(first, second, weights)
    if first.shape[-1] == 1:
        return straight.to(dtype)
    norms = [end.norm(dim=-1, keepdim=True) for end in (first, second)]
    start, stop = (end / norm.clamp_min(1e-300) for end, norm in zip((first, second), norms))
    # What of the second is at a right angle to the first: with it, the plane to turn in.
    cosine = (start * stop).sum(dim=-1, keepdim=True)
    across = stop - cosine * start
    sine = across.norm(dim=-1, keepdim=True)
    # On one line, any right angle will do: that of the axis which the first leans to least.
    axis = torch.zeros_like(start).scatter_(-1, start.abs().argmin(dim=-1, keepdim=True), 1.0)
    other = axis - (axis * start).sum(dim=-1, keepdim=True) * start
    across = torch.where(sine > 1e-9, across, other)
    across = across / across.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    angle = weights * torch.atan2(sine, cosine)
    turned = torch.lerp(*norms, weights) * (angle.cos() * start + angle.sin() * across)
    return torch.where((norms[0] > 0) & (norms[1] > 0), turned, straight).to(dtype)


def nearest(query: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Distances float32 and numbers int64, both [Q, count], of the latents nearest to query [Q, D], the nearest first.

    blocks: pairs of numbers int64 [B] and latents [B, D]; only one is held at a time. Of equally near ones those that come
    first are taken. There are fewer than `count` where the blocks hold fewer.
    """
    best, found = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)
    for numbers, latents in blocks:
        # The differences themselves: |a|^2 - 2ab + |b|^2 would find an image at a distance from itself.
        distances = torch.cdist(query, latents, compute_mode="donot_use_mm_for_euclid_dist")
        best, order = torch.cat([best, distances], dim=1).sort(dim=1, stable=True)
        found = torch.cat([found, numbers.expand(len(query), -1)], dim=1).gather(1, order)[:, :count]
        best = best[:, :count]
    return best, found


@dataclass(frozen=True)
class Separation:
    """How well a direction tells held-out examples of a class from the others, by where they fall along it."""

    distance: float
    """Between the means of the two classes, in standard deviations within a class."""
    auroc: float
    """Chance that one of the class lies further along than one of the others; 0.5 is a coin's."""
    accuracy: float
    """Mean of both classes' shares on their side of the middle; 0.5 is a coin's."""
    num_positives: int
    num_negatives: int
    """Examples that the direction was found from; `held_out` are the others, which judge it."""
    held_out: tuple[int, int]

    @property
    def is_chance(self) -> bool:
        """Whether a direction that tells nothing would do as well in more than one of 40 cases (Mann and Whitney 1947)."""
        positives, negatives = self.held_out
        deviation = math.sqrt((positives + negatives + 1) / (12 * positives * negatives))
        return self.auroc <= 0.5 + SIGNIFICANT * deviation

    def sentence(self) -> str:
        text = (
            f"AUROC {self.auroc:.3f}, balanced accuracy {self.accuracy:.1%} on {sum(self.held_out):,} held-out examples;"
            f" the classes' means are {self.distance:.2f} standard deviations apart"
        )
        return f"{text}; this is no better than chance, so expect nothing of it" if self.is_chance else text


@dataclass(frozen=True)
class Direction:
    """The way through latent space along which an attribute grows."""

    vector: Tensor
    """float32 [D], of length 1."""
    deviation: float
    """Standard deviation, within a class, of latents along it: a strength of 1."""
    name: str
    weights_sha256: str
    """Of the model whose latents these are: in another's they mean nothing."""
    separation: Separation

    def move(self, latents: Tensor, strengths: Tensor) -> Tensor:
        """Latents [B, D], moved by each of the strengths [S], in standard deviations: [B, S, D]."""
        step = self.deviation * self.vector.to(latents)
        return latents[:, None] + strengths.to(latents)[None, :, None] * step

    def save(self, folder: Folder, name: str) -> None:
        described = {
            "format": "sivae-direction-1", "name": self.name, "deviation": repr(self.deviation),
            "weights_sha256": self.weights_sha256, "separation": json.dumps(asdict(self.separation)),
        }  # fmt: skip
        folder.write(save_tensors({"direction": self.vector.contiguous()}, metadata=described), name)

    @classmethod
    def load(cls, folder: Folder, name: str) -> Direction:
        """Raises UserError when there is none, or a damaged one."""
        data = folder.read(name)
        try:
            vector, described = load_tensors(data)["direction"], safetensors_metadata(data)
            if described["format"] != "sivae-direction-1" or vector.ndim != 1 or vector.dtype != torch.float32:
                raise ValueError("it is of another kind")
            fields = json.loads(described["separation"])
            separation = Separation(**fields | {"held_out": tuple(fields["held_out"])})
            return cls(
                vector, float(described["deviation"]), described["name"], described["weights_sha256"], separation
            )
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{shown(folder.url)}/{name}: is no direction that sivae can read ({type(error).__name__}: {error})"
            ) from None

    def check(self, latent_dim: int, weights_sha256: str, where: str) -> None:
        """Raises UserError when it is of other latents."""
        if len(self.vector) != latent_dim:
            raise UserError(
                f"{where}: is a direction among {len(self.vector)} latent dimensions, and this model has {latent_dim}"
            )
        if self.weights_sha256 != weights_sha256:
            raise UserError(
                f"{where}: was found with other weights than this model's, whose latents it says nothing about; find it again"
            )


def check_examples(name: str, num_positives: int, num_negatives: int) -> None:
    """Raises UserError where a direction cannot be found from so few."""
    for count, which in ((num_positives, "with"), (num_negatives, "without")):
        if count < MIN_EXAMPLES:
            raise UserError(f"{name}: there are {count} examples {which} it; give {MIN_EXAMPLES} or more of each kind")


class _Class:
    """Sums over the examples of one class, and the latents of those that are held out."""

    def __init__(self, latent_dim: int):
        self.count, self.num_fitted = 0, 0
        self.sum = torch.zeros(latent_dim, dtype=torch.float64)
        self.products = torch.zeros(latent_dim, latent_dim, dtype=torch.float64)
        self.held_out: list[Tensor] = []
        self.num_held_out = 0

    def add(self, latents: Tensor) -> None:
        turn = (torch.arange(self.count, self.count + len(latents)) + 1) % HELD_OUT_EVERY == 0
        turn &= turn.cumsum(0) <= MAX_HELD_OUT - self.num_held_out
        self.held_out.append(latents[turn])
        self.num_held_out += int(turn.sum())
        fitted = latents[~turn].double()
        self.sum += fitted.sum(dim=0)
        self.products += fitted.mT @ fitted
        self.num_fitted += len(fitted)
        self.count += len(latents)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.num_fitted

    def scatter_along(self, vector: Tensor) -> float:
        """Sum of the squared deviations along a vector."""
        return float(vector @ self.products @ vector) - self.num_fitted * float(self.mean @ vector) ** 2


class DirectionFit:
    """Finds the direction of an attribute from examples that arrive in blocks, in memory that does not grow with their number.

    The direction is the difference of the two classes' mean latents, the practice for autoencoders (Larsen et al., arXiv
    1512.09300): it carries the average image without the attribute to the average one with it. The normal of a classifier
    separates better, yet leads across the latents' own spread to places where no image lies. Every fifth example of a
    class is held out, and only judges.
    """

    def __init__(self, latent_dim: int):
        self.classes = {True: _Class(latent_dim), False: _Class(latent_dim)}

    def add(self, latents: Tensor, positive: Tensor) -> None:
        """latents: float [B, D]; positive: bool [B], whether each has the attribute."""
        for which, examples in self.classes.items():
            examples.add(latents[positive == which])

    def finish(self, name: str, weights_sha256: str) -> Direction:
        """Raises UserError when a class has too few examples, or both have the same mean."""
        positives, negatives = self.classes[True], self.classes[False]
        check_examples(name, positives.count, negatives.count)
        along = [torch.cat(examples.held_out).double() for examples in (positives, negatives)]
        if not all(values.isfinite().all() for values in (*along, positives.sum, negatives.sum)):
            raise UserError(f"{name}: some latents are not finite; is this a model whose training failed?")
        difference = positives.mean - negatives.mean
        length = float(difference.norm())
        if length == 0:
            raise UserError(f"{name}: examples with and without it have the same mean latent, so there is no direction")
        vector = difference / length
        freedom = positives.num_fitted + negatives.num_fitted - 2
        scatter = positives.scatter_along(vector) + negatives.scatter_along(vector)
        # Rounding leaves a little, also below 0, of examples that do not differ at all.
        deviation = math.sqrt(max(scatter, 0.0) / freedom)
        if deviation <= 1e-6 * length:
            raise UserError(f"{name}: the examples of each kind do not differ among themselves; give others")
        along = [latents @ vector for latents in along]
        middle = float((positives.mean + negatives.mean) @ vector) / 2
        separation = Separation(
            distance=length / deviation,
            auroc=auroc(along[1].numpy(), along[0].numpy()),
            accuracy=(float((along[0] > middle).double().mean()) + float((along[1] <= middle).double().mean())) / 2,
            num_positives=positives.num_fitted,
            num_negatives=negatives.num_fitted,
            held_out=(positives.num_held_out, negatives.num_held_out),
        )
        return Direction(vector.float(), deviation, name, weights_sha256, separation)


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """The texts beside the tensors in the bytes of a .safetensors file; `load` drops them. Raises ValueError, KeyError."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]
