"""Settings of a run, beside its model and objective, and what must hold between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sivae.config.model import ModelSettings
from sivae.config.objective import ObjectiveSettings
from sivae.config.section import ConfigError, Section


class RunSettings(Section):
    directory: str = Field(min_length=1)
    """Where checkpoints, metrics, pictures and logs go: a folder or any fsspec URL."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights, of every random draw and of the data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU when there is one."""
    cpu_threads: int | None = Field(None, gt=0)
    """Threads of each rank on a CPU; None is torch's choice. Small networks are fastest with 1: more threads than free
    cores wait for each other at every layer."""
    checkpoint_images: int = Field(100_000, gt=0)
    """Save a checkpoint every so many images (and always at the end). It is written while training goes on; a save that is
    due before the one before it is written waits for that."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay; older ones are deleted after a new one is published."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """A non-finite loss stops the run, or returns to the last checkpoint and goes on with other draws."""
    max_rollbacks: int = Field(3, ge=0)
    """How often `on_nonfinite: rollback` may return before the run stops."""
    init_from: str | None = None
    """Start from the weights of this model (folder or URL made by `sivae export` or `sivae import`); None starts anew."""
    outage_sec: float = Field(300.0, ge=0)
    """How long a run that is under way waits for a store of data or checkpoints that has stopped answering, at least five
    attempts; then it ends with an error. At the start five attempts are all."""
    storage_options: dict[str, Any] | None = None
    """Passed to fsspec for `directory` (endpoint, credentials). Never written to disk."""


class DataSettings(Section):
    url: str = Field(min_length=1)
    """Folder or fsspec URL of a packed set or pyramid (see `sivae pack`), `digits:` for the set inside scikit-learn, or
    `shapes:` for drawn shapes with known factors."""
    split: str = Field("train", min_length=1)
    """Which part of the set to train on, by its name in the index, or `all`."""
    num_workers: int = Field(2, ge=0)
    """Processes per rank that read and decode ahead; 0 reads in the training process."""
    flip: bool = False
    """Mirror half of the images, chosen by (seed, epoch, sample)."""
    random_crop: bool = False
    """Cut images of model.resolution out of a set that is packed larger, at a place chosen by (seed, epoch, sample)."""
    on_corrupt: Literal["raise", "substitute"] = "raise"
    """A sample that is damaged in storage stops the run, or another one, chosen by (seed, epoch, sample), stands in for
    it and is counted as data/substituted. Storage that does not answer always stops it."""
    cache_dir: str | None = None
    """A folder on this node for remote shards, `digits:` and `shapes:`; None means $SIVAE_CACHE or ~/.cache/sivae."""
    cache_bytes: int = Field(0, ge=0)
    """Keep so many bytes of remote shards in cache_dir, for all processes and runs of the node; 0 keeps none."""
    timeout_sec: float = Field(120.0, gt=0)
    """How long one attempt at a read may take. After five attempts and run.outage_sec, or when a worker stays silent for
    longer than they may take, the run stops with an error: it never hangs."""
    storage_options: dict[str, Any] | None = None
    """Passed to fsspec for `url` (endpoint, credentials). Never written to disk."""


class LearningRateSchedule(Section):
    kind: Literal["constant", "milestones", "cosine"] = "constant"
    """How the learning rate goes after its warm-up."""
    warmup_images: int = Field(0, ge=0)
    """Rise linearly from 0 over the first so many images."""
    milestones_images: list[Annotated[int, Field(gt=0)]] = []
    """`milestones`: multiply by `gamma` at each of these counts of images."""
    gamma: float = Field(0.1, gt=0, le=1)
    """`milestones`: the factor."""
    hold_images: int = Field(0, ge=0)
    """`cosine`: stay at the full rate for so many images before the decay starts."""
    final_fraction: float = Field(0.0, ge=0, le=1)
    """`cosine`: fraction of the learning rate that is left at the end of the run."""

    @model_validator(mode="after")
    def _check(self):
        if self.kind == "milestones" and not self.milestones_images:
            raise ValueError("milestones_images: kind `milestones` needs at least one")
        if self.kind != "milestones" and self.milestones_images:
            raise ValueError(
                f"milestones_images: kind `{self.kind}` does not use them; remove them or set kind `milestones`"
            )
        for name, kind in (("gamma", "milestones"), ("hold_images", "cosine"), ("final_fraction", "cosine")):
            if self.kind != kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: kind `{self.kind}` does not use it; remove it or set kind `{kind}`")
        if any(a >= b for a, b in zip(self.milestones_images, self.milestones_images[1:])):
            raise ValueError(f"milestones_images: {self.milestones_images} must rise")
        return self


class OptimizerSettings(Section):
    lr: float = Field(2e-4, gt=0)
    """Learning rate of Adam."""
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)
    """Adam's decay rates."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    eps_hat: bool = False
    """Add epsilon to the second moment's root before its bias correction (the Adam paper's epsilon hat), as the published
    optimizer of the style family does. Early in training it then counts for more: at first 10 times with betas[1] 0.99."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW); 0 is plain Adam. With schedule.levels it needs engine.zero_stage 0."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Clip the global gradient norm to this; None does not clip."""
    schedule: LearningRateSchedule = LearningRateSchedule()
    """How the learning rate goes over the images of the run."""

    @model_validator(mode="after")
    def _check(self):
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas} must lie in [0, 1)")
        return self


