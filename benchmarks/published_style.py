"""The published style Soft-IntroVAE step at its last level as a yardstick: the same operations in the same order.

Source: the style code of the Soft-IntroVAE repository, after ALAE (see `sivae.models.style`): float32; blur as a convolution of
each channel by itself, enlarging by repetition, statistics by means of squares, kernels for both sizes summed anew in every
call; an Adam that goes from parameter to parameter and knows each one's learning-rate factor; a running average that does so
too; images that require gradients; and losses copied to the host after every phase. Written anew, not copied, and held
to numbers which that code left behind (tests/numerics/test_published_step.py). Parameters have the published names.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published import SLOPE, divergence, error

FUSED_PIXELS = 128


class Linear(nn.Module):
    """Weights are what they multiply by; `coefficients` of the learning rate belong to weight and bias."""

    def __init__(self, size_in: int, size_out: int, gain: float = math.sqrt(2), lr_factor: float = 1.0):
        super().__init__()
        self.coefficients = {"weight": gain / math.sqrt(size_in) * lr_factor, "bias": lr_factor}
        self.weight = nn.Parameter(torch.randn(size_out, size_in) * gain / math.sqrt(size_in))
        self.bias = nn.Parameter(torch.zeros(size_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv(nn.Module):
    def __init__(self, width_in: int, width_out: int, size: int, gain: float = math.sqrt(2), bias=False, resize=None):
        super().__init__()
        std = gain / math.sqrt(width_in * size**2)
        self.coefficients = {"weight": std, "bias": 1.0}
        self.padding, self.resize = size // 2, resize
        widths = (width_in, width_out) if resize == "up" else (width_out, width_in)
        self.weight = nn.Parameter(torch.randn(*widths, size, size) * std)
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.resize is None:
            return F.conv2d(x, self.weight, self.bias, padding=self.padding)
        wide = F.pad(self.weight, (1, 1, 1, 1))
        summed = wide[:, :, 1:, 1:] + wide[:, :, :-1, 1:] + wide[:, :, 1:, :-1] + wide[:, :, :-1, :-1]
        if self.resize == "up":
            return F.conv_transpose2d(x, summed, self.bias, stride=2, padding=self.padding)
        return F.conv2d(x, summed * 0.25, self.bias, stride=2, padding=self.padding)


class Blur(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("weight", (line[:, None] * line).expand(width, 1, 3, 3).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, groups=len(self.weight), padding=1)


def statistics(x: Tensor) -> Tensor:
    mean = x.mean(dim=[2, 3], keepdim=True)
    std = torch.sqrt(((x - mean) ** 2).mean(dim=[2, 3], keepdim=True))
    return torch.cat((mean, std), dim=1).flatten(1)


def bias(width: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, width, 1, 1))


class EncodeBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, latent_dim: int, fused: bool):
        super().__init__()
        self.fused = fused
        self.conv_1, self.bias_1 = Conv(width_in, width_in, 3), bias(width_in)
        self.blur = Blur(width_in)
        self.conv_2 = Conv(width_in, width_out, 3, resize="down" if fused else None)
        self.bias_2 = bias(width_out)
        self.style_1, self.style_2 = Linear(2 * width_in, latent_dim), Linear(2 * width_out, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.leaky_relu(self.conv_1(x) + self.bias_1, SLOPE)
        first = statistics(x)
        x = self.conv_2(self.blur(F.instance_norm(x)))
        x = x if self.fused else F.avg_pool2d(x, 2, 2)
        x = F.leaky_relu(x + self.bias_2, SLOPE)
        second = statistics(x)
        return F.instance_norm(x), self.style_1(first), self.style_2(second)


class DecodeBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, latent_dim: int, first: bool, fused: bool):
        super().__init__()
        self.first, self.fused = first, fused
        if not first:
            self.conv_1 = Conv(width_in, width_out, 3, resize="up" if fused else None)
        self.blur = Blur(width_out)
        self.noise_weight_1, self.bias_1 = bias(width_out), bias(width_out)
        self.style_1 = Linear(latent_dim, 2 * width_out, gain=1)
        self.conv_2 = Conv(width_out, width_out, 3)
        self.noise_weight_2, self.bias_2 = bias(width_out), bias(width_out)
        self.style_2 = Linear(latent_dim, 2 * width_out, gain=1)

    def forward(self, x: Tensor, style_1: Tensor, style_2: Tensor) -> Tensor:
        if not self.first:
            if not self.fused:
                count, width, height, _ = x.shape
                x = x.reshape(-1, width, height, 1, height, 1).repeat(1, 1, 1, 2, 1, 2)
                x = x.reshape(count, width, 2 * height, 2 * height)
            x = self.blur(self.conv_1(x))
        x = self._finish(x, self.noise_weight_1, self.bias_1, self.style_1(style_1))
        return self._finish(self.conv_2(x), self.noise_weight_2, self.bias_2, self.style_2(style_2))

    def _finish(self, x: Tensor, noise_weight: Tensor, shift: Tensor, style: Tensor) -> Tensor:
        noise = torch.randn(len(x), 1, *x.shape[2:], device=x.device)
        x = F.leaky_relu(torch.addcmul(x, noise_weight, noise) + shift, SLOPE)
        x = F.instance_norm(x, eps=1e-8)
        style = style.view(len(style), 2, x.shape[1], 1, 1)
        return torch.addcmul(style[:, 1], x, style[:, 0] + 1)


class Rgb(nn.Module):
    """The convolution to or from colours, under its published name."""

    def __init__(self, name: str, width_in: int, width_out: int, gain: float):
        super().__init__()
        self.name = name
        self.add_module(name, Conv(width_in, width_out, 1, gain=gain, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


class MapBlock(nn.Module):
    def __init__(self, size_in: int, size_out: int):
        super().__init__()
        self.fc = Linear(size_in, size_out, lr_factor=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.fc(x), SLOPE)


class Mapping(nn.Module):
    def __init__(self, size: int, size_out: int, num_layers: int):
        super().__init__()
        sizes = [size] * num_layers + [size_out]
        self.map_blocks = nn.ModuleList(MapBlock(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.map_blocks:
            x = block(x)
        return x


class Encoder(nn.Module):
    def __init__(self, num_channels: int, widths: list[int], latent_dim: int):
        super().__init__()
        resolution = 2 ** len(widths)
        self.latent_dim = latent_dim
        self.from_rgb = nn.ModuleList(Rgb("from_rgb", num_channels, width, math.sqrt(2)) for width in widths[:-1])
        self.encode_block = nn.ModuleList(
            EncodeBlock(a, b, latent_dim, fused=resolution >> i >= FUSED_PIXELS)
            for i, (a, b) in enumerate(zip(widths, widths[1:]))
        )

    def forward(self, x: Tensor) -> Tensor:
        styles = torch.zeros(len(x), 1, self.latent_dim, device=x.device)
        x = F.leaky_relu(F.leaky_relu(self.from_rgb[0](x), SLOPE), SLOPE)
        for block in self.encode_block:
            x, first, second = block(x)
            styles[:, 0] += first + second
        return styles


class Decoder(nn.Module):
    def __init__(self, num_channels: int, widths: list[int], latent_dim: int):
        super().__init__()
        widths = widths[-2::-1]
        self.const = nn.Parameter(torch.ones(1, widths[0], 4, 4))
        self.to_rgb = nn.ModuleList(Rgb("to_rgb", width, num_channels, 0.03) for width in widths)
        self.decode_block = nn.ModuleList(
            DecodeBlock(a, b, latent_dim, first=level == 0, fused=4 << level >= FUSED_PIXELS)
            for level, (a, b) in enumerate(zip([widths[0], *widths], widths))
        )

    def forward(self, styles: Tensor) -> Tensor:
        x = self.const
        for i, block in enumerate(self.decode_block):
            x = block(x, styles[:, 2 * i], styles[:, 2 * i + 1])
        return self.to_rgb[-1](x)


class FactorAdam:
    """Adam without a first moment, from parameter to parameter, with each one's learning-rate coefficient."""

    def __init__(self, networks: tuple[nn.Module, ...], lr: float, beta_2: float = 0.99, eps: float = 1e-8):
        self.lr, self.beta_2, self.eps, self.state = lr, beta_2, eps, {}
        self.parameters = [
            (parameter, getattr(module, "coefficients", {}).get(name, 1.0))
            for network in networks
            for module in network.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]

    def zero_grad(self) -> None:
        for parameter, _ in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter, coefficient in self.parameters:
            if parameter.grad is not None:
                state = self.state.setdefault(parameter, {"step": 0, "square": torch.zeros_like(parameter)})
                state["step"] += 1
                state["square"].mul_(self.beta_2).addcmul_(parameter.grad, parameter.grad, value=1 - self.beta_2)
                size = self.lr * math.sqrt(1 - self.beta_2 ** state["step"]) * coefficient
                parameter.addcdiv_(parameter.grad, state["square"].sqrt().add_(self.eps), value=-size)


