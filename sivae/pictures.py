"""The pictures of training: what the averaged weights make of the same images and latents each time.

All ranks make them together, each its share of every batch, so that none waits while another draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sivae import figures, images
from sivae.distributed import Group
from sivae.figures import Figure
from sivae.inference import Model
from sivae.tracking import Tracker


@dataclass(frozen=True)
class Pictures:
    """All on the CPU, so that they can be written while training goes on.

    panels: by title, uint8 [B, C, H, W]; figures by name; mu and logvar [B, latent_dim] float32.
    """

    panels: dict[str, Tensor]
    figures: dict[str, Figure]
    mu: Tensor
    logvar: Tensor

    def write(self, tracker: Tracker, images_seen: int) -> None:
        """Draw and encode them: PNG files and TensorBoard."""
        for name, figure in self.figures.items():
            tracker.picture(name, images.table(figure.tiles, figure.rows, figure.columns), images_seen)
        tracker.histogram("latent/mu", self.mu, images_seen)
        tracker.histogram("latent/logvar", self.logvar, images_seen)
        tracker.picture("samples", images.panels(self.panels, columns=min(16, len(self.mu))), images_seen)


class Shared(nn.Module):
    """A network that every rank holds and calls with the same batch [B, ...]. Each computes ceil(B / ranks) rows of it and gets all."""

    def __init__(self, network: nn.Module, group: Group):
        super().__init__()
        self.network, self.group = network, group

    def forward(self, batch: Tensor, labels: Tensor | None, **extra) -> Tensor | tuple[Tensor, ...]:
        size = -(-len(batch) // self.group.world_size)
        # Where rows run out a rank computes the last one again: all shares are of one size.
        rows = torch.arange(size, device=batch.device).add(self.group.rank * size).clamp(max=len(batch) - 1)
        found = self.network(batch[rows], None if labels is None else labels[rows], **extra)
        if isinstance(found, Tensor):
            return self._whole(found, len(batch))
        return tuple(self._whole(part, len(batch)) for part in found)

    def _whole(self, share: Tensor, count: int) -> Tensor:
        whole = share.new_empty(len(share) * self.group.world_size, *share.shape[1:])
        dist.all_gather_into_tensor(whole, share.contiguous())
        return whole[:count]


def share(model: Model, group: Group) -> None:
    """From here on the ranks make each batch of this model together; all call it alike."""
    if group.world_size > 1:
        model.encoder, model.decoder = Shared(model.encoder, group), Shared(model.decoder, group)


def make(model: Model, real: Tensor, labels: Tensor | None, seed: int) -> Pictures:
    """Real images, float [B, C, H, W] in the family's range on the model's device, over their reconstructions and samples."""
    mu, logvar = model.encode(real, labels)
    panels = {
        "real": model.to_uint8(real).cpu(),
        "reconstructed": model.to_uint8(model.decode(mu, labels)).cpu(),
        "sampled": model.to_uint8(model.sample(len(mu), seed=seed)).cpu(),
    }
    drawn = figures.of_training(model, panels["real"], labels, seed)
    return Pictures(panels, drawn, mu.float().cpu(), logvar.float().cpu())
