"""The training loop. Runs alone, under torchrun and inside a Ray worker, through the same function `train`.

Progress is `images_seen`. What a step does is a function of the settings and that number: the batch, the draws, the learning
rates. So resuming is starting again: the newest checkpoint says where. Practice after EDM2's training loop.

What training need not wait for, writing checkpoints and pictures, rank 0 does in the background.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sivae import __version__, config, distributed, inference, pictures, randomness, run_directory, schedule
from sivae.background import Background
from sivae.checkpoint import Checkpoint
from sivae.config import Config
from sivae.data import Batch, ImageStream
from sivae.distributed import Group
from sivae.errors import Diverged, UserError, shown
from sivae.evaluator import Evaluator
from sivae.inputs import Inputs, Substitutes
from sivae.interval import GapWatch, Interval, by_section
from sivae.levels import Levels
from sivae.profiling import StepProfile, span
from sivae.saver import Saved, Saver
from sivae.signals import StopSignals
from sivae.state import TrainingState, peak_memory_bytes
from sivae.step import NonFinite, train_step
from sivae.storage import Folder
from sivae.tracking import Tracker

logger = logging.getLogger("sivae")
ADVICE = {  # by the setting that an objective must have for it
    "beta_neg": "raise objective.beta_neg", "name": "lower the learning rates", "vae_images": "begin with objective.vae_images",
}  # fmt: skip

Report = Callable[[dict[str, float], str | None], bool | None]


@dataclass(frozen=True)
class Result:
    """How a run ended: `interrupted` when a signal stopped it; `metrics` as last logged; `picture` on rank 0; `profile` is the
    table of one that was only to be profiled."""

    images_seen: int
    interrupted: bool
    metrics: dict[str, float]
    checkpoint: str | None
    picture: str | None
    profile: str | None = None


def train(
    settings: Config, report: Report = lambda metrics, name: None, profile_steps: int | None = None
) -> Result:  # fmt: skip
    """Train until `schedule.total_images`, resuming from the newest checkpoint of `run.directory`.

    `report(metrics, checkpoint)` is all that an orchestrator sees: called on every rank whenever scalars are logged, with the
    newest published checkpoint's name (None before the first), and when a checkpoint is published, with the metrics of the
    moment when it was taken. When it returns True on any rank, the run saves and stops as it does on a signal. With
    `profile_steps` only so many steps are taken, and profiled (see `sivae.profiling`), from where the run stands; neither
    checkpoints nor figures are made. Raises UserError or ConfigError with one clear sentence.
    """
    if settings.run.cpu_threads is not None:
        torch.set_num_threads(settings.run.cpu_threads)
    with distributed.join(settings.run.device) as group:
        return Trainer(settings, group, report, profile_steps).run()


class Trainer:
    def __init__(self, settings: Config, group: Group, report: Report, profile_steps: int | None = None):
        self.settings, self.group, self.report = settings, group, report
        self.folder = Folder(settings.run.directory, settings.run.storage_options)
        self.lock = None
        group.on_main(self._prepare)
        self.background = Background(group)
        self.saver = Saver(group, self.folder, self.background, settings.run.keep_checkpoints, self._published)
        found = self.saver.read_newest(self._check)
        self.levels = Levels(settings, group)
        self.inputs = Inputs(settings, group, self.levels)
        self.evaluator = Evaluator(settings, group, self.folder, self.background)
        self.state = TrainingState(settings, group, self.levels.num_passes)
        self.images_seen, self.attempt = 0, 0
        self.metrics: dict[str, float] = {}
        self.picture: str | None = None
        self.pictured: tuple[ImageStream, dict[str, Tensor]] | None = None  # the images that pictures show
        self.gap, self.substitutes = GapWatch(), Substitutes(group)
        self.stop_asked = False
        self.batches: Generator[Batch, None, None] | None = None
        self.profile = StepProfile(profile_steps, group) if profile_steps else None
        # On a CPU the host may look after every step: there it waits for nothing. An offloaded optimizer waits anyway.
        self.always_looks = group.device.type == "cpu" or settings.engine.offload_optimizer
        if found is not None:
            self._restore(found)
        else:
            self.levels.enter(0, self.state)
            if settings.run.init_from:
                self.state.start_from_model()
        if (
            self.profile is None and self.images_seen < settings.schedule.total_images
        ):  # not of a start that fails or does nothing
            group.on_main(lambda: run_directory.record(self.folder, settings, group.world_size))
        self.tracker = Tracker(
            self.folder, settings.schedule.total_images, tensorboard=settings.tracking.tensorboard,
            progress=settings.tracking.progress, settings_yaml=config.dump_yaml(settings),
        )  # fmt: skip
        group.on_main(lambda: self.tracker.open(self.images_seen))

    def run(self) -> Result:
        try:
            with StopSignals() as stop:
                try:
                    interrupted = self._loop(stop)
                finally:
                    self._stop_reading()
                self._settle()
            table = None
            if self.profile is not None:
                table = self._report_profile(interrupted)
            elif interrupted:
                self.tracker.note(f"stopped, checkpoint {self.saver.newest.name} saved; run the same command to go on")
            else:
                self.group.on_main(
                    lambda: self.tracker.hparams(config.dump(self.settings), self.metrics | self.evaluator.figures)
                )
        except BaseException:
            self.background.close()
            if self.profile is not None:
                self.profile.close()
            try:
                self.tracker.close()
            except UserError as error:  # the first error is the one to hear about
                logger.debug("%s", error)
            raise
        self.background.close()
        self.group.on_main(self.tracker.close)
        if self.lock is not None:
            self.lock.close()
        metrics, newest = self.metrics | self.evaluator.figures, self.saver.newest
        return Result(self.images_seen, interrupted, metrics, newest and newest.name, self.picture, table)

    def _loop(self, stop: StopSignals) -> bool:
        """Train to the end, or until somebody asks to stop; True when interrupted."""
        total, tracking, run = self.settings.schedule.total_images, self.settings.tracking, self.settings.run
        self._greet()
        self.folder.outage_sec = run.outage_sec
        if not self._grow():
            self._read_from_here()
        self.interval = Interval(self.images_seen)
        while self.images_seen < total:
            self._grow()
            batch = self._next(stop)
            if batch is not None:
                self._step(batch)
            last = batch is None or self.images_seen >= total
            logs, draws, saves = (
                last or self._due(n) for n in (tracking.log_images, tracking.picture_images, run.checkpoint_images)
            )
            # A model that is still growing makes images of another size.
            evaluates = (
                batch is not None
                and self.levels.grown
                and self.evaluator.due(self.images_seen, self.levels.batch_size, last)
            )
            if self.profile is not None:
                saves = evaluates = False  # the run stays where it stands
            if (logs or draws or saves or evaluates or self.always_looks) and (bad := self.state.gate.read()):
                self._handle(bad)
                self._read_from_here()
                continue
            if logs and self.interval.steps:
                self._log()
            if draws and batch is not None:
                self._draw()
            if evaluates:
                saves |= self._evaluate()
            told = saves and self._save(waits=last)
            if logs and not told:
                self._report(self.metrics | self.evaluator.figures, self.saver.newest)
            if batch is None:
                return True
            if self.profile is not None and self.profile.step():
                return False
        return False

    def _report_profile(self, interrupted: bool) -> str | None:
        if interrupted:
            self.profile.close()
            self.tracker.note("stopped before the profile was complete; nothing was saved")
            return None
        return self.profile.report(self.folder, self.images_seen, self.levels.batch_size)

    def _greet(self) -> None:
        total, run, newest = self.settings.schedule.total_images, self.settings.run, self.saver.newest
        left = total - self.images_seen
        if self.profile is not None and left < self.profile.total_steps * self.levels.batch_size:
            raise UserError(
                f"--profile: takes {self.profile.total_steps} steps of {self.levels.batch_size} images, and {left:,} images"
                " are left of the run; lower --profile-steps or raise schedule.total_images",
                shared=True,
            )
        if self.images_seen >= total:
            self.tracker.note(
                f"nothing left to do at {self.images_seen:,} images; raise schedule.total_images to go on"
            )
        elif newest is not None:
            self.tracker.note(f"resuming at {self.images_seen:,} images from checkpoint {newest.name}")
        elif run.on_nonfinite == "rollback" and self.profile is None:
            self._save()  # something to return to
            self.saver.settle()
        if self.images_seen < total:
            index, blend = self.levels.at_the_end(self.images_seen)
            judged = "; nor is it judged, for only a grown model is" if self.settings.evaluate.every_images else ""
            if self.levels.levels[index] is not self.levels.levels[-1]:
                pixels = self.levels.levels[index].resolution
                self.tracker.note(
                    f"the run ends at {pixels} pixels, before its schedule reaches the last level{judged}"
                )
            elif blend < 1:
                self.tracker.note(f"the run ends while its last level still fades in{judged}")
            if (vae_images := getattr(self.settings.objective, "vae_images", 0)) >= total:
                self.tracker.note(f"the run ends as a plain VAE, for objective.vae_images is {vae_images:,}")

    # A step

    def _read_from_here(self) -> None:
        """Batches from the images seen on; what read those before ends."""
        self._stop_reading()
        self.batches = self.levels.stream.batches(self.images_seen)

    def _stop_reading(self) -> None:
        """Not left to when the last reference goes: anything that keeps a frame keeps the processes that read, and they the end of
        this one."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def _grow(self) -> bool:
        """The schedule's level and blend for the next step; whether a new level, and reading for it, has begun."""
        if not self.levels.follow(self.images_seen, self.state):
            return False
        self._settle()  # a process that reads is forked from this one, which should have no other thread at work
        self.tracker.note(
            f"{self.levels.resolution} pixels from {self.images_seen:,} images on, {self.levels.batch_size} a step"
        )
        self._read_from_here()
        return True

    def _next(self, stop: StopSignals) -> Batch | None:
        """The next batch; None when any rank is asked to stop. What failed on one rank, reading its data or, on rank 0, writing in
        the background, is an error on all, before the step."""
        start = time.monotonic()
        batch, failure, stopping = None, None, stop.requested or self.stop_asked
        if not stopping:
            try:
                with span("data"):
                    batch = next(self.batches)
            except UserError as error:
                failure = error
        with span("waiting for ranks"):
            stopping, news = self.group.any(stopping or stop.requested, self.saver.has_news, failure=failure)
        self.interval.data_wait_sec += time.monotonic() - start
        if news:
            self._tell(self.saver.hear())
        if stopping:
            return None
        self.substitutes.note(batch.substituted)
        return batch

    def _step(self, batch: Batch) -> None:
        settings, state, start, batch_size = self.settings, self.state, self.images_seen, self.levels.batch_size
        factor = self.levels.level.lr_factor
        end, total, ema = start + batch_size, settings.schedule.total_images, settings.ema
        self.rates = {
            name: optimizer.lr * factor * schedule.lr_factor(end, total, **optimizer.schedule.model_dump())
            for name, optimizer in (
                ("lr_encoder", settings.encoder_optimizer),
                ("lr_decoder", settings.decoder_optimizer),
            )
        }
        warm_up = start < getattr(settings.objective, "vae_images", 0)
        if settings.model.family == "style":
            randomness.seed_noise(settings.run.seed, start, self.group.rank, self.attempt)
        passes = self.inputs.passes(batch, start, self.attempt)
        terms = train_step(
            state.encoder, state.decoder, state.target, state.vae if warm_up else state.objective, passes, state.gate,
            start, **self.rates, ema_decay=schedule.ema_decay(end, batch_size, ema.halflife_images, ema.rampup_ratio),
            stage=self.levels.stage, graphs=state.graphs(len(passes)),
        )  # fmt: skip
        self.interval.add(terms)
        self.images_seen = end
        self.tracker.advance(batch_size)
        if state.target is not None:
            # Also where the warm-up ends: until then nothing used the target, which may be as old as the run.
            warmed_up = warm_up and end >= settings.objective.vae_images
            if warmed_up or self._due(settings.objective.target_refresh_images):
                state.refresh_target()

    def _due(self, every_images: int) -> bool:
        return schedule.due(self.images_seen, self.levels.batch_size, every_images)

    def _handle(self, bad: NonFinite) -> None:
        """A non-finite loss: stop, or go back to the last checkpoint and draw anew."""
        self._settle()
        run, newest = self.settings.run, self.saver.newest
        where = f"{' and '.join(bad.terms)} became non-finite at {bad.images_seen:,} images"
        kept = f"checkpoint {newest.name} is kept" if newest else "there is no checkpoint yet"
        advice = ", or ".join(text for key, text in ADVICE.items() if hasattr(self.settings.objective, key))
        if run.on_nonfinite == "stop" or self.profile is not None:
            raise Diverged(f"{where}; stopped before the step, {kept}; what usually helps: {advice}", shared=True)
        if self.attempt >= run.max_rollbacks:
            raise Diverged(
                f"{where}; gave up after {self.attempt} rollbacks (run.max_rollbacks), {kept}; what usually helps: {advice}",
                shared=True,
            )
        attempt, ahead = self.attempt + 1, self.images_seen
        found = self.saver.read_newest(self._check)
        self._restore(found)
        self.attempt = attempt
        self.tracker.advance(self.images_seen - ahead)
        self.group.on_main(lambda: self.tracker.open(self.images_seen))
        self.interval = Interval(self.images_seen)
        self.tracker.note(
            f"{where}; back to checkpoint {found.name} with other draws, rollback {attempt} of {run.max_rollbacks}"
        )

    # What is told

    @span("logging")
    def _log(self) -> None:
        """Means since the last time, over steps and ranks."""
        terms = self.interval.means(self.group)
        warning = self.gap.note(terms["kl_gap"]) if "kl_gap" in terms else None
        if warning:
            self.tracker.note(warning)
        self.metrics = by_section(terms) | {f"optimizer/{name}": value for name, value in self.rates.items()}
        self.metrics |= self.interval.speed(self.images_seen)
        self.metrics["memory/peak_bytes"] = peak_memory_bytes(self.group.device)
        if self.settings.schedule.levels:
            self.metrics |= {
                "schedule/resolution": self.levels.resolution,
                "schedule/blend": self.levels.blend,
                "schedule/batch_size": self.levels.batch_size,
            }
        if self._count_substituted():
            self.metrics["data/substituted"] = self.substitutes.count
        self.group.on_main(lambda: self.tracker.scalars(self.metrics, self.images_seen))
        self.interval = Interval(self.images_seen)

    def _count_substituted(self) -> bool:
        """Over the ranks, where samples are substituted at all."""
        substitutes = self.settings.data.on_corrupt == "substitute"
        if substitutes:
            self.substitutes.gather()
        return substitutes

    @span("pictures")
    def _draw(self) -> None:
        """Real images, reconstructions and samples from the averaged weights; the same images and latents each time."""
        model = inference.Model(self.settings.model.model_dump(), self.group.device, {"stage": self.levels.stage})
        inference.fill(model, self.state.average(), "the running average")
        pictures.share(model, self.group)
        fixed, images_seen = self._pictured(), self.images_seen
        made = pictures.make(model, self.inputs.images(fixed["images"]), fixed.get("labels"), self.settings.run.seed)

        def draw() -> str:
            self.background.submit(lambda: made.write(self.tracker, images_seen))
            return self.tracker.picture_path("samples", images_seen)

        self.picture = self.group.on_main(draw)

    def _pictured(self) -> dict[str, Tensor]:
        """The images and labels that pictures show: rank 0 reads them once for each level."""
        stream = self.levels.stream

        def read() -> dict[str, Tensor]:
            batch = stream.sample(range(min(self.settings.tracking.picture_count, len(stream))))
            found = {"images": batch.images, "labels": batch.labels}
            return {name: value.contiguous() for name, value in found.items() if value is not None}

        if self.pictured is None or self.pictured[0] is not stream:
            self.pictured = stream, self.group.broadcast_from_main(read)
        return self.pictured[1]

    def _evaluate(self) -> bool:
        """Judge the averaged weights; True when they are the best so far, and to be saved."""
        start = time.monotonic()
        sentence = self.evaluator.run(self.state.average(), self.images_seen)
        if sentence:
            self.tracker.note(sentence)
        else:
            self.group.on_main(lambda: self.tracker.scalars(self.evaluator.figures, self.images_seen))
        self._settle()  # which checkpoint is the best so far is known only then
        self.interval.paused_sec += time.monotonic() - start
        return self.evaluator.is_best(self.images_seen)

    def _report(self, metrics: dict[str, float], saved: Saved | None) -> None:
        self.stop_asked |= bool(self.report(metrics, saved and saved.name))

    def _tell(self, saved: Saved | None) -> bool:
        """Report a checkpoint that was published, if any; whether there was one."""
        if saved is not None:
            self._report(saved.metrics, saved)
        return saved is not None

    # Checkpoints

    def _prepare(self) -> None:
        self.lock = run_directory.lock(self.folder)
        run_directory.check_place(self.folder)

    @span("checkpoint")
    def _save(self, waits: bool = False) -> bool:
        """Begin a save, after the one before it; `waits` also for this one's end. True when that was told of."""
        if not self.saver.has(self.images_seen):
            self._settle()
            self._count_substituted()
            metrics = self.metrics | self.evaluator.figures
            self.saver.save(self._position(), self.state.tensors(), metrics)
        return waits and self._settle()

    def _settle(self) -> bool:
        """Wait for what is under way in the background; True when a checkpoint was published and told of."""
        return self._tell(self.saver.settle())

    def _published(self, name: str, state: dict[str, Any]) -> None:
        """On rank 0, in the background."""
        self.evaluator.point(name, state["evaluation"])
        self.tracker.sync()

    def _position(self) -> dict[str, Any]:
        """The state of the run beside its tensors."""
        settings = self.settings
        return {
            "images_seen": self.images_seen, "attempt": self.attempt, "negative_gaps": self.gap.num_negative, "substituted": self.substitutes.count,
            "model": settings.model.model_dump(mode="json"), "objective": settings.objective.model_dump(mode="json"), "seed": settings.run.seed,
            "data": {
                "url": shown(settings.data.url), "digest": self.levels.streams[-1].digest, "random_crop": settings.data.random_crop,
            },
            "version": __version__,
            "resolution": self.levels.resolution, "stage": self.levels.stage, "averaged": settings.ema.halflife_images > 0,
            "evaluation": self.evaluator.at(self.images_seen),
        }  # fmt: skip

    def _check(self, state: dict[str, Any]) -> None:
        run_directory.check_model(state.get("model"), self.settings, self.folder.url)

    def _restore(self, found: Checkpoint) -> None:
        if found.state["data"]["digest"] != self.levels.streams[-1].digest and self.group.is_main:
            print(
                f"sivae: {shown(self.settings.data.url)} is not the set that checkpoint {found.name} was trained on",
                file=sys.stderr,
            )
        if found.state["seed"] != self.settings.run.seed and self.group.is_main:
            print(
                f"sivae: run.seed was {found.state['seed']} up to checkpoint {found.name}; with another the images come in another"
                " order from here on, so some of this epoch twice and others not",
                file=sys.stderr,
            )
        resolution = found.state.get("resolution", self.settings.model.resolution)
        index = self.levels.of(resolution)
        if index is None:
            raise UserError(
                f"{self.folder.url}: checkpoint {found.name} was trained at {resolution} pixels, which is none of"
                " schedule.levels; set another run.directory, or the levels as they were",
                shared=True,
            )
        self.levels.enter(index, self.state)
        self.state.restore(found.tensors)
        self.images_seen, self.attempt = found.images_seen, found.state["attempt"]
        self.gap.num_negative = found.state["negative_gaps"]
        self.substitutes.restore(found.state.get("substituted", 0))
        self.group.on_main(lambda: self.evaluator.point(found.name, found.state.get("evaluation")))
