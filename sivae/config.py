"""Every setting of a run, with its unit and meaning; read, override, validate, write.

A run is one YAML file. `load("configs/digits.yaml", ["schedule.batch_size=64"])` reads it with OmegaConf,
applies the `key.path=value` overrides, and validates the whole tree with pydantic before anything else starts:
unknown keys, wrong types and impossible combinations raise `ConfigError`, which names the key's full path
and what would be right. Batch sizes are global; intervals and progress are counted in images.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args

import fsspec
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

TAGS = ("family", "name")  # the settings that say which section of several stands there


class ConfigError(ValueError):
    """A setting is wrong. The message names its full path and what would be right. Every rank raises the same."""

    shared = True


class Section(BaseModel):
    """Strict: no unknown keys, no silent conversion of types, no change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Settings = TypeVar("Settings", bound=Section)


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
    """Save a checkpoint every so many images (and always at the end)."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay; older ones are deleted after a new one is published."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """A non-finite loss stops the run, or returns to the last checkpoint and goes on with other draws."""
    max_rollbacks: int = Field(3, ge=0)
    """How often `on_nonfinite: rollback` may return before the run stops."""
    init_from: str | None = None
    """Start from the weights of this model (folder or URL made by `sivae export` or `sivae import`); None starts anew."""
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
    """How long one attempt at a read may take. After five attempts, or when a worker stays silent for longer than they
    may take, the run stops with an error: it never hangs."""
    storage_options: dict[str, Any] | None = None
    """Passed to fsspec for `url` (endpoint, credentials). Never written to disk."""


class MlpModel(Section):
    family: Literal["mlp"] = "mlp"
    sample_shape: list[int] = Field([2], min_length=1, max_length=3)
    """Shape of one sample: `[2]` for points, `[channels, height, width]` for images."""
    latent_dim: int = Field(2, gt=0)
    """Size of z."""
    num_hidden: int = Field(256, gt=0)
    """Width of the hidden layers."""
    num_layers: int = Field(3, ge=0)
    """Hidden layers after the input layer."""
    num_classes: int = Field(0, ge=0)
    """Classes of a conditional model; 0 means unconditional. Labels come from the data."""
    output: Literal["linear", "sigmoid"] = "linear"
    """Last activation of the decoder. `linear` as published; `sigmoid` is needed by `bce`."""

    @property
    def num_channels(self) -> int:
        return self.sample_shape[0] if len(self.sample_shape) == 3 else 1

    @property
    def resolution(self) -> int:
        return self.sample_shape[-1]

    @property
    def num_values(self) -> int:
        """Values in one sample; the paper's s is one over it."""
        size = 1
        for length in self.sample_shape:
            size *= length
        return size

    @model_validator(mode="after")
    def _check(self):
        if any(length < 1 for length in self.sample_shape):
            raise ValueError(f"sample_shape: {self.sample_shape} has a length below 1")
        if len(self.sample_shape) == 3 and self.sample_shape[1] != self.sample_shape[2]:
            raise ValueError(f"sample_shape: images are square, not {self.sample_shape[1:]}")
        return self


