"""One training step of many small models at once, each with its own data and draws, equal to stepping each by itself.

Source: the phases of `sivae.objectives` with the fully connected networks; tests/numerics/test_stacked_step.py holds both
together. What the stack leaves out because it changes nothing:
- A plain VAE updates both networks by one backward pass: the gradients of its two phases are those of the joint loss.
- The decoder's images of a step serve both phases, as the decoder does not change in between. Only the encoder's passes
  over them are made again, by the updated encoder.
- Reconstructions and fakes go through a network together where nothing in it mixes samples.
- Gradients are taken by the trained network's weights alone, and never by what only the frozen one would need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae import allocator, objectives
from sivae.models.stack import MlpStack, Weights, forward
from sivae.objectives import Draws, IntroVae, SoftIntroVae, Vae

Terms = dict[str, Tensor]


class StackedModels:
    """Encoders, decoders and their Adams. `dtype` is that of the hidden layers; losses and weights are float32."""

    def __init__(self, networks, lr: float, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """networks: pairs (encoder, decoder), one for each model; they stay as they are."""
        if torch.device(device).type == "cpu":
            allocator.keep_freed_memory()
        self.encoder, self.decoder = (
            MlpStack([network.to(device) for network in column], dtype) for column in zip(*networks)
        )
        self.stacks = {"encoder": self.encoder, "decoder": self.decoder}
        self.adams = {
            name: torch.optim.Adam([stack.parameter], lr=lr, fused=True) for name, stack in self.stacks.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights and Adam's state by name, on the CPU, to save and to `load`."""
        found = {}
        for name, stack in self.stacks.items():
            state = {"weight": stack.parameter.detach(), **self.adams[name].state[stack.parameter]}
            found |= {f"{name}.{key}": value.cpu() for key, value in state.items()}
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, stack in self.stacks.items():
            stack.parameter.copy_(tensors[f"{name}.weight"])
            self.adams[name].state[stack.parameter] = {
                key: tensors[f"{name}.{key}"].to(stack.parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def fits(self, tensors: dict[str, Tensor]) -> bool:
        """Whether `tensors` are those of a stack of this size."""
        ours = {f"{name}.weight": stack.parameter.shape for name, stack in self.stacks.items()}
        return ours == {name: value.shape for name, value in tensors.items() if name.endswith(".weight")}

    def set_lr(self, lr: float) -> None:
        for adam in self.adams.values():
            adam.param_groups[0]["lr"] = lr

    def step(self, objective: Vae, x: Tensor, draws: Draws) -> Terms:
        """One step of all models: x float32 [S, B, values], every draw [S, B, latent_dim]. Returns the terms of both losses as
        they are named in `sivae.objectives`, each [S] and detached."""
        if isinstance(objective, SoftIntroVae):
            # Those passes would be needed for it; published 1e-8 is nothing at float32.
            assert objective.gamma_r == 0, "the stacked step leaves the reconstructions of generated samples out"
            return self._soft_intro_vae(objective, x, draws)
        if isinstance(objective, IntroVae):
            return self._intro_vae(objective, x, draws)
        return self._vae(objective, x, draws)

    def _vae(self, objective: Vae, x: Tensor, draws: Draws) -> Terms:
        encoder, decoder = self.encoder.weights(), self.decoder.weights()
        _, rec_image, rec, kl_real = _real(objective, encoder, decoder, x, draws)
        loss = objective.beta_rec * rec + objective.beta_kl * kl_real
        gradients = _gradients(loss, [*encoder.leaves, *decoder.leaves])
        self._update("encoder", gradients[:2])
        self._update("decoder", gradients[2:])
        return _detach(loss_encoder=loss, rec=rec, kl_real=kl_real, loss_decoder=objective.beta_rec * rec, rec_d=rec)

    def _intro_vae(self, objective: IntroVae, x: Tensor, draws: Draws) -> Terms:
        encoder, decoder = self.encoder.weights(), self.decoder.weights()
        size = x.shape[1]
        _, rec_image, rec, kl_real = _real(objective, encoder, decoder, x, draws)
        fake = forward(decoder.layers, draws.z_prior)
        kl_rec, kl_fake = _halves(_kl(*_encode(encoder, torch.cat([rec_image, fake], 1).detach())), size)
        hinge = 0.5 * (F.relu(objective.margin - kl_rec) + F.relu(objective.margin - kl_fake))
        loss = objective.beta_rec * rec + objective.beta_kl * (kl_real + objective.beta_neg * hinge)
        self._update("encoder", _gradients(loss, encoder.leaves, retain_graph=True))
        terms = dict(loss_encoder=loss, rec=rec, kl_real=kl_real, kl_rec=kl_rec, kl_fake=kl_fake)
        return _detach(**terms, **self._decoder_phase(objective, decoder, rec_image, fake, rec))

    def _soft_intro_vae(self, objective: SoftIntroVae, x: Tensor, draws: Draws) -> Terms:
        encoder, decoder = self.encoder.weights(), self.decoder.weights()
        size = x.shape[1]
        _, rec_image, rec, kl_real = _real(objective, encoder, decoder, x, draws)
        fake = forward(decoder.layers, draws.z_prior)
        # The encoder's input is detached, the target of the error is not: through `rec` gradient reaches the encoder.
        generated = torch.cat([rec_image, fake.detach()], 1)
        mu, logvar = _encode(encoder, generated.detach())
        z = objectives.reparameterize(mu, logvar, torch.cat([draws.eps_rec, draws.eps_fake], 1))
        error, divergence = _error(objective, generated, forward(decoder.layers, z)), _kl(mu, logvar)
        exp_elbo = (-2 * objective.scale * (objective.beta_rec * error + objective.beta_neg * divergence)).exp()
        exp_elbo_rec, exp_elbo_fake = _halves(exp_elbo, size)
        kl_rec, kl_fake = _halves(divergence, size)
        loss = objective.scale * (objective.beta_rec * rec + objective.beta_kl * kl_real)
        loss = loss + 0.25 * (exp_elbo_rec + exp_elbo_fake)
        self._update("encoder", _gradients(loss, encoder.leaves, retain_graph=True))
        terms = dict(
            loss_encoder=loss, rec=rec, kl_real=kl_real, kl_rec=kl_rec, kl_fake=kl_fake,
            exp_elbo_rec=exp_elbo_rec, exp_elbo_fake=exp_elbo_fake,
        )  # fmt: skip
        scale = objective.scale
        return _detach(**terms, **self._decoder_phase(objective, decoder, rec_image, fake, rec, scale))

    def _decoder_phase(
        self, objective: Vae, decoder: Weights, rec_image: Tensor, fake: Tensor, rec: Tensor, scale: float = 1.0
    ) -> Terms:
        """Against the updated encoder, whose weights get no gradient."""
        encoder = self.encoder.weights(trained=False)
        divergence = _kl(*_encode(encoder, torch.cat([rec_image, fake], 1)))
        kl_rec, kl_fake = _halves(divergence, rec_image.shape[1])
        loss = scale * (objective.beta_rec * rec + 0.5 * objective.beta_kl * (kl_rec + kl_fake))
        self._update("decoder", _gradients(loss, decoder.leaves))
        return dict(loss_decoder=loss, rec_d=rec, kl_rec_d=kl_rec, kl_fake_d=kl_fake)

    def _update(self, name: str, gradients: Sequence[Tensor]) -> None:
        """gradients: by the leaves of that network's weights."""
        ends, hidden = gradients
        self.stacks[name].parameter.grad = torch.cat([ends, hidden.float()])
        self.adams[name].step()


def _real(
    objective: Vae, encoder: Weights, decoder: Weights, x: Tensor, draws: Draws
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z of real samples, their reconstructions, and of each model the batch means of the ELBO's two terms."""
    mu, logvar = _encode(encoder, x)
    z = objectives.reparameterize(mu, logvar, draws.eps_real)
    image = forward(decoder.layers, z)
    return z, image, _error(objective, x, image).mean(1), _kl(mu, logvar).mean(1)


def _gradients(loss: Tensor, leaves: Sequence[Tensor], retain_graph: bool = False) -> tuple[Tensor, ...]:
    """Of each model's loss by its own weights. A network without hidden layers has an empty leaf, which nothing depends on."""
    return torch.autograd.grad(loss.sum(), leaves, retain_graph=retain_graph, materialize_grads=True)


def _encode(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    mu, logvar = forward(weights.layers, x).chunk(2, dim=2)
    return mu, logvar


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """[S, B]"""
    return objectives.kl(mu.flatten(0, 1), logvar.flatten(0, 1)).unflatten(0, mu.shape[:2])


def _error(objective: Vae, target: Tensor, rec: Tensor) -> Tensor:
    """[S, B]"""
    return objective.rec(target.flatten(0, 1), rec.flatten(0, 1)).unflatten(0, rec.shape[:2])


def _halves(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Means over the reconstructions, which come first, and over the fakes: [S, 2B] -> two of [S]."""
    return values[:, :size].mean(1), values[:, size:].mean(1)


def _detach(**terms: Tensor) -> Terms:
    return {name: term.detach() for name, term in terms.items()}
