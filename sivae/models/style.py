"""Style-based encoder and decoder with levels of detail, 4 to 1024 pixels.

Sources: Daniel and Tamar, Soft-IntroVAE (arXiv 2012.13253), style models, whose networks are those of ALAE (Pidhorskyi et
al., arXiv 2004.04467) with a Gaussian latent; the decoder follows StyleGAN (Karras et al., arXiv 1812.04948). The encoder
sums, over its blocks, a linear map of the channels' means and standard deviations before each instance norm, and maps
that style to mu and logvar. The decoder maps z to a style, which sets the scale and shift after each instance norm.

Differs on purpose: weights are stored divided by their learning-rate factor, which the layer's forward multiplies in (see
`scaled`), because ZeRO flattens parameters and loses attributes. All layers have one average style, since they share one
mapping. The learned constant starts from normal draws, as in StyleGAN2, not from ones: of what is the same at each pixel
instance norm leaves rounding, 10,000-fold, and two runs on other numbers of GPUs would part at once. A channel that is constant over its pixels has no gradient through its standard deviation, instead of NaN.
Parameters map one to one to the published ones (see `models.published_style`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sivae.models import recompute
from sivae.models.conv import append_labels, enlarge
from sivae.models.instance_norm import adaptive_instance_norm, instance_norm

SLOPE = 0.2  # of every leaky ReLU, as published
GAIN = math.sqrt(2)  # of weights that a leaky ReLU follows
FUSED_SCALE_PIXELS = 128  # from this size on, one kernel convolves and changes the size
MAPPING_LR_FACTOR = 0.1
NOISE_MODES = ("random", "batch", "fixed", "mean", "none")


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: Tensor, factor: float) -> Tensor:
        return parameter * factor

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def scaled(parameter: Tensor, factor: float) -> Tensor:
    """`parameter * factor`, the equalized learning rate; the gradient arrives at the parameter without the factor.

    A step of Adam on the parameter then moves the product by `factor` times the learning rate. Adam divides by the size of
    the gradient, so the factor would cancel there, but for epsilon: without it epsilon counts as in the published
    optimizer, and gradients and their norms are those of the published weights.
    """
    return _Scale.apply(parameter, factor)


class ScaledLinear(nn.Module):
    """[..., size_in] -> [..., size_out], with an equalized learning rate."""

    def __init__(self, size_in: int, size_out: int, gain: float = GAIN, lr_factor: float = 1.0):
        super().__init__()
        self.factors = {"weight": gain / math.sqrt(size_in) * lr_factor, "bias": lr_factor}
        self.weight = nn.Parameter(torch.randn(size_out, size_in) / lr_factor)
        self.bias = nn.Parameter(torch.zeros(size_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, scaled(self.weight, self.factors["weight"]), scaled(self.bias, self.factors["bias"]))


class ScaledConv(nn.Module):
    """A convolution that keeps the size, or with `resize` one that halves ("down") or doubles ("up") it in the same kernel."""

    def __init__(
        self, width_in: int, width_out: int, size: int, gain: float = GAIN, bias: bool = False, resize: str | None = None
    ):  # fmt: skip
        super().__init__()
        self.factors = {"weight": gain / math.sqrt(width_in * size**2)} | ({"bias": 1.0} if bias else {})
        self.padding, self.resize = size // 2, resize
        widths = (width_in, width_out) if resize == "up" else (width_out, width_in)
        self.weight = nn.Parameter(torch.randn(*widths, size, size))
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias` of another layer than this one, which has none."""
        weight, bias = scaled(self.weight, self.factors["weight"]), self.bias if bias is None else bias
        if self.resize is None:
            return F.conv2d(x, weight, bias, padding=self.padding)
        # The kernel of the convolution and of the 2x2 box before or after it, in one. Doubling repeats a pixel four times.
        weight = box(weight)
        if self.resize == "down":
            return F.conv2d(x, weight, bias, stride=2, padding=self.padding)
        return F.conv_transpose2d(x, 4 * weight, bias, stride=2, padding=self.padding)


