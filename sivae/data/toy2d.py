"""Densities in the plane to try generative models on: samplers, and the exact densities that they draw from.

Source: the 2D experiments of Soft-IntroVAE (arXiv 2012.13253 and its published code), which took the Gaussians from the GAN
literature and the others from block neural autoregressive flows (arXiv 1904.04676). Differs on purpose: every point is drawn
by itself. Published, points of a batch of rings share a grid of angles, those of two spirals come in pairs that mirror each
other, and batches of the 25 Gaussians are slices of 100,000 stored points; one point alone is distributed the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Density:
    """`sample(count, generator)` -> float32 [count, 2]; `density(points [N, 2])` -> float64 [N], which integrates to 1.

    limit: published figures are made on the square [-limit, limit]^2. centers: of the modes [M, 2], each a Gaussian of
    standard deviation `std`; None where there are no modes to count.
    """

    sample: Callable[[int, Generator], Tensor]
    density: Callable[[Tensor], Tensor]
    limit: float
    centers: Tensor | None = None
    std: float | None = None


def _gaussians(centers: Tensor, std: float, limit: float) -> Density:
    def sample(count: int, generator: Generator) -> Tensor:
        picked = torch.randint(len(centers), (count,), generator=generator)
        return centers[picked] + std * torch.randn(count, 2, generator=generator)

    def density(points: Tensor) -> Tensor:
        distances = (points.double()[:, None] - centers.double()).square().sum(2)
        return (-distances / (2 * std**2)).exp().mean(1) / (2 * math.pi * std**2)

    return Density(sample, density, limit, centers, std)


def _eight_gaussians() -> Density:
    angles = torch.arange(8) * (math.pi / 4)
    # A circle of radius 2 and standard deviations of 0.02, all divided by 1.414 as published
    return _gaussians(torch.stack([angles.cos(), angles.sin()], 1) * (2 / 1.414), 0.02 / 1.414, limit=2.0)


def _twenty_five_gaussians() -> Density:
    side = torch.arange(-2.0, 3.0) * 2
    centers = torch.cartesian_prod(side, side)
    # A grid of spacing 2 and standard deviations of 0.05, divided by 2.828 and then doubled, as published
    return _gaussians(centers * (2 / 2.828), 0.05 * 2 / 2.828, limit=8.0)


_SPIRAL_TURN = 3 * math.pi  # where the spirals end: 540 degrees
_SPIRAL_NOISE, _SPIRAL_BOX = 0.1, 0.5 / 3  # Gaussian noise; uniform noise in each coordinate, from 0 to so much


def _two_spirals() -> Density:
    def sample(count: int, generator: Generator) -> Tensor:
        uniform = torch.rand(count, 3, generator=generator)
        turn = uniform[:, 0].sqrt() * _SPIRAL_TURN
        arm = torch.stack([-turn.cos() * turn, turn.sin() * turn], 1) / 3 + uniform[:, 1:] * _SPIRAL_BOX
        sign = torch.randint(2, (count, 1), generator=generator) * 2 - 1
        return sign * arm + _SPIRAL_NOISE * torch.randn(count, 2, generator=generator)

    def density(points: Tensor) -> Tensor:
        # Over the turn by the midpoint rule, whose steps are a third of the noise's width; the noises in closed form.
        turn = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000 * _SPIRAL_TURN
        weight = turn / turn.sum()
        arm = torch.stack([-turn.cos() * turn, turn.sin() * turn], 1) / 3

        def noisy(values: Tensor, at: Tensor) -> Tensor:
            """Density of one coordinate, values [K] around each of `at` [T]."""
            below = values[:, None] - at
            box = torch.special.ndtr(below / _SPIRAL_NOISE) - torch.special.ndtr((below - _SPIRAL_BOX) / _SPIRAL_NOISE)
            return box / _SPIRAL_BOX

        total = torch.zeros(len(points), dtype=torch.float64)
        # Each coordinate by itself, and every value of it once: a grid has few.
        (x, column), (y, row) = (points.double()[:, axis].unique(return_inverse=True) for axis in (0, 1))
        for sign in (1, -1):
            first, second = noisy(sign * x, arm[:, 0]) * weight, noisy(sign * y, arm[:, 1])
            for part in torch.arange(len(points)).split(4096):
                total[part] += 0.5 * (first[column[part]] * second[row[part]]).sum(1)
        return total

    return Density(sample, density, limit=4.0)


def _checkerboard() -> Density:
    def sample(count: int, generator: Generator) -> Tensor:
        uniform = torch.rand(count, 2, generator=generator)
        x = uniform[:, 0] * 4 - 2
        lower = torch.randint(2, (count,), generator=generator) * 2
        return 2 * torch.stack([x, uniform[:, 1] - lower + x.floor() % 2], 1)

    def density(points: Tensor) -> Tensor:
        cell = (points.double() / 2).floor()
        inside = (points.abs() < 4).all(1)
        return torch.where(inside & (cell.sum(1) % 2 == 0), 1 / 32, 0.0).double()

    return Density(sample, density, limit=4.0)


_RADII, _RING_NOISE = (0.75, 1.5, 2.25, 3.0), 0.08


def _rings() -> Density:
    radii = torch.tensor(_RADII)

    def sample(count: int, generator: Generator) -> Tensor:
        radius = radii[torch.randint(4, (count,), generator=generator)]
        angle = torch.rand(count, generator=generator) * (2 * math.pi)
        ring = torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None]
        return ring + _RING_NOISE * torch.randn(count, 2, generator=generator)

    def density(points: Tensor) -> Tensor:
        # A Gaussian around a circle, averaged over the angle: a Bessel function, in its scaled form.
        r, R, variance = points.double().norm(dim=1)[:, None], radii.double(), _RING_NOISE**2
        scaled = torch.special.i0e(r * R / variance) * (-((r - R) ** 2) / (2 * variance)).exp()
        return scaled.mean(1) / (2 * math.pi * variance)

    return Density(sample, density, limit=4.0)


DENSITIES: dict[str, Density] = {
    "8gaussians": _eight_gaussians(),
    "2spirals": _two_spirals(),
    "checkerboard": _checkerboard(),
    "rings": _rings(),
    "25gaussians": _twenty_five_gaussians(),
}
