"""The training objectives: pure functions of modules, tensors and explicit random draws.

Sources: Soft-IntroVAE (arXiv 2012.13253, equations 4 to 7 and the published code), IntroVAE (arXiv 1807.06358),
VAE (arXiv 1312.6114). A step has two phases: `encoder_phase` trains the encoder, then `decoder_phase` trains the
decoder against the updated encoder. Freezing, modes and collectives belong to the engines, random numbers to the caller.

Differs on purpose: a plain VAE step runs in the same two phases. Its gradients are those of the joint loss, because the
decoder does not change before its phase and z is handed over; the price is one more decoder pass.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae.graphs import PLAIN, Graphs

Encoder = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
Decoder = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Draws:
    """Standard normal draws of a step, each [B, latent_dim]. `_d` are those of the decoder phase.

    `z_prior` may also be [B, layers, latent_dim], where the decoder mixes styles. With `z_prior_d` and `eps_real_d`
    Soft-IntroVAE's decoder phase has a prior draw and a z of the real images of its own, as published for the style family;
    without them it goes on with those of the encoder phase, as published for the others. `augment`: see `sivae.augment`.
    """

    z_prior: Tensor
    eps_real: Tensor
    eps_rec: Tensor
    eps_fake: Tensor
    eps_rec_d: Tensor
    eps_fake_d: Tensor
    z_prior_d: Tensor | None = None
    eps_real_d: Tensor | None = None
    augment: Tensor | None = None

    @staticmethod
    def names() -> tuple[str, ...]:
        """Those that every family has."""
        return tuple(field.name for field in fields(Draws) if field.default is MISSING)


class Images(NamedTuple):
    """The decoder's images of a step, with their graph: reconstructions, and samples of the prior where the objective has them."""

    rec: Tensor
    fake: Tensor | None = None


@dataclass(frozen=True)
class Phase:
    """What a phase returns: the loss to differentiate (a scalar) and its detached terms (scalars). For the decoder phase also
    z of the real images, and `Images` where its graphs are shared."""

    loss: Tensor
    terms: dict[str, Tensor]
    z: Tensor | None = None
    images: Images | None = None


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats, summed over the latent: [B, D] -> [B] float32."""
    mu, logvar = mu.float(), logvar.float()
    return -0.5 * (1 + logvar - logvar.exp() - mu.square()).sum(dim=1)


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mu + eps * exp(logvar / 2), float32."""
    return mu.float() + eps * (0.5 * logvar.float()).exp()


def reconstruction_error(target: Tensor, rec: Tensor, kind: str) -> Tensor:
    """Error of each sample, summed over everything but the batch: [B, ...] -> [B] float32. `bce` wants values in [0, 1]."""
    target, rec = target.float().flatten(1), rec.float().flatten(1)
    if kind == "mse":
        return (rec - target).square().sum(dim=1)
    if kind == "l1":
        return (rec - target).abs().sum(dim=1)
    if kind == "bce":
        # Written out, because torch's has an infinite gradient to the target where a sigmoid saturates (1 in float32 from 17 on)
        # and is refused under CUDA autocast.
        rec = rec.clamp(1e-30, 1 - 2**-24)  # the largest float32 below 1
        return -(target * rec.log() + (1 - target) * (1 - rec).log()).sum(dim=1)
    raise ValueError(f"no reconstruction error is called {kind!r}")