class EngineSettings(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed divides among the ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """bfloat16 runs the networks in autocast; weights, optimizer and losses stay float32. tf32 lets GPUs round the factors of
    matrix products and convolutions to TensorFloat-32; elsewhere it is float32."""
    micro_batch_size: int | None = Field(None, gt=0)
    """The most images that a rank takes at once; gradients accumulate over passes. None takes the rank's whole share."""
    recompute_from_pixels: int | None = Field(None, gt=0)
    """Activation checkpointing: blocks that work at so many pixels and above keep only their inputs, and are computed again
    in the backward pass. 1 takes all blocks, None none."""
    shared_forward: bool | None = None
    """The decoder's images of the encoder phase serve the decoder phase too: two passes of the decoder less, and the activations
    of two more in memory. Not for the style family, at zero_stage 3 or with accumulation; None does not do it with
    recompute_from_pixels either, which is there to save memory."""
    channels_last: bool | None = None
    """Conv family: keep the activations with channels last. None does so on CPUs, where it is faster, and with compile."""
    compile: bool = False
    """torch.compile both networks, on first use (minutes); needs zero_stage 0 to 2 and, on a CPU, a C++ compiler. Slower than
    without on the CPUs where it was measured; results differ by rounding."""
    overlap_reduction: bool = False
    """Reduce gradients over the ranks in buckets while the backward pass goes on; needs zero_stage 1 to 3. Each phase is then
    differentiated at its end, in one pass, for which it keeps all activations; and no forward is shared. For slow links between
    many ranks; on a CPU nothing overlaps, and on GPUs nobody has measured it yet."""
    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory. Compiles DeepSpeed's CPU Adam on first use (minutes); needs zero_stage 1 to 3."""

    @model_validator(mode="after")
    def _check(self):
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer: needs zero_stage 1, 2 or 3")
        if self.overlap_reduction and self.zero_stage == 0:
            raise ValueError("overlap_reduction: needs zero_stage 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile: needs zero_stage 0, 1 or 2")
        return self


class LevelSettings(Section):
    resolution: int = Field(gt=0)
    """Height and width of the images at this level, in pixels: twice the level's before it."""
    images: int | None = Field(None, gt=0)
    """The level lasts for so many images. The last level has no number: it lasts to the end of the run."""
    fade_images: int = Field(0, ge=0)
    """Over its first so many images the level fades in."""
    batch_size: int | None = Field(None, gt=0)
    """Real images per step over all ranks; None means schedule.batch_size."""
    micro_batch_size: int | None = Field(None, gt=0)
    """The most images that a rank takes at once; None means engine.micro_batch_size."""
    lr_factor: float = Field(1.0, gt=0)
    """Multiplies the learning rates of both networks at this level."""
    beta_neg_factor: float = Field(1.0, ge=0)
    """Multiplies objective.beta_neg at this level."""


class ScheduleSettings(Section):
    total_images: int = Field(gt=0)
    """The run ends when so many real images have been seen."""
    batch_size: int = Field(32, gt=0)
    """Real images per step over all ranks and accumulation passes together."""
    levels: list[LevelSettings] = []
    """Style family: grow progressively, through these levels of detail. Empty trains at model.resolution from the start.
    At a new level the optimizers start anew, as published."""

    @model_validator(mode="after")
    def _check(self):
        for number, level in enumerate(self.levels):
            where, last = f"levels.{number}", number == len(self.levels) - 1
            if last and level.images is not None:
                raise ValueError(
                    f"{where}.images: the last level lasts to the end of the run; remove it, or add the level that follows"
                )
            if not last and level.images is None:
                raise ValueError(f"{where}.images: is missing; only the last level lasts to the end of the run")
            if number == 0 and level.fade_images:
                raise ValueError(f"{where}.fade_images: the first level has none before it to fade from; set 0")
            if number and level.resolution != 2 * self.levels[number - 1].resolution:
                before = self.levels[number - 1].resolution
                raise ValueError(
                    f"{where}.resolution: {level.resolution} pixels follow {before}; each level doubles, so {2 * before} must"
                )
            if level.images is not None and level.fade_images > level.images:
                raise ValueError(
                    f"{where}.fade_images: {level.fade_images} is more than the {level.images} images that the level lasts"
                )
        return self


class EmaSettings(Section):
    halflife_images: float = Field(10_000.0, ge=0)
    """Images after which a weight's share in the average has halved; 0 keeps the plain weights."""
    rampup_ratio: float | None = Field(0.05, gt=0)
    """Early on the half-life is at most this share of the images seen; None does not ramp."""


class TrackingSettings(Section):
    log_images: int = Field(10_000, gt=0)
    """Write scalars every so many images."""
    picture_images: int = Field(50_000, gt=0)
    """Draw the grid of real images, reconstructions and samples every so many images."""
    picture_count: int = Field(32, gt=0)
    """Real images, and as many samples, in the grid."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    progress: bool = True
    """Show the progress bar."""


class EvaluateSettings(Section):
    every_images: int | None = Field(None, gt=0)
    """Judge the averaged weights every so many images and at the end, as `sivae evaluate` does; None never. The checkpoint
    that was best by the first of `metrics` is kept, as checkpoints/best."""
    metrics: list[str] = Field(["frechet_pixels"], min_length=1)
    """Figures by name, such as fid, kid, frechet_pixels, mse; docs/evaluation.md has them all."""
    num_fakes: int = Field(10_000, gt=0)
    """Samples."""
    num_reals: int | None = Field(None, gt=0)
    """Real images: the first so many of the split; None takes all."""
    data: str | None = None
    """Packed set of the real images; None takes data.url."""
    split: str | None = None
    """Which part of it; None takes data.split."""
    detectors: dict[str, str] = {}
    """TorchScript files by the detector's name, each PATH_OR_URL or PATH_OR_URL#sha256=HEX."""
    lpips: str | None = None
    """TorchScript file of LPIPS, likewise."""
    batch_size: int = Field(64, gt=0)
    """Images judged at a time."""
    seed: int = Field(0, ge=0)
    """Of the samples, and of the subsets of a kernel distance."""
    truncation: float = Field(1.0, ge=0)
    """Psi, of a style model; 1 is none."""
    truncation_layers: int | None = Field(None, ge=0)
    """Truncate in the first so many layers only; None in all. Only with a truncation other than 1."""
    mode: Literal["eval", "train"] = "eval"
    """BatchNorm with its running averages, or with the statistics of each batch."""
    protocol: Literal["published"] | None = None
    """Judge as the paper's figures were made, as `sivae evaluate --protocol` does. It fixes num_fakes, num_reals, batch_size,
    truncation, truncation_layers and mode."""

    @model_validator(mode="after")
    def _check(self):
        fixed = ("num_fakes", "num_reals", "batch_size", "truncation", "truncation_layers", "mode")
        given = [name for name in fixed if getattr(self, name) != type(self).model_fields[name].default]
        if self.protocol is not None and given:
            raise ValueError(f"{given[0]}: the {self.protocol} protocol fixes it; leave one of the two out")
        return self


class Config(Section):
    """One run."""

    run: RunSettings
    data: DataSettings
    model: ModelSettings
    objective: ObjectiveSettings
    encoder_optimizer: OptimizerSettings = OptimizerSettings()
    decoder_optimizer: OptimizerSettings = OptimizerSettings()
    engine: EngineSettings = EngineSettings()
    schedule: ScheduleSettings
    ema: EmaSettings = EmaSettings()
    tracking: TrackingSettings = TrackingSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _check(self):
        if self.model.family == "mlp" and len(self.model.sample_shape) != 3:
            raise ValueError(
                f"model.sample_shape: {self.model.sample_shape} is no image; image sets need [channels, height, width]"
            )
        if self.objective.reconstruction == "bce" and self.model.family == "style":
            raise ValueError(
                "objective.reconstruction: bce needs values in [0, 1], the style family's are in [-1, 1]; set mse"
            )
        if self.objective.reconstruction == "bce" and self.model.output != "sigmoid":
            raise ValueError("objective.reconstruction: bce needs values in [0, 1]; set model.output=sigmoid")
        if getattr(self.objective, "style_mixing", 0) and self.model.family != "style":
            raise ValueError(
                f"objective.style_mixing: only the style family has layers of styles, not {self.model.family}; remove it"
            )
        if self.engine.recompute_from_pixels is not None:
            if self.model.family == "mlp":
                raise ValueError(
                    "engine.recompute_from_pixels: the mlp family has no blocks to compute again; remove it"
                )
            if getattr(self.model, "norm", None) == "batch":
                # and its running statistics would be averaged twice
                raise ValueError("engine.recompute_from_pixels: does not go with model.norm=batch; take another norm")
        if self.engine.channels_last and self.model.family != "conv":
            raise ValueError(f"engine.channels_last: only the conv family can, not {self.model.family}; remove it")
        if self.engine.shared_forward and (why := self._never_shares_forward()):
            raise ValueError(f"engine.shared_forward: {why}; remove it")
        if self.schedule.levels:
            levels = self.schedule.levels
            if self.model.family != "style":
                raise ValueError(
                    f"schedule.levels: only the style family grows by levels, not {self.model.family}; remove it"
                )
            if levels[0].resolution < 4:
                raise ValueError(f"schedule.levels.0.resolution: levels begin at 4 pixels, not {levels[0].resolution}")
            if levels[-1].resolution != self.model.resolution:
                raise ValueError(
                    f"schedule.levels: they reach {levels[-1].resolution} pixels, not model.resolution={self.model.resolution}"
                )
            if not hasattr(self.objective, "beta_neg") and any(level.beta_neg_factor != 1 for level in levels):
                raise ValueError(
                    f"schedule.levels: objective {self.objective.name} has no beta_neg; remove beta_neg_factor"
                )
        for name in ("encoder_optimizer", "decoder_optimizer"):
            if self.engine.offload_optimizer and getattr(self, name).eps_hat:
                raise ValueError(
                    f"{name}.eps_hat: the optimizer of engine.offload_optimizer cannot do it; set one of them to false"
                )
            if getattr(self, name).weight_decay and self.schedule.levels and self.engine.zero_stage:
                raise ValueError(
                    f"{name}.weight_decay: under ZeRO levels that have not begun would decay too; set it to 0, or"
                    " engine.zero_stage to 0"
                )
            lr = getattr(self, name).schedule
            if lr.warmup_images + lr.hold_images > self.schedule.total_images and lr.kind == "cosine":
                raise ValueError(
                    f"{name}.schedule.hold_images: warm-up and hold take {lr.warmup_images + lr.hold_images} images,"
                    f" more than schedule.total_images={self.schedule.total_images}"
                )
        for level in self.levels():
            if level.batch_size > self.schedule.total_images:
                raise ValueError(
                    f"schedule.batch_size: {level.batch_size} is more than"
                    f" schedule.total_images={self.schedule.total_images}"
                )
        return self

    def levels(self) -> list[LevelSettings]:
        """The levels of the run, nothing left out: those of schedule.levels, or one for the whole run."""
        return [
            level.model_copy(
                update={
                    "batch_size": level.batch_size or self.schedule.batch_size,
                    "micro_batch_size": level.micro_batch_size or self.engine.micro_batch_size,
                }
            )
            for level in self.schedule.levels or [LevelSettings(resolution=self.model.resolution)]
        ]

    def shares_forward(self, passes: int) -> bool:
        """Whether one decoder forward serves both phases of a step of so many accumulation passes."""
        if self._never_shares_forward() or self.engine.shared_forward is False or passes > 1:
            return False
        return self.engine.shared_forward or self.engine.recompute_from_pixels is None

    def _never_shares_forward(self) -> str | None:
        """Why it would not be exact."""
        if self.model.family == "style":
            return "the style family draws anew for the decoder phase"
        if self.engine.overlap_reduction:
            return "with overlap_reduction a phase is differentiated by itself"
        return "at zero_stage 3 parameters are not whole" if self.engine.zero_stage == 3 else None

    def passes(self, world_size: int) -> list[int]:
        """Accumulation passes per step on `world_size` ranks, for each of `levels`.

        Ranks may have shares of different size, and so may passes. Raises ConfigError where one would have no image.
        """
        found = []
        for level in self.levels():
            where = f"schedule.levels, {level.resolution} pixels" if self.schedule.levels else "schedule.batch_size"
            least, share = level.batch_size // world_size, -(-level.batch_size // world_size)
            if not least:
                raise ConfigError(
                    f"{where}: {level.batch_size} images a step are too few for {world_size} ranks; each needs one"
                )
            passes = -(-share // (level.micro_batch_size or share))
            if passes > least:
                raise ConfigError(
                    f"{where}: {level.batch_size} images a step in passes of {level.micro_batch_size} leave some of"
                    f" {world_size} ranks without an image in the last pass; make micro_batch_size 2 or more"
                )
            found.append(passes)
        return found