def box(x: Tensor) -> Tensor:
    """Means of all 2x2 squares, with zeros around: [..., H, W] -> [..., H + 1, W + 1]."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2, stride=1)


class _Blur(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        line = (2 - torch.arange(-1, 2, device=x.device, dtype=x.dtype).abs()) / 4  # made on the device: nothing waits
        kernel = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, kernel, padding=1, groups=x.shape[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return blur(gradient)  # the kernel is symmetric


def blur(x: Tensor) -> Tensor:
    """Convolve every channel with (1, 2, 1)^T (1, 2, 1) / 16; zeros around, the size stays: [B, C, H, W]."""
    return _Blur.apply(x)


class Mapping(nn.Module):
    """Fully connected layers, a leaky ReLU after each, the last one too: [B, size_in] -> [B, size_out]."""

    def __init__(self, size_in: int, size: int, size_out: int, num_layers: int, normalize: bool):
        super().__init__()
        self.normalize = normalize
        sizes = [size_in, *[size] * (num_layers - 1), size_out]
        self.layers = nn.ModuleList(ScaledLinear(a, b, lr_factor=MAPPING_LR_FACTOR) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x: Tensor, labels: Tensor | None = None, num_classes: int = 0) -> Tensor:
        if self.normalize:
            x = x * x.square().mean(dim=1, keepdim=True).add(1e-8).rsqrt()
        x = append_labels(x, labels, num_classes)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE, inplace=True)
        return x


def level_of(resolution: int) -> int:
    """4 pixels are level 0, and each level doubles them."""
    return resolution.bit_length() - 3


def num_levels(resolution: int) -> int:
    """Levels up to a resolution."""
    return level_of(resolution) + 1


def num_layers(resolution: int) -> int:
    """Layers of the decoder that take a style, up to a resolution."""
    return 2 * num_levels(resolution)


def widths(resolution: int, base_channels: int, max_channels: int) -> list[int]:
    """Feature maps from the image inwards; the last are those behind the encoder's innermost block."""
    return [min(max_channels, base_channels * 2**i) for i in range(num_levels(resolution) + 1)]


