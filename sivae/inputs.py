"""What a training step is given: this rank's images on the device, in passes, each with the draws of its image numbers."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from sivae import images, models, randomness
from sivae.config import Config
from sivae.data import Batch
from sivae.distributed import Group
from sivae.levels import Levels
from sivae.objectives import Draws
from sivae.profiling import span
from sivae.step import Pass

MAX_NOTES = 20  # lines about damaged samples from one process; the count goes on


class Inputs:
    """Images and draws at the level that `levels` is at."""

    def __init__(self, settings: Config, group: Group, levels: Levels):
        self.settings, self.group, self.levels = settings, group, levels

    @span("batch to device")
    def passes(self, batch: Batch, images_seen: int, attempt: int) -> list[Pass]:
        """This rank's images in accumulation passes. images_seen: before the step; attempt: rollbacks, each draws anew."""
        group, model, num_passes = self.group, self.settings.model, self.levels.num_passes
        numbers = range(images_seen + group.rank, images_seen + self.levels.batch_size, group.world_size)
        x = self.images(batch.images)
        labels = batch.labels.to(group.device, non_blocking=True) if model.num_classes else None
        ends = [len(numbers) * index // num_passes for index in range(num_passes + 1)]
        mean_size = self.levels.batch_size / group.world_size / num_passes
        return [
            Pass(
                x[first:end], labels if labels is None else labels[first:end], self._draws(numbers[first:end], attempt),
                weight=(end - first) / mean_size,
            )
            for first, end in zip(ends, ends[1:])
        ]  # fmt: skip

    def images(self, pixels: Tensor) -> Tensor:
        """uint8 images as the networks take them at this level: on the device, float in the family's range."""
        low, high = models.VALUE_RANGES[self.settings.model.family]
        x = images.to_float(pixels.to(self.group.device, non_blocking=True), low, high)
        return images.at_level(x, self.levels.resolution, self.levels.blend)

    def _draws(self, numbers: range, attempt: int) -> Draws:
        model, objective, device = self.settings.model, self.settings.objective, self.group.device
        key = (self.settings.run.seed, numbers, model.latent_dim, device, attempt)
        if model.family == "style":
            mixing = getattr(objective, "style_mixing", 0.0)
            num_layers = models.style.num_layers(self.levels.resolution)
            draws = randomness.style_draws(*key, mixing=mixing, num_layers=num_layers)
        else:
            draws = randomness.step_draws(*key)
        uniform = randomness.augment_draws(key[0], numbers, device, attempt) if objective.augment else None
        return replace(draws, augment=uniform)


class Substitutes:
    """Damaged samples in whose place others stood: told of as they come, and counted over all ranks since the run began."""

    def __init__(self, group: Group):
        self.group, self.count, self._new, self._notes_left = group, 0, 0, MAX_NOTES

    def note(self, messages: tuple[str, ...]) -> None:
        self._new += len(messages)
        for message in messages[: self._notes_left]:
            tqdm.write(f"sivae: another sample stands in: {message}", file=sys.stderr)
        self._notes_left -= len(messages[: self._notes_left])

    def gather(self) -> None:
        """Bring `count` up to date. A collective."""
        new = self.group.mean(torch.tensor(float(self._new), device=self.group.device))
        self.count += round(new.item() * self.group.world_size)
        self._new = 0

    def restore(self, count: int) -> None:
        self.count, self._new = count, 0
