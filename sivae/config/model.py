"""Settings of the four families of models."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Union

from pydantic import Field, model_validator

from sivae.config.section import Section


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


class _ImageModel(Section):
    @property
    def num_values(self) -> int:
        """Values in one sample; the paper's s is one over it."""
        return self.num_channels * self.resolution**2


class ConvModel(_ImageModel):
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

    @model_validator(mode="after")
    def _check(self):
        _check_levels(self.channels, self.resolution)
        if self.norm == "group" and any(width % self.group_size for width in self.channels):
            raise ValueError(f"group_size: {self.group_size} does not divide every width of channels {self.channels}")
        return self


class StyleModel(_ImageModel):
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

    @model_validator(mode="after")
    def _check(self):
        if self.resolution & (self.resolution - 1):
            below = 1 << (self.resolution.bit_length() - 1)
            raise ValueError(
                f"resolution: the levels double 4 pixels and do not reach {self.resolution}; {below} or {2 * below} would do"
            )
        return self


class TranslationModel(_ImageModel):
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
