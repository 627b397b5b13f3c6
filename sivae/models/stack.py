"""Many fully connected networks of one shape as one: every weight is [num_models, in, out], every layer one batched product.

Source: the networks of `sivae.models.mlp`, which a stack is made of and written back to. Differs on purpose: `dtype` is that
of the hidden layers alone. The first and the last are small and carry coordinates, which bfloat16 would round to 0.008
around 1, half the width of a mode of the 8 Gaussians; they stay float32, like all weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sivae.models.mlp import MlpDecoder, MlpEncoder


@dataclass(frozen=True)
class Weights:
    """What a pass takes. `leaves` are what it is differentiated by: the first and the last layer in float32, and the hidden
    layers in the stack's dtype. `layers`: views of them, weight [S, in, out], bias [S, 1, out], and so on."""

    leaves: tuple[Tensor, Tensor]
    layers: list[Tensor]


class MlpStack:
    """The weights of `networks`, all of one class and shape, as one float32 leaf: a cast, a gradient and a step of Adam
    are then one call each, not one for each layer."""

    def __init__(self, networks: Sequence[MlpEncoder] | Sequence[MlpDecoder], dtype: torch.dtype = torch.float32):
        assert all(not network.num_classes for network in networks), "a stack takes no labels"
        assert not any(getattr(network, "sigmoid", False) for network in networks), "a stack ends linearly"
        self.dtype = dtype
        layers: list[Tensor] = []
        for column in zip(*(_linears(network) for network in networks)):
            layers.append(torch.stack([layer.weight.detach().t() for layer in column]))
            layers.append(torch.stack([layer.bias.detach() for layer in column])[:, None])
        self.shapes = [layer.shape for layer in layers]
        ends, hidden = _parted(layers)
        self.sizes = [sum(layer.numel() for layer in part) for part in (ends, hidden)]
        self.parameter = torch.cat([layer.flatten() for layer in (*ends, *hidden)]).requires_grad_()

    def weights(self, trained: bool = True) -> Weights:
        """Good until the next update, for they may share the parameter's memory."""
        ends, hidden = self.parameter.detach().split(self.sizes)
        leaves = ends.requires_grad_(trained), hidden.to(self.dtype).requires_grad_(trained)
        return Weights(leaves, self._layers(*leaves))

    @torch.no_grad()
    def write_to(self, networks: Sequence[nn.Module]) -> None:
        """The weights, back into networks of the kind that the stack was made of."""
        layers = self._layers(*self.parameter.split(self.sizes))
        for index, network in enumerate(networks):
            for layer, weight, bias in zip(_linears(network), layers[::2], layers[1::2]):
                layer.weight.copy_(weight[index].t())
                layer.bias.copy_(bias[index, 0])

    def _layers(self, ends: Tensor, hidden: Tensor) -> list[Tensor]:
        """Views in the order of the network."""
        of_ends, of_hidden = (
            [view.view(shape) for view, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes)]
            for flat, shapes in zip((ends, hidden), _parted(self.shapes))
        )
        return [*of_ends[:2], *of_hidden, *of_ends[2:]]


def forward(layers: Sequence[Tensor], x: Tensor) -> Tensor:
    """A pass of all networks: float32 [S, B, in] -> float32 [S, B, out]."""
    first, first_bias, *hidden, last, last_bias = layers
    x = torch.baddbmm(first_bias, x, first)
    x = F.relu_(x.to(hidden[0].dtype) if hidden else x)  # rounded first: fewer bytes to pass over
    for weight, bias in zip(hidden[::2], hidden[1::2]):
        x = F.relu_(torch.baddbmm(bias, x, weight))
    return _Narrow.apply(x, last, last_bias)


class _Narrow(torch.autograd.Function):
    """x @ weight + bias in float32, for few columns: as products from the left, which BLAS does several times faster."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias.mT, weight.mT, x.float().mT).mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = torch.bmm(grad, weight.mT).to(x.dtype)
        if not ctx.needs_input_grad[1]:  # frozen
            return of_x, None, None
        return of_x, torch.bmm(grad.mT, x.float()).mT, grad.sum(1, keepdim=True)


def _parted(layers: list) -> tuple[list, list]:
    """The first and the last layer, weight and bias of each; and those between."""
    return [*layers[:2], *layers[-2:]], layers[2:-2]


def _linears(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer in network.layers if isinstance(layer, nn.Linear)]
