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

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae import allocator, objectives
from sivae.models.stack import MlpStack, Pass
from sivae.objectives import Draws, IntroVae, SoftIntroVae, Vae

Terms = dict[str, Tensor]


class StackedModels:
    """Encoders, decoders and their Adams. `dtype` is that of the hidden layers; losses and weights are float32."""

    def __init__(self, networks, lr: float, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """networks: pairs (encoder, decoder), one for each model; they stay as they are."""
        if torch.device(device).type == "cpu":
            allocator.keep_freed_memory()
        self.encoder, self.decoder = (MlpStack(column, dtype, device) for column in zip(*networks))
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
                key: tensors[f"{name}.{key}"].to(stack.parameter.device, copy=True)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            stack.updated()

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
        if isinstance(objective, IntroVae | SoftIntroVae):
            return self._introspective(objective, x, draws)
        return self._vae(objective, x, draws)

    def _vae(self, objective: Vae, x: Tensor, draws: Draws) -> Terms:
        encoder, decoder = self.encoder, self.decoder
        real = _encode(encoder, x, draws.eps_real)
        image, made = decoder.forward(real.z.detach())
        image.requires_grad_()
        rec, kl_real = _error(objective, x, image).mean(1), real.kl.mean(1)
        loss = objective.beta_rec * rec + objective.beta_kl * kl_real
        [by_image] = torch.autograd.grad(loss.sum(), [image], retain_graph=True)
        by_z = decoder.backward(made, by_image, weights=True, inputs=True)
        [by_code] = torch.autograd.grad([loss.sum(), real.z], [real.code], [None, by_z])
        encoder.backward(real.taken, by_code, weights=True)
        self._update("encoder")
        self._update("decoder")
        return _detach(loss_encoder=loss, rec=rec, kl_real=kl_real, loss_decoder=objective.beta_rec * rec, rec_d=rec)

    def _introspective(self, objective: IntroVae | SoftIntroVae, x: Tensor, draws: Draws) -> Terms:
        """Of generated samples, fakes come first and reconstructions after them."""
        encoder, decoder, size = self.encoder, self.decoder, x.shape[1]
        soft = isinstance(objective, SoftIntroVae)
        scale = objective.scale if soft else 1.0

        real = _encode(encoder, x, draws.eps_real)
        images, made = decoder.forward(torch.cat([draws.z_prior, real.z.detach()], 1))
        images.requires_grad_()
        rec, kl_real = _error(objective, x, images[:, size:]).mean(1), real.kl.mean(1)
        generated = _encode(encoder, images.detach(), torch.cat([draws.eps_fake, draws.eps_rec], 1) if soft else None)
        kl_fake, kl_rec = _halves(generated.kl)
        terms = dict(rec=rec, kl_real=kl_real, kl_rec=kl_rec, kl_fake=kl_fake)
        if soft:
            again, remade = decoder.forward(generated.z.detach())
            again.requires_grad_()
            # The encoder's input is detached, the target of the error is not: through a reconstruction gradient reaches the encoder.
            error = _error(objective, images, again)
            exp_elbo = (-2 * scale * (objective.beta_rec * error + objective.beta_neg * generated.kl)).exp()
            exp_elbo_fake, exp_elbo_rec = _halves(exp_elbo)
            loss = scale * (objective.beta_rec * rec + objective.beta_kl * kl_real)
            loss = loss + 0.25 * (exp_elbo_rec + exp_elbo_fake)
            terms |= dict(exp_elbo_rec=exp_elbo_rec, exp_elbo_fake=exp_elbo_fake)
            by_images, by_again = torch.autograd.grad(loss.sum(), [images, again], retain_graph=True)
            drawn = {generated.z: decoder.backward(remade, by_again, inputs=True)}
        else:
            hinge = 0.5 * (F.relu(objective.margin - kl_rec) + F.relu(objective.margin - kl_fake))
            loss = objective.beta_rec * rec + objective.beta_kl * (kl_real + objective.beta_neg * hinge)
            [by_images] = torch.autograd.grad(loss.sum(), [images], retain_graph=True)
            drawn = {}
        drawn[real.z] = decoder.backward(made.last(size), by_images[:, size:], inputs=True)
        by_code, by_generated = torch.autograd.grad(
            [loss.sum(), *drawn], [real.code, generated.code], [None, *drawn.values()], retain_graph=True
        )
        encoder.backward(real.taken, by_code, weights=True)
        encoder.backward(generated.taken, by_generated, weights=True)
        self._update("encoder")

        seen = _encode(encoder, images.detach())
        kl_fake, kl_rec = _halves(seen.kl)
        loss_d = scale * (objective.beta_rec * rec + 0.5 * objective.beta_kl * (kl_rec + kl_fake))
        by_code, by_images = torch.autograd.grad(loss_d.sum(), [seen.code, images])
        by_images = by_images + encoder.backward(seen.taken, by_code, inputs=True)
        decoder.backward(made, by_images, weights=True)
        self._update("decoder")
        terms |= dict(loss_encoder=loss, loss_decoder=loss_d, rec_d=rec, kl_rec_d=kl_rec, kl_fake_d=kl_fake)
        return _detach(**terms)

    def _update(self, name: str) -> None:
        self.adams[name].step()
        self.stacks[name].updated()


@dataclass(frozen=True)
class _Encoded:
    """A pass of the encoder: its output as a leaf of the graph of what follows from it, draws from its posteriors, KLs [S, B]."""

    taken: Pass
    code: Tensor
    z: Tensor | None
    kl: Tensor


def _encode(encoder: MlpStack, x: Tensor, eps: Tensor | None = None) -> _Encoded:
    code, taken = encoder.forward(x)
    code.requires_grad_()
    mu, logvar = code.chunk(2, dim=2)
    z = None if eps is None else objectives.reparameterize(mu, logvar, eps)
    return _Encoded(taken, code, z, _kl(mu, logvar))


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """[S, B]"""
    return objectives.kl(mu.flatten(0, 1), logvar.flatten(0, 1)).unflatten(0, mu.shape[:2])


def _error(objective: Vae, target: Tensor, rec: Tensor) -> Tensor:
    """[S, B]"""
    return objective.rec(target.flatten(0, 1), rec.flatten(0, 1)).unflatten(0, rec.shape[:2])


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the fakes, which come first, and over the reconstructions: [S, 2B] -> two of [S]."""
    fake, rec = values.chunk(2, dim=1)
    return fake.mean(1), rec.mean(1)


def _detach(**terms: Tensor) -> Terms:
    return {name: term.detach() for name, term in terms.items()}
