"""The training loop. Runs alone, under torchrun and inside a Ray worker, through the same function `train`.

Progress is `images_seen`. What a step does is a function of the settings and that number: the batch, the draws, the learning
rates. So resuming is starting again: the newest checkpoint says where. Practice after EDM2's training loop.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sivae import (
    __version__,
    checkpoint,
    config,
    distributed,
    figures,
    images,
    inference,
    models,
    randomness,
    run_directory,
    schedule,
)
from sivae.config import Config
from sivae.data import Batch, ImageStream, open_stream
from sivae.distributed import Group
from sivae.errors import UserError, shown
from sivae.evaluator import Evaluator
from sivae.objectives import Draws
from sivae.profiling import StepProfile, span
from sivae.signals import StopSignals
from sivae.state import TrainingState, peak_memory_bytes
from sivae.step import NonFinite, Pass, train_step
from sivae.storage import Folder
from sivae.tracking import Tracker

logger = logging.getLogger("sivae")
MAX_NOTES = 20  # lines about damaged samples from one process; the count goes on
KL_GAP_PATIENCE = 10  # log lines in a row with a negative KL gap before the warning
ADVICE = "what usually helps: raise objective.beta_neg, lower the learning rates, or begin with objective.vae_images"

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

    `report(metrics, checkpoint)` is all that an orchestrator sees: called on every rank whenever scalars are logged or a
    checkpoint is saved, with the last metrics and the newest checkpoint's name (None before the first). When it returns True
    on any rank, the run saves and stops as it does on a signal. With `profile_steps` only so many steps are taken, and profiled
    (see `sivae.profiling`), from where the run stands; neither checkpoints nor figures are made. Raises UserError or ConfigError
    with one clear sentence.
    """
    if settings.run.cpu_threads is not None:
        torch.set_num_threads(settings.run.cpu_threads)
    with distributed.join(settings.run.device) as group:
        return Trainer(settings, group, report, profile_steps).run()