@dataclass
class PublishedStyleStep:
    """`widths`: feature maps from the image inwards. `randn` makes latent draws, in the published order."""

    num_channels: int
    widths: list[int]
    latent_dim: int
    num_mapping_layers: int
    scale: float
    beta_rec: float
    beta_kl: float
    beta_neg: float
    device: torch.device
    gamma_r: float = 1e-8
    lr: float = 1.5e-3
    style_mixing: float = 0.9
    average_style_decay: float = 0.995
    randn: Callable[[Tensor], Tensor] = torch.randn_like
    told: list[Tensor] = field(default_factory=list)

    def __post_init__(self):
        self.num_layers = 2 * (len(self.widths) - 1)
        self.encoder = Encoder(self.num_channels, self.widths, self.latent_dim)
        self.decoder = Decoder(self.num_channels, self.widths, self.latent_dim)
        self.mapping_tl = Mapping(self.latent_dim, 2 * self.latent_dim, 3)
        self.mapping_fl = Mapping(self.latent_dim, self.latent_dim, self.num_mapping_layers)
        networks = (self.encoder, self.mapping_tl, self.decoder, self.mapping_fl)
        for network in networks:
            network.to(self.device)
        self.average_style = torch.zeros(self.num_layers, self.latent_dim, device=self.device)
        self.averages = [copy.deepcopy(network).requires_grad_(False) for network in networks]
        self.optimizer_e = FactorAdam((self.encoder, self.mapping_tl), self.lr)
        self.optimizer_d = FactorAdam((self.decoder, self.mapping_fl), self.lr)

    def networks(self) -> Iterator[nn.Module]:
        yield from (self.encoder, self.mapping_tl, self.decoder, self.mapping_fl)

    def freeze(self, encoder: bool) -> None:
        for network, frozen in zip(self.networks(), (encoder, encoder, not encoder, not encoder)):
            network.requires_grad_(not frozen)

    def styles(self, z: Tensor) -> Tensor:
        z = z * torch.rsqrt(z.pow(2).mean(dim=1, keepdim=True) + 1e-8)
        return self.mapping_fl(z)[:, None].repeat(1, self.num_layers, 1)

    def generate(self, z: Tensor, mixing: bool = False) -> Tensor:
        styles = self.styles(z)[:, 0][:, None].repeat(1, self.num_layers, 1)
        with torch.no_grad():
            self.average_style.lerp_(styles.mean(dim=0), 1 - self.average_style_decay)
        if mixing and random.random() < self.style_mixing:
            others = self.styles(self.randn(z))
            layers = torch.arange(self.num_layers, device=z.device)[None, :, None]
            styles = torch.where(layers < random.randint(1, self.num_layers), styles, others)
        return self.decoder(styles)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.mapping_tl(self.encoder(x)[:, 0]).view(len(x), 2, -1).unbind(1)
        std = torch.exp(0.5 * logvar)
        return mu + self.randn(std) * std, mu, logvar

    def prior(self, x: Tensor) -> Tensor:
        return self.randn(x.new_empty(len(x), self.latent_dim))

    def encoder_loss(self, x: Tensor) -> Tensor:
        fake = self.generate(self.prior(x), mixing=True)
        z, mu, logvar = self.encode(x)
        rec = self.generate(z)
        loss_rec, kl_real = error(x, rec).mean(), divergence(mu, logvar).mean()
        z_rec, *latent_rec = self.encode(rec.detach())
        rec_rec = self.generate(z_rec)
        z_fake, *latent_fake = self.encode(fake.detach())
        rec_fake = self.generate(z_fake)
        exp_elbo_rec, exp_elbo_fake = (
            (-2 * self.scale * (self.beta_rec * error(image, again) + self.beta_neg * divergence(*latent))).exp().mean()
            for image, again, latent in ((rec, rec_rec, latent_rec), (fake, rec_fake, latent_fake))
        )
        self.told += [value.detach().cpu() for value in (loss_rec, kl_real, exp_elbo_fake, exp_elbo_rec)]
        return self.scale * (self.beta_rec * loss_rec + self.beta_kl * kl_real) + 0.25 * (exp_elbo_rec + exp_elbo_fake)

    def decoder_loss(self, x: Tensor) -> Tensor:
        fake = self.generate(self.prior(x), mixing=True)
        z, _, _ = self.encode(x)
        rec = self.generate(z.detach())
        loss_rec = error(x, rec).mean()
        z_rec, *latent_rec = self.encode(rec)
        z_fake, *latent_fake = self.encode(fake)
        rec_rec, rec_fake = self.generate(z_rec.detach()), self.generate(z_fake.detach())
        again = error(rec.detach(), rec_rec).mean() + error(fake.detach(), rec_fake).mean()
        kl_rec, kl_fake = divergence(*latent_rec).mean(), divergence(*latent_fake).mean()
        self.told += [value.detach().cpu() for value in (loss_rec, kl_fake)]
        generated = 0.5 * self.beta_kl * (kl_rec + kl_fake) + 0.5 * self.gamma_r * self.beta_rec * again
        return self.scale * (self.beta_rec * loss_rec + generated)

    def __call__(self, real: Tensor) -> dict[str, Tensor]:
        """Train on real images in [-1, 1], [B, C, H, W]. Returns both losses, detached."""
        self.told.clear()
        x = real.detach().requires_grad_(True)
        self.optimizer_e.zero_grad()
        self.freeze(encoder=False)
        loss_e = self.encoder_loss(x)
        self.told.append(loss_e.detach().cpu())
        loss_e.backward()
        self.optimizer_e.step()
        self.optimizer_d.zero_grad()
        self.freeze(encoder=True)
        loss_d = self.decoder_loss(x)
        loss_d.backward()
        self.told.append(loss_d.detach().cpu())
        self.optimizer_d.step()
        with torch.no_grad():
            for network, average in zip(self.networks(), self.averages):
                for parameter, kept in zip(network.parameters(), average.parameters()):
                    kept.lerp_(parameter, 1 - 0.5 ** (len(x) / 10_000))
        return {"loss_encoder": loss_e.detach(), "loss_decoder": loss_d.detach()}
