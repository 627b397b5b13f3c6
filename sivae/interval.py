"""What is told of the steps between two log lines, and the watch over the KL gap."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from sivae.distributed import Group

GAP_PATIENCE = 10  # log lines in a row with a negative KL gap before the warning
_SECTIONS = {"loss": "loss", "grad": "optimizer"}


class Interval:
    """Sums that stay on the device. `data_wait_sec` and `paused_sec` are counted by who waits."""

    def __init__(self, images_seen: int):
        self.images_seen, self.steps = images_seen, 0
        self.data_wait_sec = self.paused_sec = 0.0
        self._start_sec = time.monotonic()
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        """The terms of one step, scalars on the device."""
        for name, term in terms.items():
            total, steps = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + term, steps + 1
        self.steps += 1

    def means(self, group: Group) -> dict[str, float]:
        """Of each term, over the steps that had it and the ranks. A collective, and the only place where the host reads losses."""
        names = sorted(self._sums)
        means = torch.stack([self._sums[name][0].float() / self._sums[name][1] for name in names])
        terms = dict(zip(names, group.mean(means).tolist()))
        if "kl_fake" in terms:
            terms["kl_gap"] = terms["kl_fake"] - terms["kl_real"]
        return terms

    def speed(self, images_seen: int) -> dict[str, float]:
        """Of training: what it was paused for does not count."""
        elapsed = max(time.monotonic() - self._start_sec - self.paused_sec, 1e-9)
        return {
            "speed/images_per_sec": (images_seen - self.images_seen) / elapsed,
            "speed/data_wait_fraction": self.data_wait_sec / elapsed,
        }


def by_section(terms: dict[str, float]) -> dict[str, float]:
    """Terms under the names of metrics.jsonl and TensorBoard."""
    return {f"{_SECTIONS.get(name.partition('_')[0], 'terms')}/{name}": value for name, value in terms.items()}


class GapWatch:
    """A KL gap that stays negative: the encoder rates generated images as likelier than real ones."""

    def __init__(self):
        self.num_negative = 0

    def note(self, gap: float) -> str | None:
        """Of one log line; returns a warning once, when it is due."""
        self.num_negative = self.num_negative + 1 if gap < 0 else 0
        if self.num_negative != GAP_PATIENCE:
            return None
        return (
            f"the KL of generated images has been below that of real ones for {GAP_PATIENCE} log lines (now {gap:.3g}),"
            " so samples no longer improve; published advice: lower objective.beta_neg"
        )