def _check_levels(channels: list[int], resolution: int) -> None:
    """Each level halves the resolution."""
    if any(width < 1 for width in channels):
        raise ValueError(f"channels: {channels} has a width below 1")
    halved = 2 ** len(channels)
    if resolution % halved or resolution // halved < 2:
        fits = max((n for n in range(1, 11) if resolution % 2**n == 0 and resolution // 2**n >= 4), default=1)
        raise ValueError(
            f"channels: {len(channels)} levels divide the resolution by {halved}, which {resolution} pixels"
            f" do not allow; give {fits} or fewer levels, or another resolution"
        )


class ConvModel(Section):
    family: Literal["conv"] = "conv"
    num_channels: int = Field(3, ge=1)
    """Channels of the images: 1 grey, 3 colour."""
    resolution: int = Field(32, ge=4)
    """Height and width of the images in pixels."""
    channels: list[int] = Field([64, 128, 256], min_length=1)
    """Feature maps of each level, from the image inwards; each level halves the resolution."""
    latent_dim: int = Field(128, gt=0)
    """Size of z."""
    num_classes: int = Field(0, ge=0)
    """Classes of a conditional model; 0 means unconditional. Labels come from the data."""
    norm: Literal["batch", "group", "layer", "pixel", "none"] = "group"
    """`batch` as published; the others treat every image by itself, so that a saved model samples as in training
    and the number of GPUs changes nothing. docs/normalisation.md has the measured comparison."""
    group_size: int = Field(8, ge=1)
    """Channels in a group of `norm: group`."""
    residual: Literal["soft_intro_vae", "intro_vae"] = "soft_intro_vae"
    """Order of the residual block: norm then add, or IntroVAE's add then norm."""
    output: Literal["linear", "sigmoid"] = "linear"
    """Last activation of the decoder. `linear` as published; `sigmoid` is needed by `bce`."""

    @property
    def num_values(self) -> int:
        """Values in one sample; the paper's s is one over it."""
        return self.num_channels * self.resolution**2

    @model_validator(mode="after")
    def _check(self):
        _check_levels(self.channels, self.resolution)
        if self.norm == "group" and any(width % self.group_size for width in self.channels):
            raise ValueError(f"group_size: {self.group_size} does not divide every width of channels {self.channels}")
        return self


class StyleModel(Section):
    family: Literal["style"] = "style"
    num_channels: int = Field(3, ge=1)
    """Channels of the images: 1 grey, 3 colour."""
    resolution: int = Field(256, ge=4, le=1024)
    """Height and width of the images in pixels: 4 times a power of two, one level of detail for each doubling."""
    base_channels: int = Field(64, gt=0)
    """Feature maps beside the image; each level inwards doubles them."""
    max_channels: int = Field(512, gt=0)
    """The most feature maps that a level has."""
    latent_dim: int = Field(512, gt=0)
    """Size of z and of a style."""
    num_mapping_layers: int = Field(8, gt=0)
    """Fully connected layers from z to the style."""
    num_mapping_layers_to_latent: int = Field(3, gt=0)
    """Fully connected layers from the encoder's style to mu and logvar; 3 as published."""
    num_classes: int = Field(0, ge=0)
    """Classes of a conditional model; 0 means unconditional. Labels come from the data."""
    noise: Literal["random", "batch", "mean", "none"] = "random"
    """Per-pixel noise in training: for each image, one map for a batch, none but the published code's term for noise that
    is off, or nothing. Pictures and samples have fixed maps instead of random ones."""
    average_style_decay: float = Field(0.995, ge=0, lt=1)
    """Share of the old average style that one pass of the decoder keeps; truncation pulls styles to this average."""

    @property
    def num_values(self) -> int:
        """Values in one sample; the paper's s is one over it."""
        return self.num_channels * self.resolution**2

    @model_validator(mode="after")
    def _check(self):
        if self.resolution & (self.resolution - 1):
            below = 1 << (self.resolution.bit_length() - 1)
            raise ValueError(
                f"resolution: the levels double 4 pixels and do not reach {self.resolution}; {below} or {2 * below} would do"
            )
        return self


class TranslationModel(Section):
    family: Literal["translation"] = "translation"
    num_channels: int = Field(3, ge=1)
    """Channels of the images: 1 grey, 3 colour."""
    resolution: int = Field(64, ge=4)
    """Height and width of the images in pixels."""
    channels: list[int] = Field([64, 128, 256], min_length=1)
    """Feature maps of each level of both encoders and the decoder, from the image inwards; each level halves the resolution."""
    latent_dim: int = Field(128, gt=1)
    """Size of z: class and content together."""
    class_dim: int = Field(64, gt=0)
    """How many values of z are the class; the others are the content. Few values leave little room for what is the other's."""
    style_dim: int = Field(128, gt=0)
    """Width of the fully connected layers between the class and the decoder's adaptive instance norms."""
    group_size: int = Field(8, ge=1)
    """Channels in a group of the class encoder's norm. Content encoder and decoder have instance norm."""
    output: Literal["linear", "sigmoid"] = "linear"
    """Last activation of the decoder; `sigmoid` is needed by `bce`."""

    num_classes: ClassVar[int] = 0  # no labels: classes are what the class encoder finds

    @property
    def num_values(self) -> int:
        """Values in one sample; the paper's s is one over it."""
        return self.num_channels * self.resolution**2

    @model_validator(mode="after")
    def _check(self):
        _check_levels(self.channels, self.resolution)
        if any(width % self.group_size for width in self.channels):
            raise ValueError(f"group_size: {self.group_size} does not divide every width of channels {self.channels}")
        if self.class_dim >= self.latent_dim:
            raise ValueError(
                f"class_dim: {self.class_dim} leaves nothing of latent_dim {self.latent_dim} for the content;"
                f" give at most {self.latent_dim - 1}"
            )
        return self


ModelSettings = Annotated[Union[MlpModel, ConvModel, StyleModel, TranslationModel], Field(discriminator="family")]


_NOT_OF_THE_LOSS = ("vae_images", "target_refresh_images", "style_mixing", "augment", "augment_probability")


class _Objective(Section):
    reconstruction: Literal["mse", "l1", "bce"] = "mse"
    """Reconstruction error of an image, summed over its pixels and channels."""
    beta_rec: float = Field(1.0, ge=0)
    """Weight of the reconstruction error."""
    beta_kl: float = Field(1.0, ge=0)
    """Weight of the KL divergence of real images (and of generated ones in the decoder's loss)."""
    augment: list[Literal["color", "translation", "cutout"]] = []
    """Change what the encoder sees, real and generated images alike, in ways that gradient passes through. Against too few
    images: `[translation, cutout]` is reported to bring the Frechet distance on CIFAR-10 from 4.30 to 2.96."""
    augment_probability: float = Field(0.5, gt=0, le=1)
    """Probability of each kind of `augment`, for each image and each pass of the encoder."""

    def loss_fields(self) -> dict[str, Any]:
        """What `objectives.build` takes: all but what says when and from which draws the loss is computed."""
        return self.model_dump(exclude={*_NOT_OF_THE_LOSS})


class VaeObjective(_Objective):
    name: Literal["vae"] = "vae"


class _Introspective(_Objective):
    vae_images: int = Field(0, ge=0)
    """Train as a plain VAE for the first so many images."""
    style_mixing: float = Field(0.0, ge=0, le=1)
    """Style family: probability that an image from the prior follows one latent in its first layers and another in the
    others; published 0.9."""


class IntroVaeObjective(_Introspective):
    name: Literal["intro_vae"] = "intro_vae"
    margin: float = Field(100.0, ge=0)
    """The hinge's margin m: the encoder pushes the KL of generated images up to it."""
    beta_neg: float = Field(1.0, ge=0)
    """Weight of the hinge (`weight_neg` in the published code, alpha in the paper)."""


class SoftIntroVaeObjective(_Introspective):
    name: Literal["soft_intro_vae"] = "soft_intro_vae"
    beta_neg: float = Field(256.0, ge=0)
    """Weight of the KL divergence of generated images inside the encoder's exponential."""
    gamma_r: float = Field(0.0, ge=0)
    """Weight of the reconstruction of generated images in the decoder's loss. 0 skips those passes;
    published 1e-8, which is the same to rounding."""
    scale: float | None = Field(None, gt=0)
    """The paper's s; None means one over the values of an image (channels x height x width)."""


class BootstrapObjective(SoftIntroVaeObjective):
    name: Literal["bootstrap"] = "bootstrap"
    gamma_r: float = Field(1.0, gt=0)
    """Weight of the reconstruction of generated images through the target decoder."""
    target_refresh_images: int = Field(50_000, gt=0)
    """Copy the decoder's weights into the target decoder every so many images (published: every epoch)."""


ObjectiveSettings = Annotated[
    Union[VaeObjective, IntroVaeObjective, SoftIntroVaeObjective, BootstrapObjective], Field(discriminator="name")
]


class LearningRateSchedule(Section):
    kind: Literal["constant", "milestones", "cosine"] = "constant"
    """How the learning rate goes after its warm-up."""
    warmup_images: int = Field(0, ge=0)
    """Rise linearly from 0 over the first so many images."""
    milestones_images: list[int] = []
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
    """Decoupled weight decay (AdamW); 0 is plain Adam."""
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
    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory. Compiles DeepSpeed's CPU Adam on first use (minutes); needs zero_stage 1 to 3."""

    @model_validator(mode="after")
    def _check(self):
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer: needs zero_stage 1, 2 or 3")
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


def load(path: str, overrides: Iterable[str] = (), schema: type[Settings] = Config) -> Settings:
    """Read a YAML file (path or fsspec URL), apply `key.path=value` overrides, validate.

    Raises ConfigError in one sentence for a missing or unreadable file, a malformed override or a wrong setting.
    """
    try:
        with fsspec.open(path, "r") as file:
            text = file.read()
    except Exception as error:  # noqa: BLE001 (drivers of object stores raise their own kinds)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(
            f"{path}: cannot be read ({reason}); give the path of a YAML file such as configs/digits.yaml"
        ) from None
    try:
        # OmegaConf's loader, not plain YAML: it reads 2e-4 as a number.
        tree = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not OmegaConf.is_dict(tree) or not any(section in tree for section in schema.model_fields):
        raise ConfigError(f"{path}: holds no settings; see configs/digits.yaml for an example")
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"{override}: an override is written key.path=value, for example schedule.batch_size=64")
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{override}: cannot be applied ({' '.join(str(error).split())})") from None
    try:
        return parse(OmegaConf.to_container(tree, resolve=True), schema)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def parse(tree: dict[str, Any], schema: type[Settings] = Config) -> Settings:
    """Validate a plain tree of settings. Raises ConfigError naming the full path of what is wrong."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(item, schema) for item in error.errors())) from None


def parse_model(tree: dict[str, Any]) -> MlpModel | ConvModel | StyleModel | TranslationModel:
    """Validate the settings of a model alone, as checkpoints and exported models hold them."""
    try:
        return TypeAdapter(ModelSettings).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(f"model.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        ) from None


def dump(config: Config) -> dict[str, Any]:
    """The resolved settings as a plain tree, without what may hold secrets: `storage_options`, passwords and queries in URLs."""
    tree = config.model_dump(mode="json", exclude={"run": {"storage_options"}, "data": {"storage_options"}})
    for section, key in (("run", "directory"), ("run", "init_from"), ("data", "url"), ("evaluate", "data")):
        if tree[section][key]:
            tree[section][key] = re.sub(r"\?.*", "?...", re.sub(r"//[^/\s]+@", "//...@", tree[section][key]))
    return tree


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(dump(config), sort_keys=False)


def _sentence(item: dict[str, Any], schema: type[Section]) -> str:
    """One pydantic error as `full.path: what is wrong; what would be right`."""
    section, path = _walk(item["loc"], schema)
    where, kind = ".".join(path), item["type"]
    if kind == "extra_forbidden":
        known = sorted(section.model_fields) if section else []
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.8)
        kind_of = next(
            (f" of `{section.model_fields[tag].default}`" for tag in TAGS if section and tag in section.model_fields),
            "",
        )
        hint = f"did you mean `{close[0]}`?" if close else f"remove it; known here: {', '.join(known)}"
        return f"{where}: unknown setting{kind_of}; {hint}"
    if kind == "missing":
        return f"{where}: is missing; give it in the YAML file or as {where}=value"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = item["ctx"]["discriminator"].strip("'")
        known = item["ctx"].get("expected_tags") or "one of the known ones"
        return f"{where}.{tag}: must be one of {known}"
    if kind == "value_error":
        # Our own checks start with the key they speak of, relative to the section they stand in.
        return f"{where}.{item['ctx']['error']}" if where else str(item["ctx"]["error"])
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{where}: {message}" + ("" if "storage_options" in path else f", not {item['input']!r}")


def _walk(location: tuple[Any, ...], schema: type[Section]) -> tuple[type[Section] | None, list[str]]:
    """The section that holds the last key, and the path without pydantic's tags of unions."""
    section: type[Section] | None = schema
    path: list[str] = []
    for index, part in enumerate(location):
        members = (
            _members(section.model_fields[path[-1]].annotation)
            if section and path and path[-1] in section.model_fields
            else []
        )
        by_tag = {
            str(field.default): member
            for member in members
            for name, field in member.model_fields.items()
            if name in TAGS
        }
        if part in by_tag:
            section = by_tag[part]
            continue
        if len(members) == 1 and index:
            section = members[0]
        path.append(str(part))
    return section, path


def _members(annotation: Any) -> list[type[Section]]:
    """The section classes inside an annotation: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [member for part in get_args(annotation) for member in _members(part)]
