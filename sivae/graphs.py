"""How long autograd keeps what a phase of training computes, and whether the decoder phase goes on with it.

`Graphs` is the reference: every phase computes all it needs and keeps it until its backward pass. The others compute the
same gradients to rounding; which one a run takes, `sivae.state.build_graphs` says.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Decoder = Callable[[Tensor, Tensor | None], Tensor]
Term = Callable[[Tensor], tuple[Tensor, ...]]


class Graphs:
    def generate(self, decoder: Decoder, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """An image for this phase; and one for the decoder phase, or None where that makes it again."""
        return decoder(z, labels), None

    def term(self, compute: Term, image: Tensor) -> tuple[Tensor, ...]:
        """compute(image): a scalar that becomes part of the loss, then others that are only looked at."""
        return compute(image)

    def begin_decoder_phase(self) -> None:
        """Between the two phases, when the encoder has been updated."""


PLAIN = Graphs()


class BriefGraphs(Graphs):
    """Differentiates a term as soon as it is computed, and keeps its gradient instead of its activations.

    So a phase holds the activations of one term at a time. Costs nothing but the gradients' memory. Whole parameters are
    needed, so ZeRO 3, which gathers them layer by layer, cannot have it.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        self.encoder, self.decoder = encoder, decoder

    def term(self, compute: Term, image: Tensor) -> tuple[Tensor, ...]:
        leaf = image.detach().requires_grad_(image.requires_grad)
        with torch.enable_grad():
            value, *others = compute(leaf)
        networks = (self.encoder, self.decoder)
        tensors = [leaf, *(parameter for network in networks for parameter in network.parameters())]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True)
        # Only what the term depends on: DeepSpeed would look for a gradient of the others.
        used = [(image if t is leaf else t, gradient) for t, gradient in zip(wanted, gradients) if gradient is not None]
        inputs, gradients = zip(*used) if used else ((), ())
        return _Given.apply(value.detach(), gradients, *inputs), *(other.detach() for other in others)


class SharedGraphs(BriefGraphs):
    """The decoder's images of the encoder phase serve the decoder phase too: in between only the encoder changes.

    Saves two passes of the decoder and costs the memory of two. For objectives that take the same z in both phases; the
    style family's draw anew.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__(encoder, decoder)
        self._moves: list[list[tuple[nn.BatchNorm2d, Tensor, Tensor]]] = []

    def generate(self, decoder: Decoder, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        leaf = z.detach().requires_grad_(z.requires_grad)
        norms = [module for module in self.decoder.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
        before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        self.decoder.requires_grad_(True)
        with torch.enable_grad():
            image = decoder(leaf, labels)
        self.decoder.requires_grad_(False)
        moves = []
        for norm, (mean, var) in zip(norms, before):
            # The running averages move by momentum times what the batch has.
            kept = 1 - norm.momentum
            moves.append((norm, norm.running_mean - kept * mean, norm.running_var - kept * var))
        self._moves.append(moves)
        return _Kept.apply(z, (leaf, image, self.decoder)), image

    @torch.no_grad()
    def begin_decoder_phase(self) -> None:
        """BatchNorm's running averages count, as published, also the passes that the decoder phase does not make."""
        for norm, mean, var in (move for moves in self._moves for move in moves):
            # By `data`, as in BatchNorm's own pass: autograd holds on to the averages, but takes nothing from them.
            norm.running_mean.data.mul_(1 - norm.momentum).add_(mean)
            norm.running_var.data.mul_(1 - norm.momentum).add_(var)
            norm.num_batches_tracked += 1
        self._moves = []


class _Given(torch.autograd.Function):
    """A value whose gradients by its inputs are known."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, gradient)
        return None, None, *gradients


class _Kept(torch.autograd.Function):
    """An image computed from a leaf equal to z, as a function of z; its graph lives on after the backward pass."""

    @staticmethod
    def forward(ctx, z: Tensor, computed: tuple[Tensor, Tensor, nn.Module]) -> Tensor:
        ctx.leaf, ctx.image, ctx.decoder = computed
        return ctx.image.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        # By z alone: the decoder's weights get nothing in this phase. What is computed again here must be as it was the first
        # time, so they are free meanwhile.
        ctx.decoder.requires_grad_(True)
        found = torch.autograd.grad(ctx.image, ctx.leaf, gradient, retain_graph=True)
        ctx.decoder.requires_grad_(False)
        return *found, None
