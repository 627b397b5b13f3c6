"""Fully connected encoder and decoder: points in the plane, small images, tests.

Source: Daniel and Tamar, Soft-IntroVAE (arXiv 2012.13253), 2D models: an input layer, `num_layers` hidden layers,
ReLU after each, a linear output.
"""

import math

from torch import Tensor, nn

from sivae.models.conv import append_labels


def make_layers(size_in: int, num_hidden: int, num_layers: int, size_out: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(size_in, num_hidden), nn.ReLU()]
    for _ in range(num_layers):
        layers += [nn.Linear(num_hidden, num_hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(num_hidden, size_out))


class MlpEncoder(nn.Module):
    def __init__(
        self, sample_shape: list[int], latent_dim: int, num_hidden: int, num_layers: int,
        num_classes: int = 0, output: str = "linear",
    ):  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        self.layers = make_layers(math.prod(sample_shape) + num_classes, num_hidden, num_layers, 2 * latent_dim)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples [B, *sample_shape], labels int64 [B] -> mu, logvar, each [B, latent_dim]."""
        mu, logvar = self.layers(append_labels(x.flatten(1), labels, self.num_classes)).chunk(2, dim=1)
        return mu, logvar


class MlpDecoder(nn.Module):
    def __init__(
        self, sample_shape: list[int], latent_dim: int, num_hidden: int, num_layers: int,
        num_classes: int = 0, output: str = "linear",
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.sample_shape, self.sigmoid = num_classes, tuple(sample_shape), output == "sigmoid"
        self.layers = make_layers(latent_dim + num_classes, num_hidden, num_layers, math.prod(sample_shape))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z [B, latent_dim], labels int64 [B] -> samples [B, *sample_shape]."""
        x = self.layers(append_labels(z, labels, self.num_classes)).unflatten(1, self.sample_shape)
        return x.sigmoid() if self.sigmoid else x
