"""One training step: two phases, each one engine call per accumulation pass, and the watch over its losses.

Order (Soft-IntroVAE, algorithm 1): encoder phase over all passes, encoder step; decoder phase over all passes against
the updated encoder, decoder step; then the running averages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sivae.augment import Augmented
from sivae.distributed import Group
from sivae.engines import Engine, freeze
from sivae.graphs import PLAIN, Graphs
from sivae.models.style import average_styles
from sivae.objectives import Draws, Phase, Vae
from sivae.profiling import span


@dataclass(frozen=True)
class NonFinite:
    """The first step whose loss was not finite: its terms by name, and the images seen before it."""

    terms: list[str]
    images_seen: int


class FiniteGate:
    """Holds back optimizer steps from the first non-finite loss of any rank on, without asking the host.

    `found_inf` is the flag that fused Adam obeys. The host looks with `read`, when it logs or saves.
    """

    def __init__(self, group: Group):
        self.group = group
        self.found_inf = torch.zeros((), device=group.device)
        self._images = torch.zeros((), dtype=torch.int64, device=group.device)
        self._terms: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def watch(self, terms: dict[str, Tensor]) -> None:
        """Note the terms of one pass; takes effect in `agree`."""
        for name, term in terms.items():
            bad = (~term.isfinite()).float()
            self._pending[name] = torch.maximum(self._pending[name], bad) if name in self._pending else bad

    def agree(self, images_seen: int) -> None:
        """Before an optimizer step: what is bad on one rank is bad on all."""
        names = list(self._pending)
        bad = self.group.max(torch.stack([self._pending[name] for name in names]))
        first = 1 - self.found_inf
        for name, flag in zip(names, bad):
            self._terms[name] = self._terms.get(name, torch.zeros_like(flag)) + flag * first
        found = bad.amax()
        self._images += (found * first).long() * images_seen
        self.found_inf.copy_(torch.maximum(self.found_inf, found))
        self._pending = {}

    def read(self) -> NonFinite | None:
        """Ask the device. Waits for it."""
        if not self.found_inf.item():
            return None
        names = [name for name, flag in self._terms.items() if flag.item()]
        # A term spoils its loss, and a loss its gradient: named is what nothing else explains.
        for spoilt in ("grad_norm_", "loss_"):
            names = [name for name in names if not name.startswith(spoilt)] or names
        return NonFinite(names, int(self._images.item()))

    def clear(self) -> None:
        self.found_inf.zero_()
        self._images.zero_()
        self._terms = {}


@dataclass(frozen=True)
class Pass:
    """One accumulation pass of a rank: images in the family's range, labels, draws, and its share of the step.

    `weight` is its number of images over the mean of all passes of all ranks, so that every image counts the same.
    """

    x: Tensor
    labels: Tensor | None
    draws: Draws
    weight: float = 1.0

    def weigh(self, phase: Phase) -> Phase:
        if self.weight == 1:
            return phase
        terms = {name: self.weight * term for name, term in phase.terms.items()}
        return replace(phase, loss=self.weight * phase.loss, terms=terms)


def train_step(
    encoder: Engine, decoder: Engine, target_decoder: nn.Module | None, objective: Vae | Augmented, passes: list[Pass], gate: FiniteGate,
    images_seen: int, lr_encoder: float, lr_decoder: float, ema_decay: float, stage: dict[str, Any] | None = None,
    graphs: Graphs = PLAIN,
) -> dict[str, Tensor]:  # fmt: skip
    """Train both networks on one global batch. Returns this rank's terms, averaged over the passes, on the device.

    `stage` is handed to every call of a network: level and blend of the style family. `graphs` changes what is kept in memory
    and computed twice, and the results by rounding.
    """
    sums: dict[str, Tensor] = {}
    networks = [encoder.network, decoder.network, target_decoder]
    if stage:
        networks = [network and partial(network, **stage) for network in networks]
    encode, decode, decode_target = networks
    weights = [item.weight for item in passes]

    def note(terms: dict[str, Tensor]) -> None:
        gate.watch(terms)
        for name, term in terms.items():
            sums[name] = sums[name] + term if name in sums else term

    freeze(trained=encoder.network, frozen=decoder.network, stage=stage)
    made = []  # by the encoder phase for the decoder phase
    with span("encoder phase"), average_styles(decoder.network, weights, gate.group.mean):
        for index, item in enumerate(passes):
            phase = encoder.phase(
                lambda: item.weigh(
                    objective.encoder_phase(encode, decode, item.x, item.draws, item.labels, decode_target, graphs)
                )
            )
            note(phase.terms)
            made.append((phase.z, phase.images))
            del phase  # and with it, unless they are shared, the graphs
            _step(encoder, lr_encoder, gate, "grad_norm_encoder", images_seen, last=index == len(passes) - 1)

    graphs.begin_decoder_phase()
    freeze(trained=decoder.network, frozen=encoder.network, stage=stage)
    with span("decoder phase"), average_styles(decoder.network, weights, gate.group.mean):
        for index, item in enumerate(passes):
            z, images = made.pop(0)
            phase = decoder.phase(
                lambda: item.weigh(
                    objective.decoder_phase(
                        encode, decode, item.x, z, item.draws, item.labels, decode_target, graphs, images
                    )
                )
            )
            note(phase.terms)
            _step(decoder, lr_decoder, gate, "grad_norm_decoder", images_seen, last=index == len(passes) - 1)

    encoder.update_average(ema_decay)
    decoder.update_average(ema_decay)
    norms = {"grad_norm_encoder": encoder.grad_norm, "grad_norm_decoder": decoder.grad_norm}
    return {name: total / len(passes) for name, total in sums.items()} | norms


@span("optimizer")
def _step(engine: Engine, lr: float, gate: FiniteGate, name: str, images_seen: int, last: bool) -> None:
    """Step behind the gate. A loss can be finite and its gradient not: at stage 0 the gate looks at the norm before the step;
    under ZeRO DeepSpeed leaves such a step out by itself, and the gate closes after it."""
    if last:
        norm = engine.gradient_norm()
        if norm is not None:
            gate.watch({name: norm})
        gate.agree(images_seen)
    engine.step(lr)
    if last and norm is None:
        gate.watch({name: engine.grad_norm})
        gate.agree(images_seen)
