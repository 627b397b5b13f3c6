"""The pictures of training: what the averaged weights make of the same images and latents each time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sivae import figures, images
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
