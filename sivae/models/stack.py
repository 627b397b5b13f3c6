"""Many fully connected networks of one shape as one: every weight is [num_models, in, out], every layer one batched product.

Source: the networks of `sivae.models.mlp`, which a stack is made of and written back to. Differs on purpose: `dtype` is that
of the hidden layers alone. The first and the last are small and carry coordinates, which bfloat16 would round to 0.008
around 1, half the width of a mode of the 8 Gaussians; they stay float32, like all weights.

Passes are differentiated here and not by autograd: a forward pass keeps what it went through, and a backward pass makes the
gradient by the input, or by the weights, or both. That saves autograd's books, which for networks this small show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sivae.models.mlp import MlpDecoder, MlpEncoder


@dataclass(frozen=True)
class Pass:
    """What a forward pass keeps: the input [S, B, in] and what each ReLU gave [S, B, hidden]."""

    x: Tensor
    activations: list[Tensor]

    def last(self, count: int) -> Pass:
        """Of the last so many samples."""
        return Pass(self.x[:, -count:], [kept[:, -count:] for kept in self.activations])


class MlpStack:
    """The weights of `networks`, all of one class and shape, as one float32 `parameter`: a cast and a step of Adam are then one
    call each, not one for each layer. `backward` adds to its `grad`, whose memory stays the same."""

    def __init__(
        self, networks: Sequence[MlpEncoder] | Sequence[MlpDecoder], dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        assert all(not network.num_classes for network in networks), "a stack takes no labels"
        assert not any(getattr(network, "sigmoid", False) for network in networks), "a stack ends linearly"
        layers: list[Tensor] = []
        for column in zip(*(_linears(network) for network in networks)):
            layers.append(torch.stack([layer.weight.detach().t() for layer in column]))
            layers.append(torch.stack([layer.bias.detach() for layer in column])[:, None])
        self._shapes = [layer.shape for layer in layers]
        ends, hidden = _parted(layers)
        self._sizes = [sum(layer.numel() for layer in part) for part in (ends, hidden)]
        flat = torch.cat([layer.flatten() for layer in (*ends, *hidden)]).to(device)
        self.parameter = nn.Parameter(flat)
        self.parameter.grad = torch.zeros_like(flat)
        self.dtype = dtype if hidden else torch.float32
        of_ends, self._hidden = self.parameter.detach().split(self._sizes)
        self._hidden_rounded = self._hidden.to(self.dtype)  # the same memory where both are float32
        self._layers = self._views(of_ends, self._hidden_rounded)
        self._gradients = self._views(*self.parameter.grad.split(self._sizes))

    def updated(self) -> None:
        """To be called when `parameter` has changed: rounds it anew and clears its gradient."""
        self._hidden_rounded.copy_(self._hidden)
        self.parameter.grad.zero_()

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Pass]:
        """A pass of all networks: float32 [S, B, in] -> float32 [S, B, out], and what `backward` takes."""
        first, first_bias, *hidden, last, last_bias = self._layers
        activations = [F.relu_(torch.baddbmm(first_bias, x, first)).to(self.dtype)]
        for weight, bias in zip(hidden[::2], hidden[1::2]):
            activations.append(F.relu_(torch.baddbmm(bias, activations[-1], weight)))
        # Few columns: as a product from the left, which BLAS does several times faster.
        out = torch.baddbmm(last_bias.mT, last.mT, activations[-1].float().mT).mT.contiguous()
        return out, Pass(x, activations)

    @torch.no_grad()
    def backward(self, taken: Pass, grad: Tensor, *, weights: bool = False, inputs: bool = False) -> Tensor | None:
        """From the gradient by the output of a pass, [S, B, out]: that by the weights is added to `parameter.grad`, that by the
        inputs, [S, B, in], is returned."""
        before = [taken.x, *taken.activations]
        for layer, by_output in enumerate(self._by_outputs(grad, taken.activations), 1):
            if weights:
                ends = layer in (1, len(before))
                kept, by_output = (before[-layer].float(), by_output.float()) if ends else (before[-layer], by_output)
                self._gradients[-2 * layer].add_(torch.bmm(kept.mT, by_output))
                self._gradients[1 - 2 * layer].add_(by_output.sum(1, keepdim=True))
        return torch.bmm(by_output.float(), self._layers[0].mT) if inputs else None

    def _by_outputs(self, grad: Tensor, activations: list[Tensor]) -> Iterator[Tensor]:
        """The gradients by the outputs of the layers, from the last to the first."""
        yield grad
        for after, weight in zip(reversed(activations), self._layers[-2:0:-2]):
            grad = torch.bmm(grad, weight.mT).to(self.dtype)
            # That of ReLU, in place. A bfloat16 is above 0 where its bits are as an integer, which is four times faster to tell; but
            # a NaN may count as not above: its gradient is 0 then, and the losses show it.
            bits, above = (value.view(torch.int16) if value.itemsize == 2 else value for value in (grad, after))
            torch.ops.aten.threshold_backward.grad_input(bits, above, 0, grad_input=bits)
            yield grad

    @torch.no_grad()
    def write_to(self, networks: Sequence[nn.Module]) -> None:
        """The weights, back into networks of the kind that the stack was made of."""
        layers = self._views(*self.parameter.split(self._sizes))
        for index, network in enumerate(networks):
            for layer, weight, bias in zip(_linears(network), layers[::2], layers[1::2]):
                layer.weight.copy_(weight[index].t())
                layer.bias.copy_(bias[index, 0])

    def _views(self, ends: Tensor, hidden: Tensor) -> list[Tensor]:
        """Of flat tensors, in the order of the network: weight [S, in, out], bias [S, 1, out], and so on."""
        of_ends, of_hidden = (
            [view.view(shape) for view, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes)]
            for flat, shapes in zip((ends, hidden), _parted(self._shapes))
        )
        return [*of_ends[:2], *of_hidden, *of_ends[2:]]


def _parted(layers: list) -> tuple[list, list]:
    """The first and the last layer, weight and bias of each; and those between."""
    return [*layers[:2], *layers[-2:]], layers[2:-2]


def _linears(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer in network.layers if isinstance(layer, nn.Linear)]
