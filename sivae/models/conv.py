"""Residual convolutional encoder and decoder, 28 to 1024 pixels.

Source: Daniel and Tamar, Soft-IntroVAE (arXiv 2012.13253), image models, which follow IntroVAE (arXiv 1807.06358).
Every level of the encoder halves the resolution by average pooling, every level of the decoder doubles it.
Differs on purpose: `norm` is a setting. The published BatchNorm (`norm="batch"`) mixes the images of a batch.
Parameters map one to one to the published ones (see `models.published`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sivae.models import recompute

SLOPE = 0.2  # of every leaky ReLU, as published


class PixelNorm(nn.Module):
    """Scale each pixel's channel vector to unit mean square, then an affine map per channel (after ProGAN)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.square().mean(dim=1, keepdim=True).add(1e-5).rsqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class GroupNorm(nn.GroupNorm):
    """torch's, with statistics in float32 and images of bfloat16 in and out, on every device.

    Under autocast a GPU's would give float32, which the layers behind it would keep in twice the memory; and a CPU's backward
    pass over bfloat16 with channels last is ten times slower than over float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype or torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cpu":
                return _GroupNormInFloat32.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class _GroupNormInFloat32(torch.autograd.Function):
    """Computes in float32 and keeps no float32 image."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        sizes = *x.shape[:2], x.shape[2:].numel(), num_groups
        y, mean, rstd = torch.ops.aten.native_group_norm(x.float(), weight, bias, *sizes, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.sizes = sizes
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        gradient = gradient.float().contiguous(memory_format=layout)
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            gradient, x.float(), mean, rstd, weight, *ctx.sizes, list(ctx.needs_input_grad[:3])
        )
        return dx if dx is None else dx.to(x.dtype), dweight, dbias, None, None


def make_norm(norm: str, width: int, group_size: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width)
    if norm == "group":
        return GroupNorm(width // group_size, width)
    if norm == "layer":
        return GroupNorm(1, width)
    if norm == "pixel":
        return PixelNorm(width)
    return nn.Identity()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside the identity (or a 1x1 projection where the width changes).

    [B, width_in, H, W] -> [B, width_out, H, W].
    """

    def __init__(self, width_in: int, width_out: int, norm: str, group_size: int, residual: str, project: bool):
        super().__init__()
        self.norm_last = residual == "intro_vae"
        self.project = nn.Conv2d(width_in, width_out, 1, bias=False) if project else nn.Identity()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.norm1 = make_norm(norm, width_out, group_size)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, width_out, group_size)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE, inplace=True)
        y = self.conv2(y)
        y = self.norm2(y + self.project(x)) if self.norm_last else self.norm2(y) + self.project(x)
        return F.leaky_relu(y, SLOPE, inplace=True)


def make_blocks(
    widths: list[int], norm: str, group_size: int, residual: str, keeps_first: bool = False
) -> nn.ModuleList:
    """One block per step of `widths` and a last one that keeps its width."""
    blocks = []
    for index, (width_in, width_out) in enumerate(zip(widths, widths[1:])):
        # IntroVAE compares widths by identity of the Python integers, so wide levels of equal width project too; but the
        # decoder's first block is handed one integer twice.
        same_integer = keeps_first and index == 0
        project = width_in != width_out or (residual == "intro_vae" and width_in > 256 and not same_integer)
        blocks.append(ResidualBlock(width_in, width_out, norm, group_size, residual, project))
    blocks.append(ResidualBlock(widths[-1], widths[-1], norm, group_size, residual, project=False))
    return nn.ModuleList(blocks)


def append_labels(features: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """[B, D] and int64 [B] -> [B, D + num_classes], labels one-hot; unchanged for an unconditional model."""
    if not num_classes:
        return features
    if labels is None:
        raise ValueError(f"this model is conditional on {num_classes} classes: labels are needed")
    return torch.cat([features, F.one_hot(labels, num_classes).to(features.dtype)], dim=1)


def enlarge(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2 H, 2 W] of x's type, every pixel four times. A GPU's autocast would give float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2, mode="nearest")


class ConvEncoder(nn.Module):
    memory_format = torch.contiguous_format  # of the activations

    def __init__(
        self, num_channels: int, resolution: int, channels: list[int], latent_dim: int, num_classes: int = 0,
        norm: str = "group", group_size: int = 8, residual: str = "soft_intro_vae", output: str = "linear",
    ):  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        size = resolution // 2 ** len(channels)
        self.stem = nn.Conv2d(num_channels, channels[0], 5, padding=2, bias=False)
        self.stem_norm = make_norm(norm, channels[0], group_size)
        self.blocks = make_blocks(channels, norm, group_size, residual)
        self.block_pixels = [resolution >> (i + 1) for i in range(len(self.blocks))]
        self.head = nn.Linear(channels[-1] * size**2 + num_classes, 2 * latent_dim)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1], labels int64 [B] -> mu, logvar, each [B, latent_dim]."""
        x = self.stem(x.contiguous(memory_format=self.memory_format))
        # Once more: of one channel both formats are the same, and torch goes on with the first.
        x = self.stem_norm(x.contiguous(memory_format=self.memory_format))
        x = F.avg_pool2d(F.leaky_relu(x, SLOPE, inplace=True), 2)
        for block in self.blocks[:-1]:
            x = F.avg_pool2d(recompute.call(block, x), 2)
        features = recompute.call(self.blocks[-1], x).flatten(1)
        mu, logvar = self.head(append_labels(features, labels, self.num_classes)).chunk(2, dim=1)
        return mu, logvar


class ConvDecoder(nn.Module):
    memory_format = torch.contiguous_format  # of the activations

    def __init__(
        self, num_channels: int, resolution: int, channels: list[int], latent_dim: int, num_classes: int = 0,
        norm: str = "group", group_size: int = 8, residual: str = "soft_intro_vae", output: str = "linear",
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.sigmoid = num_classes, output == "sigmoid"
        self.size = resolution // 2 ** len(channels)
        self.stem = nn.Linear(latent_dim + num_classes, channels[-1] * self.size**2)
        # The first level keeps the innermost width, then they widen towards the image.
        self.blocks = make_blocks([channels[-1], *channels[::-1]], norm, group_size, residual, keeps_first=True)
        self.block_pixels = [self.size << i for i in range(len(self.blocks))]
        self.head = nn.Conv2d(channels[0], num_channels, 5, padding=2)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z [B, latent_dim], labels int64 [B] -> images [B, C, H, W]; about [0, 1], not clamped."""
        x = F.relu(self.stem(append_labels(z, labels, self.num_classes)))
        x = x.unflatten(1, (-1, self.size, self.size)).contiguous(memory_format=self.memory_format)
        for block in self.blocks[:-1]:
            x = enlarge(recompute.call(block, x))
        x = self.head(recompute.call(self.blocks[-1], x))
        return x.sigmoid() if self.sigmoid else x
