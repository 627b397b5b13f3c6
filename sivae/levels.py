"""Progressive growing: which level of detail a run trains, how far it has faded in, and the images at its resolution."""

from __future__ import annotations

from typing import Any

from sivae import models, schedule
from sivae.config import Config
from sivae.config.run import LevelSettings
from sivae.data import ImageStream, open_stream
from sivae.distributed import Group
from sivae.errors import UserError, shown
from sivae.state import TrainingState


class Levels:
    """At the first level, until `enter` or `follow` say otherwise. A run without `schedule.levels` has one."""

    def __init__(self, settings: Config, group: Group):
        self.settings, self.levels, self._passes = settings, settings.levels(), settings.passes(group.world_size)
        self.index, self.blend = 0, 1.0
        # One for each level, so that a level that cannot be read is known at the start.
        self.streams = group.together(lambda: [self._open_stream(level, group) for level in self.levels])

    @property
    def level(self) -> LevelSettings:
        return self.levels[self.index]

    @property
    def stream(self) -> ImageStream:
        return self.streams[self.index]

    @property
    def batch_size(self) -> int:
        return self.level.batch_size

    @property
    def resolution(self) -> int:
        """Of the images that the networks see."""
        return self.level.resolution

    @property
    def num_passes(self) -> int:
        """Accumulation passes of a step."""
        return self._passes[self.index]

    @property
    def grown(self) -> bool:
        """Whether the last level has faded in."""
        return self.index == len(self.levels) - 1 and self.blend == 1

    @property
    def stage(self) -> dict[str, Any]:
        """What the networks are called with beside their inputs."""
        if not self.settings.schedule.levels:
            return {}
        return {"level": models.style.level_of(self.resolution), "blend": self.blend}

    def of(self, resolution: int) -> int | None:
        """The number of the level at this resolution."""
        return next((index for index, level in enumerate(self.levels) if level.resolution == resolution), None)

    def at(self, images_seen: int) -> tuple[int, float]:
        """Number and blend of the level that the step after so many images trains."""
        return schedule.level_at(images_seen, [(level.images, level.fade_images) for level in self.levels])

    def at_the_end(self, images_seen: int) -> tuple[int, float]:
        """Number and blend of the level that the last step of the run trains, which stands at `images_seen`."""
        total, end = self.settings.schedule.total_images, 0
        for level in self.levels:
            end = total if level is self.levels[-1] else min(end + level.images, total)
            steps = max(0, -(-(end - images_seen) // level.batch_size))
            images_seen += steps * level.batch_size
            if images_seen >= total:
                return self.at(images_seen - level.batch_size)
        raise AssertionError("a run has a last step")

    def enter(self, index: int, state: TrainingState) -> None:
        """Train this level from now on."""
        self.index = index
        state.encoder.set_accumulation(self.num_passes)
        state.decoder.set_accumulation(self.num_passes)
        state.set_objectives(self.level.beta_neg_factor)

    def follow(self, images_seen: int, state: TrainingState) -> bool:
        """Do as the schedule says for the next step. At a new level, where it returns True, the optimizers start anew."""
        index, self.blend = self.at(images_seen)
        if index == self.index:
            if self.blend == 1 and images_seen >= self.batch_size and self.at(images_seen - self.batch_size)[1] < 1:
                for engine in (state.encoder, state.decoder):
                    engine.reset_moments(engine.network.idle(**self.stage))
            return False
        self.enter(index, state)
        state.encoder.reset_optimizer()
        state.decoder.reset_optimizer()
        return True

    def _open_stream(self, level: LevelSettings, group: Group) -> ImageStream:
        data, model = self.settings.data, self.settings.model
        stream = open_stream(
            **data.model_dump(), resolution=level.resolution, shrunk_from=model.resolution, num_channels=model.num_channels,
            batch_size=level.batch_size, rank=group.rank, world_size=group.world_size, seed=self.settings.run.seed,
            outage_sec=self.settings.run.outage_sec, pin_memory=group.device.type == "cuda", progress=group.is_main,
        )  # fmt: skip
        if model.num_classes and (stream.num_classes or 0) != model.num_classes:
            raise UserError(
                f"model.num_classes: is {model.num_classes}, but {shown(data.url)} has {stream.num_classes or 'no'} classes"
            )
        return stream
