"""Many fully connected networks of one shape as one: every weight is [num_models, in, out], every layer one batched product.

Source: the networks of `sivae.models.mlp`, which a stack is made of and written back to. Differs on purpose: `dtype` is that
of the hidden layers alone. The first and the last are small and carry coordinates, which bfloat16 would round to 0.008
around 1, half the width of a mode of the 8 Gaussians; they stay float32, like all weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sivae.models.mlp import MlpDecoder, MlpEncoder


class MlpStack:
    """The weights of `networks`, all of one class and shape, as float32 leaves: weight [S, in, out], bias [S, 1, out], ..."""

    def __init__(self, networks: Sequence[MlpEncoder] | Sequence[MlpDecoder], dtype: torch.dtype = torch.float32):
        assert all(not network.num_classes for network in networks), "a stack takes no labels"
        assert not any(getattr(network, "sigmoid", False) for network in networks), "a stack ends linearly"
        self.dtype = dtype
        self.parameters: list[Tensor] = []
        for layers in zip(*(_linears(network) for network in networks)):
            self.parameters += [
                torch.stack([layer.weight.detach().t() for layer in layers]).contiguous(),
                torch.stack([layer.bias.detach() for layer in layers])[:, None].contiguous(),
            ]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def weights(self) -> list[Tensor]:
        """What a pass takes and is differentiated by: leaves of their own, those of the hidden layers in `dtype`. They share
        the parameters' memory where the type is the same, so they are good until the next update."""
        last = len(self.parameters) - 2
        return [
            parameter.detach().to(self.dtype if 2 <= index < last else torch.float32).requires_grad_()
            for index, parameter in enumerate(self.parameters)
        ]

    @torch.no_grad()
    def write_to(self, networks: Sequence[nn.Module]) -> None:
        """The weights, back into networks of the kind that the stack was made of."""
        for index, network in enumerate(networks):
            for layer, weight, bias in zip(_linears(network), self.parameters[::2], self.parameters[1::2]):
                layer.weight.copy_(weight[index].t())
                layer.bias.copy_(bias[index, 0])


def forward(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """A pass of all networks: float32 [S, B, in] -> float32 [S, B, out]."""
    first, first_bias, *hidden, last, last_bias = weights
    x = torch.baddbmm(first_bias, x, first)
    x = F.relu_(x.to(hidden[0].dtype) if hidden else x)  # rounded first: fewer bytes to pass over
    for weight, bias in zip(hidden[::2], hidden[1::2]):
        x = F.relu_(torch.baddbmm(bias, x, weight))
    return torch.baddbmm(last_bias, x.float(), last)


def _linears(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer in network.layers if isinstance(layer, nn.Linear)]