class EncoderBlock(nn.Module):
    """[B, width_in, H, W] -> [B, width_out, H / 2, W / 2] and this block's part of the style [B, latent_dim]."""

    def __init__(self, width_in: int, width_out: int, latent_dim: int, fused: bool):
        super().__init__()
        self.fused = fused
        self.conv1 = ScaledConv(width_in, width_in, 3)
        self.bias1 = nn.Parameter(torch.zeros(width_in))
        self.style1 = ScaledLinear(2 * width_in, latent_dim)
        self.conv2 = ScaledConv(width_in, width_out, 3, resize="down" if fused else None)
        self.bias2 = nn.Parameter(torch.zeros(width_out))
        self.style2 = ScaledLinear(2 * width_out, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.leaky_relu(self.conv1(x, self.bias1), SLOPE, inplace=True)
        x, statistics1 = instance_norm(x, eps=1e-5)
        x = self.conv2(blur(x), self.bias2)
        x = F.leaky_relu(x if self.fused else F.avg_pool2d(x, 2), SLOPE, inplace=True)
        x, statistics2 = instance_norm(x, eps=1e-5)
        return x, self.style1(statistics1) + self.style2(statistics2)


class DecoderBlock(nn.Module):
    """[B, width_in, H / 2, W / 2] (H, W in the first block) and two styles [B, latent_dim] -> [B, width_out, H, W]."""

    def __init__(self, width_in: int, width_out: int, latent_dim: int, level: int, fused: bool):
        super().__init__()
        self.level, self.fused = level, fused
        if level:
            self.conv1 = ScaledConv(width_in, width_out, 3, resize="up" if fused else None)
        self.noise1 = nn.Parameter(torch.zeros(width_out))
        self.bias1 = nn.Parameter(torch.zeros(width_out))
        self.style1 = ScaledLinear(latent_dim, 2 * width_out, gain=1)
        self.conv2 = ScaledConv(width_out, width_out, 3)
        self.noise2 = nn.Parameter(torch.zeros(width_out))
        self.bias2 = nn.Parameter(torch.zeros(width_out))
        self.style2 = ScaledLinear(latent_dim, 2 * width_out, gain=1)

    def forward(self, x: Tensor, style1: Tensor, style2: Tensor, noise: str) -> Tensor:
        if self.level:
            x = x if self.fused else enlarge(x)
            x = blur(self.conv1(x))
        else:
            x = x.clone()  # the constant, one for all images
        x = add_noise(x, self.noise1, noise, 2 * self.level)
        x = F.leaky_relu(x.add_(_per_channel(self.bias1, x)), SLOPE, inplace=True)
        x = self._norm(x, self.style1(style1))
        x = add_noise(self.conv2(x), self.noise2, noise, 2 * self.level + 1)
        x = F.leaky_relu(x.add_(_per_channel(self.bias2, x)), SLOPE, inplace=True)
        return self._norm(x, self.style2(style2))

    def _norm(self, x: Tensor, style: Tensor) -> Tensor:
        if self.level:
            return adaptive_instance_norm(x, style, eps=1e-8)
        # Published weights start flat here. Of what is the same at each pixel torch's norm leaves the rounding that theirs does.
        scale, shift = style[:, :, None, None].chunk(2, dim=1)
        return F.instance_norm(x, eps=1e-8) * (scale + 1) + shift


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values[:, None, None].to(x.dtype)


def add_noise(x: Tensor, weight: Tensor, mode: str, layer: int) -> Tensor:
    """Per-pixel normal noise, one map for all channels, times a weight per channel. `layer` counts from the constant.

    random: fresh for each image; batch: fresh, one map for all images; fixed: the same maps in every call.
    Fresh draws come from torch's generator of the device.
    mean: no draw, but what the published code adds when its noise is off; none: nothing, x itself.
    """
    if mode == "none":
        return x
    if mode == "mean":
        sigma = math.sqrt(layer // 2 + 1)
        added = (1 - SLOPE) * sigma / math.sqrt(2 * math.pi) * torch.exp(-x.square() / (2 * sigma**2))
        return x + added.to(x.dtype)  # a GPU's autocast makes it float32
    size = x.shape[-1]
    if mode == "fixed":
        noise = _fixed_noise(layer, size).to(x)
    else:
        noise = torch.randn(len(x) if mode == "random" else 1, 1, size, size, device=x.device, dtype=x.dtype)
    return torch.addcmul(x, _per_channel(weight, x), noise)


@lru_cache(maxsize=36)
def _fixed_noise(layer: int, size: int) -> Tensor:
    return torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(layer))


class StyleEncoder(nn.Module):
    def __init__(
        self, num_channels: int, resolution: int, base_channels: int, max_channels: int, latent_dim: int,
        num_mapping_layers: int, num_mapping_layers_to_latent: int = 3, num_classes: int = 0, noise: str = "random",
        average_style_decay: float = 0.995,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_levels = num_classes, num_levels(resolution)
        channels = widths(resolution, base_channels, max_channels)
        self.from_rgb = nn.ModuleList(ScaledConv(num_channels, width, 1, bias=True) for width in channels[:-1])
        self.blocks = nn.ModuleList(
            EncoderBlock(a, b, latent_dim, fused=resolution >> i >= FUSED_SCALE_PIXELS)
            for i, (a, b) in enumerate(zip(channels, channels[1:]))
        )
        self.block_pixels = [resolution >> i for i in range(self.num_levels)]
        self.mapping = Mapping(
            latent_dim + num_classes, latent_dim, 2 * latent_dim, num_mapping_layers_to_latent, normalize=False
        )

    def forward(
        self, x: Tensor, labels: Tensor | None = None, level: int | None = None, blend: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Images [B, C, 4 * 2^level, ...] in [-1, 1], labels int64 [B] -> mu, logvar, each [B, latent_dim].

        `level` None is the highest. `blend` in [0, 1] is the weight of the level's own block beside the image shrunk to the
        level below. Raises ValueError for a level that there is not and for images of another size.
        """
        style = self.style(x, level, blend)
        mu, logvar = self.mapping(style, labels, self.num_classes).chunk(2, dim=1)
        return mu, logvar

    def style(self, x: Tensor, level: int | None = None, blend: float = 1.0) -> Tensor:
        """Images -> the style [B, latent_dim] that the mapping to latent takes."""
        level = check_level(level, self.num_levels)
        if x.shape[-1] != 4 << level:
            raise ValueError(f"level {level} takes images of {4 << level} pixels, not {x.shape[-1]}")
        first = self.num_levels - 1 - level
        y, style = recompute.call(self.blocks[first], self._from_rgb(first, x))
        if level and blend != 1:
            style = style * blend
            y = torch.lerp(self._from_rgb(first + 1, F.avg_pool2d(x, 2)), y, blend)
        for block in self.blocks[first + 1 :]:
            y, part = recompute.call(block, y)
            style = style + part
        return style

    def idle(self, level: int, blend: float = 1.0) -> list[nn.Module]:
        """The layers that `forward` does not use at a level and blend."""
        first = self.num_levels - 1 - level
        return [*self.blocks[:first], *_without(self.from_rgb, [first, first + 1] if level and blend != 1 else [first])]

    def _from_rgb(self, index: int, x: Tensor) -> Tensor:
        # Published, the leaky ReLU stands here twice.
        return F.leaky_relu(self.from_rgb[index](x), SLOPE**2, inplace=True)


class StyleDecoder(nn.Module):
    def __init__(
        self, num_channels: int, resolution: int, base_channels: int, max_channels: int, latent_dim: int,
        num_mapping_layers: int, num_mapping_layers_to_latent: int = 3, num_classes: int = 0, noise: str = "random",
        average_style_decay: float = 0.995,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_levels = num_classes, num_levels(resolution)
        self.noise, self.average_style_decay = noise, average_style_decay
        channels = widths(resolution, base_channels, max_channels)[-2::-1]
        self.mapping = Mapping(latent_dim + num_classes, latent_dim, latent_dim, num_mapping_layers, normalize=True)
        self.constant = nn.Parameter(torch.randn(channels[0], 4, 4))
        self.blocks = nn.ModuleList(
            DecoderBlock(a, b, latent_dim, level, fused=4 << level >= FUSED_SCALE_PIXELS)
            for level, (a, b) in enumerate(zip([channels[0], *channels], channels))
        )
        self.block_pixels = [4 << level for level in range(self.num_levels)]
        self.to_rgb = nn.ModuleList(ScaledConv(width, num_channels, 1, gain=0.03, bias=True) for width in channels)
        # A buffer, so that the running average of the weights has its own and truncation can use it.
        self.register_buffer("average_style", torch.zeros(latent_dim))

    def forward(
        self, z: Tensor, labels: Tensor | None = None, level: int | None = None, blend: float = 1.0, noise: str | None = None,
        truncation: float = 1.0, truncation_layers: int | None = None,
    ) -> Tensor:  # fmt: skip
        """z, labels int64 [B] -> images [B, C, 4 * 2^level, ...]; about [-1, 1], not clamped.

        z is [B, latent_dim], or [B, 2 (level + 1), latent_dim] with one latent for each layer: style mixing. `level` None is
        the highest. `blend` in [0, 1] is the weight of the level's own block beside the enlarged image of the level below.
        `noise` None is the model's in train mode; in eval mode fixed maps stand in for random ones, so that an image is a
        function of z. `truncation` (psi) moves the styles of the first `truncation_layers` layers (None: of all) to the
        average style: 1 not at all, 0 onto it. Raises ValueError for a level that there is not.
        """
        level = check_level(level, self.num_levels)
        noise = noise or (self.noise if self.training or self.noise in ("mean", "none") else "fixed")
        styles = self.styles(z, labels, level)
        if truncation != 1:
            near = torch.lerp(self.average_style, styles, truncation)
            styles = torch.cat([near[:, :truncation_layers], styles[:, len(near[0, :truncation_layers]) :]], dim=1)
        x, below = self.constant.expand(len(z), -1, -1, -1), None
        for block in self.blocks[: level + 1]:
            if level and block.level == level and blend != 1:
                below = enlarge(self.to_rgb[level - 1](x))
            x = recompute.call(block, x, styles[:, 2 * block.level], styles[:, 2 * block.level + 1], noise)
        x = self.to_rgb[level](x)
        return x if below is None else torch.lerp(below, x, blend)

    def idle(self, level: int, blend: float = 1.0) -> list[nn.Module]:
        """The layers that `forward` does not use at a level and blend."""
        fades = level and blend != 1
        return [*self.blocks[level + 1 :], *_without(self.to_rgb, [level - 1, level] if fades else [level])]

    def styles(self, z: Tensor, labels: Tensor | None = None, level: int | None = None) -> Tensor:
        """z as in `forward` -> the style of each layer [B, 2 (level + 1), latent_dim], before truncation."""
        num_layers = 2 * (check_level(level, self.num_levels) + 1)
        if z.dim() == 2:
            return self.mapping(z, labels, self.num_classes)[:, None].expand(-1, num_layers, -1)
        if z.shape[1] != num_layers:
            raise ValueError(f"z has {z.shape[1]} latents an image; there are {num_layers} layers")
        labels = None if labels is None else labels.repeat_interleave(num_layers)
        return self.mapping(z.flatten(0, 1), labels, self.num_classes).unflatten(0, (len(z), num_layers))


def _without(layers: nn.ModuleList, used: list[int]) -> list[nn.Module]:
    return [layer for index, layer in enumerate(layers) if index not in used]


def check_level(level: int | None, num_levels: int) -> int:
    if level is None:
        return num_levels - 1
    if not 0 <= level < num_levels:
        raise ValueError(f"level {level} does not exist; this network has 0 to {num_levels - 1}")
    return level


@contextmanager
def average_styles(decoder: nn.Module, weights: Sequence[float], mean: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Move the decoder's average style by the styles of one training phase, when the phase is over.

    As published, by each call's batch mean in turn; but by the mean over the phase's accumulation passes, each with the same
    calls, and over ranks (`mean` is that collective), so that neither changes more than rounding. `weights` are the
    shares of the passes, all 1 where they have as many images each. Does nothing for a network of another family.
    """
    if not isinstance(decoder, StyleDecoder):
        yield
        return
    seen: list[Tensor] = []
    hook = decoder.mapping.register_forward_hook(lambda module, inputs, styles: seen.append(styles.detach().mean(0)))
    try:
        yield
    finally:
        hook.remove()
    with torch.no_grad():
        calls = torch.stack(seen).float().unflatten(0, (len(weights), -1))
        calls = torch.stack([weight * part for weight, part in zip(weights, calls)]).mean(0)
        for style in mean(calls):
            decoder.average_style.lerp_(style, 1 - decoder.average_style_decay)