@dataclass(frozen=True)
class Vae:
    """beta_rec * rec(x) + beta_kl * KL(x), unscaled as published."""

    beta_rec: float = 1.0
    beta_kl: float = 1.0
    reconstruction: str = "mse"

    def rec(self, target: Tensor, rec: Tensor) -> Tensor:
        return reconstruction_error(target, rec, self.reconstruction)

    def _real(
        self, encoder: Encoder, decoder: Decoder, x: Tensor, draws: Draws, labels: Tensor | None, graphs: Graphs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """z of real images, their reconstructions, the batch means of the ELBO's two terms, and the reconstructions for the
        decoder phase."""
        mu, logvar = encoder(x, labels)
        z = reparameterize(mu, logvar, draws.eps_real)
        image, kept = graphs.generate(decoder, z, labels)
        return z, image, self.rec(x, image).mean(), kl(mu, logvar).mean(), kept

    def encoder_phase(
        self, encoder: Encoder, decoder: Decoder, x: Tensor, draws: Draws, labels: Tensor | None = None,
        target_decoder: Decoder | None = None, graphs: Graphs = PLAIN,
    ) -> Phase:  # fmt: skip
        z, _, rec, kl_real, kept = self._real(encoder, decoder, x, draws, labels, graphs)
        loss = self.beta_rec * rec + self.beta_kl * kl_real
        terms = _detach(loss_encoder=loss, rec=rec, kl_real=kl_real)
        return Phase(loss, terms, z.detach(), None if kept is None else Images(kept))

    def decoder_phase(
        self, encoder: Encoder, decoder: Decoder, x: Tensor, z: Tensor, draws: Draws, labels: Tensor | None = None,
        target_decoder: Decoder | None = None, graphs: Graphs = PLAIN, images: Images | None = None,
    ) -> Phase:  # fmt: skip
        """`z` and `images` are those that the encoder phase returned, and `graphs` is the same."""
        rec = self.rec(x, images.rec if images else decoder(z, labels)).mean()
        loss = self.beta_rec * rec
        return Phase(loss, _detach(loss_decoder=loss, rec_d=rec))


@dataclass(frozen=True)
class IntroVae(Vae):
    """IntroVAE: a hinge on the batch means of the KL of reconstructions and fakes: of the images that a rank takes at once, as
    published. So while the hinge is on for some of them, ranks and accumulation passes change more than rounding.

    The published code adds the reconstruction's gradient to the decoder's by not clearing it between the phases;
    here it stands in the decoder's loss, at the z of the encoder phase.
    """

    beta_neg: float = 1.0
    margin: float = 100.0

    def encoder_phase(
        self, encoder: Encoder, decoder: Decoder, x: Tensor, draws: Draws, labels: Tensor | None = None,
        target_decoder: Decoder | None = None, graphs: Graphs = PLAIN,
    ) -> Phase:  # fmt: skip
        fake, fake_kept = graphs.generate(decoder, draws.z_prior, labels)
        z, rec_image, rec, kl_real, rec_kept = self._real(encoder, decoder, x, draws, labels, graphs)
        # Inputs are detached: the encoder is trained to tell images, not to make them.
        (kl_rec,) = graphs.term(lambda image: (_mean_kl(encoder, image, labels),), rec_image.detach())
        (kl_fake,) = graphs.term(lambda image: (_mean_kl(encoder, image, labels),), fake.detach())
        hinge = 0.5 * (F.relu(self.margin - kl_rec) + F.relu(self.margin - kl_fake))
        loss = self.beta_rec * rec + self.beta_kl * (kl_real + self.beta_neg * hinge)
        terms = _detach(loss_encoder=loss, rec=rec, kl_real=kl_real, kl_rec=kl_rec, kl_fake=kl_fake)
        return Phase(loss, terms, z.detach(), None if rec_kept is None else Images(rec_kept, fake_kept))

    def decoder_phase(
        self, encoder: Encoder, decoder: Decoder, x: Tensor, z: Tensor, draws: Draws, labels: Tensor | None = None,
        target_decoder: Decoder | None = None, graphs: Graphs = PLAIN, images: Images | None = None,
    ) -> Phase:  # fmt: skip
        if images:
            rec_image, fake = images
        else:
            fake, rec_image = decoder(draws.z_prior, labels), decoder(z, labels)
        (kl_rec,) = graphs.term(lambda image: (_mean_kl(encoder, image, labels),), rec_image)
        (kl_fake,) = graphs.term(lambda image: (_mean_kl(encoder, image, labels),), fake)
        rec = self.rec(x, rec_image).mean()
        loss = self.beta_rec * rec + self.beta_kl * 0.5 * (kl_rec + kl_fake)
        return Phase(loss, _detach(loss_decoder=loss, rec_d=rec, kl_rec_d=kl_rec, kl_fake_d=kl_fake))


@dataclass(frozen=True)
class SoftIntroVae(Vae):
    """Soft-IntroVAE. `scale` is the paper's s, one over the number of values of a sample."""

    beta_neg: float = 256.0
    gamma_r: float = 0.0
    scale: float = 1.0

    def encoder_phase(
        self, encoder: Encoder, decoder: Decoder, x: Tensor, draws: Draws, labels: Tensor | None = None,
        target_decoder: Decoder | None = None, graphs: Graphs = PLAIN,
    ) -> Phase:  # fmt: skip
        fake, fake_kept = graphs.generate(decoder, draws.z_prior, labels)
        z, rec_image, rec, kl_real, rec_kept = self._real(encoder, decoder, x, draws, labels, graphs)

        second = self._second_decoder(decoder, target_decoder)
        exp_elbo_rec, kl_rec = graphs.term(
            lambda image: self._exp_elbo(encoder, second, image, draws.eps_rec, labels), rec_image
        )
        exp_elbo_fake, kl_fake = graphs.term(
            lambda image: self._exp_elbo(encoder, second, image, draws.eps_fake, labels), fake
        )
        loss = self.scale * (self.beta_rec * rec + self.beta_kl * kl_real) + 0.25 * (exp_elbo_rec + exp_elbo_fake)
        terms = _detach(
            loss_encoder=loss, rec=rec, kl_real=kl_real, kl_rec=kl_rec, kl_fake=kl_fake,
            exp_elbo_rec=exp_elbo_rec, exp_elbo_fake=exp_elbo_fake,
        )  # fmt: skip
        return Phase(loss, terms, z.detach(), None if rec_kept is None else Images(rec_kept, fake_kept))

    def decoder_phase(
        self, encoder: Encoder, decoder: Decoder, x: Tensor, z: Tensor, draws: Draws, labels: Tensor | None = None,
        target_decoder: Decoder | None = None, graphs: Graphs = PLAIN, images: Images | None = None,
    ) -> Phase:  # fmt: skip
        z_prior = draws.z_prior
        if draws.z_prior_d is not None:
            z_prior = draws.z_prior_d
            with torch.no_grad():  # the encoder is frozen, and what it makes of real images is given
                z = reparameterize(*encoder(x, labels), draws.eps_real_d)
        if images:
            rec_image, fake = images
        else:
            fake, rec_image = decoder(z_prior, labels), decoder(z, labels)
        rec = self.rec(x, rec_image).mean()
        second = self._second_decoder(decoder, target_decoder)
        of_rec, kl_rec, *rec_rec = graphs.term(
            lambda image: self._generated(encoder, second, image, draws.eps_rec_d, labels), rec_image
        )
        of_fake, kl_fake, *rec_fake = graphs.term(
            lambda image: self._generated(encoder, second, image, draws.eps_fake_d, labels), fake
        )
        loss = self.scale * (self.beta_rec * rec + of_rec + of_fake)
        terms = dict(loss_decoder=loss, rec_d=rec, kl_rec_d=kl_rec, kl_fake_d=kl_fake)
        if self.gamma_r:
            terms |= dict(rec_rec_d=rec_rec[0], rec_fake_d=rec_fake[0])
        return Phase(loss, _detach(**terms))

    def _exp_elbo(
        self, encoder: Encoder, second: Decoder, image: Tensor, eps: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Batch means of exp(-2s (beta_rec rec + beta_neg KL)) of a generated image, and of its KL."""
        mu, logvar = encoder(image.detach(), labels)
        again = second(reparameterize(mu, logvar, eps), labels)
        # The encoder's input is detached, the target of the error is not: through `rec` gradient reaches the encoder.
        error, divergence = self.rec(image, again), kl(mu, logvar)
        # Both are non-negative, so the exponential lies in (0, 1]: it can vanish but not overflow.
        return (-2 * self.scale * (self.beta_rec * error + self.beta_neg * divergence)).exp().mean(), divergence.mean()

    def _generated(
        self, encoder: Encoder, second: Decoder, image: Tensor, eps: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What a generated image adds to the decoder's loss, its mean KL, and with `gamma_r` the error of reconstructing it."""
        mu, logvar = encoder(image, labels)
        divergence = kl(mu, logvar).mean()
        added = 0.5 * self.beta_kl * divergence
        if not self.gamma_r:
            return added, divergence
        error = self._rec_again(second, image, reparameterize(mu, logvar, eps), labels)
        return added + 0.5 * self.gamma_r * self.beta_rec * error, divergence, error

    def _second_decoder(self, decoder: Decoder, target_decoder: Decoder | None) -> Decoder:
        """What reconstructs generated images."""
        return decoder

    def _rec_again(self, second: Decoder, image: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        """Error of reconstructing a generated image. Image and z are fixed: the decoder learns the map, not the image."""
        return self.rec(image.detach(), second(z.detach(), labels)).mean()


@dataclass(frozen=True)
class Bootstrap(SoftIntroVae):
    """Soft-IntroVAE with a target decoder, a slow and frozen copy, which reconstructs the generated images in both phases."""

    def _second_decoder(self, decoder: Decoder, target_decoder: Decoder | None) -> Decoder:
        if target_decoder is None:
            raise ValueError("the bootstrap objective needs a target decoder")
        return target_decoder

    def _rec_again(self, second: Decoder, image: Tensor, z: Tensor, labels: Tensor | None) -> Tensor:
        # Nothing is detached, as published: the copy is frozen and hands the gradient on to the image.
        return self.rec(image, second(z, labels)).mean()


OBJECTIVES = {"vae": Vae, "intro_vae": IntroVae, "soft_intro_vae": SoftIntroVae, "bootstrap": Bootstrap}


def build(name: str, num_values: int, scale: float | None = None, **fields) -> Vae:
    """An objective by name. `scale=None` is one over `num_values`, the values of a sample."""
    objective = OBJECTIVES[name]
    if issubclass(objective, SoftIntroVae):
        fields["scale"] = scale or 1 / num_values
    return objective(**fields)


def _mean_kl(encoder: Encoder, image: Tensor, labels: Tensor | None) -> Tensor:
    return kl(*encoder(image, labels)).mean()


def _detach(**terms: Tensor) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}
