"""The published Soft-IntroVAE step as a yardstick: the same operations, in the same order, as its authors' code runs them.

Sources: the image and 2D code of the Soft-IntroVAE repository (Daniel and Tamar, arXiv 2012.13253): float32, BatchNorm, one
torch Adam per network, every gradient of the frozen network switched off, images generated anew for each phase, `gamma_r`
1e-8 (so generated images are reconstructed in the decoder phase too), and the numbers of its progress bar read after every
step. Written anew, not copied; that it computes the same is shown on numbers which that code left behind
(tests/numerics/test_published_step.py). Parameters have the published names, so `sivae.models.published` reads them.

Nothing here is meant to be fast, or to be used for anything but comparison.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

SLOPE = 0.2


class Residual(nn.Module):
    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.conv_expand = nn.Conv2d(width_in, width_out, 1, bias=False) if width_in != width_out else None
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        beside = x if self.conv_expand is None else self.conv_expand(x)
        y = F.leaky_relu(self.bn1(self.conv1(x)), SLOPE, inplace=True)
        return F.leaky_relu(self.bn2(self.conv2(y)) + beside, SLOPE, inplace=True)


class ConvEncoder(nn.Module):
    """Images [B, C, H, W] -> mu, logvar, each [B, latent_dim]."""

    def __init__(self, num_channels: int, resolution: int, channels: Sequence[int], latent_dim: int):
        super().__init__()
        layers = [nn.Conv2d(num_channels, channels[0], 5, padding=2, bias=False), nn.BatchNorm2d(channels[0])]
        self.main = nn.Sequential(*layers, nn.LeakyReLU(SLOPE), nn.AvgPool2d(2))
        size = resolution // 2
        for width_in, width_out in zip(channels, channels[1:]):
            self.main.add_module(f"res_in_{size}", Residual(width_in, width_out))
            self.main.add_module(f"down_to_{size // 2}", nn.AvgPool2d(2))
            size //= 2
        self.main.add_module(f"res_in_{size}", Residual(channels[-1], channels[-1]))
        self.shape = (channels[-1], size, size)
        self.fc = nn.Linear(channels[-1] * size**2, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.fc(self.main(x).flatten(1)).chunk(2, dim=1)
        return mu, logvar


class ConvDecoder(nn.Module):
    """z [B, latent_dim] -> images [B, C, H, W]."""

    def __init__(self, num_channels: int, resolution: int, channels: Sequence[int], latent_dim: int):
        super().__init__()
        side = resolution // 2 ** len(channels)
        self.shape = (channels[-1], side, side)
        self.fc = nn.Sequential(nn.Linear(latent_dim, channels[-1] * side**2), nn.ReLU(inplace=True))
        self.main, size = nn.Sequential(), 4
        widths = [channels[-1], *channels[::-1]]
        for width_in, width_out in zip(widths, widths[1:]):
            self.main.add_module(f"res_in_{size}", Residual(width_in, width_out))
            self.main.add_module(f"up_to_{2 * size}", nn.Upsample(scale_factor=2, mode="nearest"))
            size *= 2
        self.main.add_module(f"res_in_{size}", Residual(channels[0], channels[0]))
        self.main.add_module("predict", nn.Conv2d(channels[0], num_channels, 5, padding=2))

    def forward(self, z: Tensor) -> Tensor:
        return self.main(self.fc(z).unflatten(1, self.shape))


def linear_layers(size_in: int, num_hidden: int, num_layers: int, size_out: int) -> nn.Sequential:
    layers = nn.Sequential()
    layers.add_module("input", nn.Linear(size_in, num_hidden))
    layers.add_module("act0", nn.ReLU(inplace=True))
    for number in range(1, num_layers + 1):
        layers.add_module(f"hidden_{number}", nn.Linear(num_hidden, num_hidden))
        layers.add_module(f"act_{number}", nn.ReLU(inplace=True))
    layers.add_module("output", nn.Linear(num_hidden, size_out))
    return layers


class PointEncoder(nn.Module):
    """Points [B, dim] -> mu, logvar, each [B, latent_dim]."""

    def __init__(self, dim: int, latent_dim: int, num_hidden: int, num_layers: int):
        super().__init__()
        self.main = linear_layers(dim, num_hidden, num_layers, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.main(x).chunk(2, dim=1)
        return mu, logvar


class PointDecoder(nn.Module):
    """z [B, latent_dim] -> points [B, dim]."""

    def __init__(self, dim: int, latent_dim: int, num_hidden: int, num_layers: int):
        super().__init__()
        self.main = linear_layers(latent_dim, num_hidden, num_layers, dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


def divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - logvar.exp() - mu.pow(2)).sum(1)


def error(target: Tensor, image: Tensor) -> Tensor:
    return F.mse_loss(image.flatten(1), target.flatten(1), reduction="none").sum(1)


@dataclass
class PublishedStep:
    """Both networks, their optimizers and the betas. `randn` makes a draw of a tensor's shape, in the published order.

    `observes_mean`: the 2D code also reconstructs from mu in the encoder phase, only to look at it; and it looks at its
    numbers not after every step, but now and then, as nothing here does.
    """

    encoder: nn.Module
    decoder: nn.Module
    latent_dim: int
    scale: float
    beta_rec: float
    beta_kl: float
    beta_neg: float
    gamma_r: float = 1e-8
    lr: float = 2e-4
    observes_mean: bool = False
    randn: Callable[[Tensor], Tensor] = torch.randn_like

    def __post_init__(self):
        self.optimizer_e = torch.optim.Adam(self.encoder.parameters(), lr=self.lr)
        self.optimizer_d = torch.optim.Adam(self.decoder.parameters(), lr=self.lr)
        self.bar = tqdm(file=io.StringIO())

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        return mu + self.randn(std) * std

    def auto_encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x)
        return mu, logvar, self.decoder(self.reparameterize(mu, logvar))

    def __call__(self, real: Tensor) -> dict[str, Tensor]:
        """Train on real samples. Returns both losses and their terms, batch means, detached."""
        noise = self.randn(real.new_empty(len(real), self.latent_dim))

        self.encoder.requires_grad_(True)
        self.decoder.requires_grad_(False)
        fake = self.decoder(noise)
        mu, logvar = self.encoder(real)
        z = self.reparameterize(mu, logvar)
        rec = self.decoder(z)
        if self.observes_mean:
            error(real, self.decoder(self.encoder(real)[0]).detach()).mean()
        loss_rec, kl_real = error(real, rec).mean(), divergence(mu, logvar).mean()
        mu_rec, logvar_rec, rec_rec = self.auto_encode(rec.detach())
        mu_fake, logvar_fake, rec_fake = self.auto_encode(fake.detach())
        exp_elbo_rec, exp_elbo_fake = (
            (-2 * self.scale * (self.beta_rec * error(image, again) + self.beta_neg * divergence(*latent))).exp().mean()
            for image, again, latent in ((rec, rec_rec, (mu_rec, logvar_rec)), (fake, rec_fake, (mu_fake, logvar_fake)))
        )
        loss_e = self.scale * (self.beta_rec * loss_rec + self.beta_kl * kl_real)
        loss_e = loss_e + 0.25 * (exp_elbo_rec + exp_elbo_fake)
        self.optimizer_e.zero_grad()
        loss_e.backward()
        self.optimizer_e.step()

        self.encoder.requires_grad_(False)
        self.decoder.requires_grad_(True)
        fake = self.decoder(noise)
        rec = self.decoder(z.detach())
        loss_rec = error(real, rec).mean()
        mu_rec, logvar_rec = self.encoder(rec)
        z_rec = self.reparameterize(mu_rec, logvar_rec)
        mu_fake, logvar_fake = self.encoder(fake)
        z_fake = self.reparameterize(mu_fake, logvar_fake)
        rec_rec, rec_fake = self.decoder(z_rec.detach()), self.decoder(z_fake.detach())
        again = error(rec.detach(), rec_rec).mean() + error(fake.detach(), rec_fake).mean()
        kl_rec, kl_fake = divergence(mu_rec, logvar_rec).mean(), divergence(mu_fake, logvar_fake).mean()
        loss_d = self.scale * (
            self.beta_rec * loss_rec
            + 0.5 * self.beta_kl * (kl_rec + kl_fake)
            + 0.5 * self.gamma_r * self.beta_rec * again
        )
        self.optimizer_d.zero_grad()
        loss_d.backward()
        self.optimizer_d.step()

        terms = {
            "loss_encoder": loss_e, "loss_decoder": loss_d, "kl_real": kl_real, "exp_elbo_rec": exp_elbo_rec,
            "exp_elbo_fake": exp_elbo_fake, "rec_d": loss_rec, "kl_rec_d": kl_rec, "kl_fake_d": kl_fake,
        }  # fmt: skip
        if torch.isnan(loss_d) or torch.isnan(loss_e):
            raise RuntimeError("a loss is NaN")
        if not self.observes_mean:
            self._tell(terms)
        return {name: term.detach() for name, term in terms.items()}

    def _tell(self, terms: dict[str, Tensor]) -> None:
        """Each of these is a wait for the device: five for the bar, eight for the means of the epoch."""

        def read(name: str) -> Tensor:
            return terms[name].detach().cpu()

        difference = read("kl_fake_d") - read("kl_real")
        values = {name: read(name).item() for name in ("rec_d", "kl_real", "exp_elbo_fake")}
        self.bar.set_postfix(values | {"diff_kl": difference.item()})
        for name in (
            "kl_real",
            "kl_fake_d",
            "kl_real",
            "kl_fake_d",
            "kl_rec_d",
            "rec_d",
            "exp_elbo_fake",
            "exp_elbo_rec",
        ):
            read(name).item()