class Trainer:
    def __init__(self, settings: Config, group: Group, report: Report, profile_steps: int | None = None):
        self.settings, self.group, self.report = settings, group, report
        self.levels, self.passes = settings.levels(), settings.passes(group.world_size)
        self.level, self.blend = 0, 1.0  # which of the levels, and how far it has faded in
        self.folder = Folder(settings.run.directory, settings.run.storage_options)
        self.lock = None
        group.on_main(self._prepare)
        found = self._read_checkpoint()
        self.streams = self._open_streams()
        self.evaluator = Evaluator(settings, group, self.folder)
        self.state = TrainingState(settings, group, self.passes[0])
        self.images_seen, self.attempt = 0, 0
        self.saved: checkpoint.Checkpoint | None = None
        self.metrics: dict[str, float] = {}
        self.picture: str | None = None
        self.negative_gaps = 0
        self.substituted, self.new_substituted, self.notes_left = 0, 0, MAX_NOTES
        self.stop_asked = False
        self.profile = StepProfile(profile_steps, group) if profile_steps else None
        if found is not None:
            self._restore(found)
        else:
            self._enter(0)
            if settings.run.init_from:
                self.state.start_from(settings.run.init_from, settings)
        self.tracker = Tracker(
            self.folder, settings.schedule.total_images, tensorboard=settings.tracking.tensorboard,
            progress=settings.tracking.progress, settings_yaml=config.dump_yaml(settings),
        )  # fmt: skip
        group.on_main(lambda: self.tracker.open(self.images_seen))

    def run(self) -> Result:
        try:
            with StopSignals() as stop:
                interrupted = self._loop(stop)
            if self.profile is not None:
                table = self._report_profile(interrupted)
            elif interrupted:
                self.tracker.note(f"stopped, checkpoint {self.saved.name} saved; run the same command to go on")
            else:
                self.group.on_main(
                    lambda: self.tracker.hparams(config.dump(self.settings), self.metrics | self.evaluator.figures)
                )
        except BaseException:
            if self.profile is not None:
                self.profile.close()
            try:
                self.tracker.close()
            except UserError as error:  # the first error is the one to hear about
                logger.debug("%s", error)
            raise
        self.group.on_main(self.tracker.close)
        if self.lock is not None:
            self.lock.close()
        metrics = self.metrics | self.evaluator.figures
        return Result(
            self.images_seen, interrupted, metrics, self.saved and self.saved.name, self.picture, self.profile and table
        )  # fmt: skip

    def _loop(self, stop: StopSignals) -> bool:
        """Train to the end, or until somebody asks to stop; True when interrupted."""
        total, tracking, run = self.settings.schedule.total_images, self.settings.tracking, self.settings.run
        if self.profile is not None and (total - self.images_seen) < self.profile.total_steps * self.batch_size:
            raise UserError(
                f"--profile: takes {self.profile.total_steps} steps of {self.batch_size} images, and {total - self.images_seen:,}"
                " images are left of the run; lower --profile-steps or raise schedule.total_images",
                shared=True,
            )
        if self.images_seen >= total:
            self.tracker.note(
                f"nothing left to do at {self.images_seen:,} images; raise schedule.total_images to go on"
            )
        elif self.saved is not None:
            self.tracker.note(f"resuming at {self.images_seen:,} images from checkpoint {self.saved.name}")
        elif run.on_nonfinite == "rollback" and self.profile is None:
            self._save()  # something to return to
        if (last := self.levels[self._level_at(total)[0]]) is not self.levels[-1]:
            self.tracker.note(f"the run ends at {last.resolution} pixels, before its schedule reaches the last level")
        # On a CPU the host may look after every step: there it waits for nothing. An offloaded optimizer waits anyway.
        always_looks = self.group.device.type == "cpu" or self.settings.engine.offload_optimizer
        batches = self._grow() or self.stream.batches(self.images_seen)
        self._start_interval()
        while self.images_seen < total:
            batches = self._grow() or batches
            batch = self._next(batches, stop)
            if batch is not None:
                self._step(batch)
            last = batch is None or self.images_seen >= total
            logs, draws, saves = (
                last or self._due(n) for n in (tracking.log_images, tracking.picture_images, run.checkpoint_images)
            )
            # A model that is still growing makes images of another size.
            evaluates = batch is not None and self.grown and self.evaluator.due(self.images_seen, self.batch_size, last)
            if self.profile is not None:
                saves = evaluates = False  # the run stays where it stands
            if (logs or draws or saves or evaluates or always_looks) and (bad := self.state.gate.read()):
                self._handle(bad)
                batches = self.stream.batches(self.images_seen)
                continue
            if logs and self.steps:
                self._log()
            if draws and batch is not None:
                self._draw()
            if evaluates:
                saves |= self._evaluate()
            if saves:
                self._save()
            if logs or saves:
                metrics = self.metrics | self.evaluator.figures
                self.stop_asked |= bool(self.report(metrics, self.saved and self.saved.name))
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
        return self.profile.report(self.folder, self.images_seen, self.batch_size)

    # Levels of detail

    @property
    def stream(self) -> ImageStream:
        return self.streams[self.level]

    @property
    def batch_size(self) -> int:
        return self.levels[self.level].batch_size

    @property
    def grown(self) -> bool:
        """Whether the last level has faded in."""
        return self.level == len(self.levels) - 1 and self.blend == 1

    @property
    def resolution(self) -> int:
        """Of the images that the networks see."""
        return self.levels[self.level].resolution

    def _grow(self) -> Iterator[Batch] | None:
        """The schedule's level and blend for the next step. At a new level the optimizers start anew; returns its batches."""
        level, self.blend = self._level_at(self.images_seen)
        if level == self.level:
            return None
        self._enter(level)
        self.state.encoder.reset_optimizer()
        self.state.decoder.reset_optimizer()
        self.tracker.note(f"{self.resolution} pixels from {self.images_seen:,} images on, {self.batch_size} a step")
        return self.stream.batches(self.images_seen)

    def _level_at(self, images_seen: int) -> tuple[int, float]:
        return schedule.level_at(images_seen, [(level.images, level.fade_images) for level in self.levels])

    def _enter(self, level: int) -> None:
        self.level = level
        self.state.encoder.set_accumulation(self.passes[level])
        self.state.decoder.set_accumulation(self.passes[level])
        self.state.set_objectives(self.levels[level].beta_neg_factor)

    def _stage(self) -> dict[str, Any]:
        """What the networks are called with beside their inputs."""
        if not self.settings.schedule.levels:
            return {}
        return {"level": models.style.level_of(self.resolution), "blend": self.blend}

    # A step

    def _next(self, batches: Iterator[Batch], stop: StopSignals) -> Batch | None:
        """The next batch; None when any rank is asked to stop. Data that one rank cannot read is an error on all, before the step."""
        start = time.monotonic()
        batch, failure, stopping = None, None, stop.requested or self.stop_asked
        if not stopping:
            try:
                with span("data"):
                    batch = next(batches)
            except UserError as error:
                failure = error
        with span("waiting for ranks"):
            stopping = self.group.agree(stopping or stop.requested, failure)
        self.data_wait_sec += time.monotonic() - start
        if stopping:
            return None
        self._note_substituted(batch.substituted)
        return batch

    def _note_substituted(self, messages: tuple[str, ...]) -> None:
        self.new_substituted += len(messages)
        for message in messages[: self.notes_left]:
            tqdm.write(f"sivae: another sample stands in: {message}", file=sys.stderr)
        self.notes_left -= len(messages[: self.notes_left])

    def _count_substituted(self) -> None:
        """Of all ranks, since the run began."""
        if self.settings.data.on_corrupt == "substitute":
            new = self.group.mean(torch.tensor(float(self.new_substituted), device=self.group.device))
            self.substituted += round(new.item() * self.group.world_size)
            self.new_substituted = 0

    def _step(self, batch: Batch) -> None:
        settings, state, start = self.settings, self.state, self.images_seen
        factor = self.levels[self.level].lr_factor
        end, total, ema = start + self.batch_size, settings.schedule.total_images, settings.ema
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
        terms = train_step(
            state.encoder, state.decoder, state.target, state.vae if warm_up else state.objective, self._passes(batch), state.gate,
            start, **self.rates, ema_decay=schedule.ema_decay(end, self.batch_size, ema.halflife_images, ema.rampup_ratio),
            stage=self._stage(), graphs=state.graphs(self.passes[self.level]),
        )  # fmt: skip
        for name, term in terms.items():
            total_so_far, steps = self.sums.get(name, (0.0, 0))
            self.sums[name] = total_so_far + term, steps + 1
        self.steps += 1
        self.images_seen = end
        self.tracker.advance(self.batch_size)
        if state.target is not None:
            # Also where the warm-up ends: until then nothing used the target, which may be as old as the run.
            warmed_up = warm_up and end >= settings.objective.vae_images
            if warmed_up or self._due(settings.objective.target_refresh_images):
                state.refresh_target()

    @span("batch to device")
    def _passes(self, batch: Batch) -> list[Pass]:
        """This rank's images in accumulation passes, each with the draws of its image numbers."""
        device, model, num_passes = self.group.device, self.settings.model, self.passes[self.level]
        numbers = range(self.images_seen + self.group.rank, self.images_seen + self.batch_size, self.group.world_size)
        x = self._as_input(batch.images)
        labels = batch.labels.to(device, non_blocking=True) if model.num_classes else None
        ends = [len(numbers) * index // num_passes for index in range(num_passes + 1)]
        mean_size = self.batch_size / self.group.world_size / num_passes
        return [
            Pass(
                x[first:end], labels if labels is None else labels[first:end], self._draws(numbers[first:end]),
                weight=(end - first) / mean_size,
            )
            for first, end in zip(ends, ends[1:])
        ]  # fmt: skip

    def _as_input(self, pixels: Tensor) -> Tensor:
        """uint8 images as the networks take them at this level: on the device, float in the family's range."""
        low, high = models.VALUE_RANGES[self.settings.model.family]
        x = images.to_float(pixels.to(self.group.device, non_blocking=True), low, high)
        return images.at_level(x, self.resolution, self.blend)

    def _draws(self, numbers: range) -> Draws:
        model, objective, device = self.settings.model, self.settings.objective, self.group.device
        key = (self.settings.run.seed, numbers, model.latent_dim, device, self.attempt)
        if model.family == "style":
            mixing = getattr(objective, "style_mixing", 0.0)
            num_layers = models.style.num_layers(self.resolution)
            draws = randomness.style_draws(*key, mixing=mixing, num_layers=num_layers)
        else:
            draws = randomness.step_draws(*key)
        uniform = randomness.augment_draws(key[0], numbers, device, self.attempt) if objective.augment else None
        return replace(draws, augment=uniform)

    def _handle(self, bad: NonFinite) -> None:
        """A non-finite loss: stop, or go back to the last checkpoint and draw anew."""
        run = self.settings.run
        where = f"{' and '.join(bad.terms)} became non-finite at {bad.images_seen:,} images"
        kept = f"checkpoint {self.saved.name} is kept" if self.saved else "there is no checkpoint yet"
        if run.on_nonfinite == "stop" or self.profile is not None:
            raise UserError(f"{where}; stopped before the step, {kept}; {ADVICE}", shared=True)
        if self.attempt >= run.max_rollbacks:
            raise UserError(
                f"{where}; gave up after {self.attempt} rollbacks (run.max_rollbacks), {kept}; {ADVICE}", shared=True
            )
        attempt, ahead = self.attempt + 1, self.images_seen
        found = self._read_checkpoint()
        self._restore(found)
        self.attempt = attempt
        self.tracker.advance(self.images_seen - ahead)
        self.group.on_main(lambda: self.tracker.open(self.images_seen))
        self._start_interval()
        self.tracker.note(
            f"{where}; back to checkpoint {found.name} with other draws, rollback {attempt} of {run.max_rollbacks}"
        )

    # What is told

    def _start_interval(self) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.steps, self.data_wait_sec, self.interval_start_sec = 0, 0.0, time.monotonic()
        self.interval_start_images = self.images_seen

    @span("logging")
    def _log(self) -> None:
        """Means since the last time, over steps and ranks. The only place where the host reads losses."""
        names = sorted(self.sums)
        means = self.group.mean(
            torch.stack([self.sums[name][0].float() / self.sums[name][1] for name in names])
        ).tolist()
        terms = dict(zip(names, means))
        if "kl_fake" in terms:
            terms["kl_gap"] = terms["kl_fake"] - terms["kl_real"]
            self._watch_gap(terms["kl_gap"])
        sections = {"loss": "loss", "grad": "optimizer"}
        elapsed = max(time.monotonic() - self.interval_start_sec, 1e-9)
        self.metrics = {
            f"{sections.get(name.partition('_')[0], 'terms')}/{name}": value for name, value in terms.items()
        }
        self.metrics |= {f"optimizer/{name}": value for name, value in self.rates.items()} | {
            "speed/images_per_sec": (self.images_seen - self.interval_start_images) / elapsed,
            "speed/data_wait_fraction": self.data_wait_sec / elapsed,
            "memory/peak_bytes": peak_memory_bytes(self.group.device),
        }
        if self.settings.schedule.levels:
            self.metrics |= {
                "schedule/resolution": self.resolution,
                "schedule/blend": self.blend,
                "schedule/batch_size": self.batch_size,
            }
        if self.settings.data.on_corrupt == "substitute":
            self._count_substituted()
            self.metrics["data/substituted"] = self.substituted
        self.group.on_main(lambda: self.tracker.scalars(self.metrics, self.images_seen))
        self._start_interval()

    def _watch_gap(self, gap: float) -> None:
        """A KL gap that stays negative: the encoder rates generated images as likelier than real ones."""
        self.negative_gaps = self.negative_gaps + 1 if gap < 0 else 0
        if self.negative_gaps == KL_GAP_PATIENCE:
            self.tracker.note(
                f"the KL of generated images has been below that of real ones for {KL_GAP_PATIENCE} log lines (now {gap:.3g}),"
                " so samples no longer improve; published advice: lower objective.beta_neg"
            )

    @span("pictures")
    def _draw(self) -> None:
        """Real images, reconstructions and samples from the averaged weights; the same images and latents each time."""
        average = self.state.average()

        def draw() -> str:
            model = inference.Model(self.settings.model.model_dump(), self.group.device, {"stage": self._stage()})
            inference.fill(model, average, "the running average")
            batch = self.stream.sample(range(min(self.settings.tracking.picture_count, len(self.stream))))
            real = self._as_input(batch.images)
            mu, logvar = model.encode(real, batch.labels)
            parts = {
                "real": model.to_uint8(real).cpu(),
                "reconstructed": model.to_uint8(model.decode(mu, batch.labels)).cpu(),
                "sampled": model.to_uint8(model.sample(len(mu), seed=self.settings.run.seed)).cpu(),
            }
            for name, figure in figures.of_training(model, parts["real"], batch.labels, self.settings.run.seed).items():
                tiles = images.table(figure.tiles, figure.rows, figure.columns)
                self.tracker.picture(name, tiles, self.images_seen)
            self.tracker.histogram("latent/mu", mu, self.images_seen)
            self.tracker.histogram("latent/logvar", logvar, self.images_seen)
            return self.tracker.picture("samples", images.panels(parts, columns=min(16, len(mu))), self.images_seen)

        self.picture = self.group.on_main(draw)

    def _evaluate(self) -> bool:
        """Judge the averaged weights; True when they are the best so far, and to be saved."""
        start = time.monotonic()
        sentence = self.evaluator.run(self.group.broadcast(self.state.average()), self.images_seen)
        if sentence:
            self.tracker.note(sentence)
        else:
            self.group.on_main(lambda: self.tracker.scalars(self.evaluator.figures, self.images_seen))
        self.interval_start_sec += time.monotonic() - start  # speed is that of training
        return self.evaluator.is_best(self.images_seen)

    # Data and checkpoints

    def _prepare(self) -> None:
        self.lock = run_directory.lock(self.folder)
        run_directory.prepare(self.folder, self.settings, self.group.world_size)

    def _open_streams(self) -> list[ImageStream]:
        """One for each level, so that a level that cannot be read is known at the start."""
        return self.group.together(lambda: [self._open_stream(level) for level in self.levels])

    def _open_stream(self, level: config.LevelSettings) -> ImageStream:
        data, model, group = self.settings.data, self.settings.model, self.group
        stream = open_stream(
            **data.model_dump(), resolution=level.resolution, shrunk_from=model.resolution, num_channels=model.num_channels,
            batch_size=level.batch_size, rank=group.rank, world_size=group.world_size, seed=self.settings.run.seed,
            pin_memory=group.device.type == "cuda", progress=group.is_main,
        )  # fmt: skip
        if model.num_classes and (stream.num_classes or 0) != model.num_classes:
            raise UserError(
                f"model.num_classes: is {model.num_classes}, but {shown(data.url)} has {stream.num_classes or 'no'} classes"
            )
        return stream

    @span("checkpoint")
    def _save(self) -> None:
        """Gathered on all ranks, written by rank 0; its failure is raised on all."""
        if self.saved is not None and self.saved.images_seen == self.images_seen:
            return
        self._count_substituted()
        tensors = self.state.tensors()
        state = {
            "images_seen": self.images_seen, "attempt": self.attempt, "negative_gaps": self.negative_gaps, "substituted": self.substituted, "model": self.settings.model.model_dump(mode="json"),
            "objective": self.settings.objective.model_dump(mode="json"), "seed": self.settings.run.seed,
            "data": {"url": shown(self.settings.data.url), "digest": self.streams[-1].digest}, "version": __version__,
            "resolution": self.resolution, "stage": self._stage(),
            "evaluation": self.evaluator.at(self.images_seen),
        }  # fmt: skip
        name = self.group.on_main(
            lambda: checkpoint.save(self.folder, state, tensors, self.settings.run.keep_checkpoints)
        )
        self.saved = checkpoint.Checkpoint(name, state, {})
        self.evaluator.saved(name, state["evaluation"])
        self.tracker.sync()

    def _read_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint, read once and handed to all ranks."""
        found = None

        def read():
            nonlocal found
            found = checkpoint.read_newest(
                self.folder, report=lambda line: print(f"sivae: {line}", file=sys.stderr), set_aside=True
            )
            if found is not None:
                run_directory.check_model(found.state.get("model"), self.settings, self.folder.url)
            return found and (found.name, found.state, sorted(found.tensors))

        head = self.group.on_main(read)
        if head is None:
            return None
        name, state, files = head
        return checkpoint.Checkpoint(
            name, state, {file: self.group.broadcast(found and found.tensors[file]) for file in files}
        )

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        if found.state["data"]["digest"] != self.streams[-1].digest and self.group.is_main:
            print(
                f"sivae: {shown(self.settings.data.url)} is not the set that checkpoint {found.name} was trained on",
                file=sys.stderr,
            )
        resolutions = [level.resolution for level in self.levels]
        resolution = found.state.get("resolution", self.settings.model.resolution)
        if resolution not in resolutions:
            raise UserError(
                f"{self.folder.url}: checkpoint {found.name} was trained at {resolution} pixels, which is none of"
                " schedule.levels; set another run.directory, or the levels as they were"
            )
        self._enter(resolutions.index(resolution))
        self.state.restore(found.tensors)
        self.images_seen, self.attempt = found.images_seen, found.state["attempt"]
        self.negative_gaps = found.state["negative_gaps"]
        self.substituted, self.new_substituted = found.state.get("substituted", 0), 0
        self.saved = checkpoint.Checkpoint(found.name, found.state, {})
        self.evaluator.saved(found.name, found.state.get("evaluation"))

    def _due(self, every_images: int) -> bool:
        return schedule.due(self.images_seen, self.batch_size, every_images)
