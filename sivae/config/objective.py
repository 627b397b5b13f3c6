"""Settings of the losses."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import Field

from sivae.config.section import Section

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
    """The hinge's margin m: the encoder pushes the KL of generated images up to it, in the mean over the images that a rank takes
    at once."""
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
