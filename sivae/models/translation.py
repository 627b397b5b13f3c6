"""Two encoders, of the class and of the content of an image, and one decoder that joins them: image translation by swapping.

Sources: Daniel and Tamar, Soft-IntroVAE (arXiv 2012.13253), unsupervised image translation, whose data and decoder follow
LORD (Gabbay and Hoshen, arXiv 1906.11796): content sets the decoder's first feature map, class the scale and shift after
each instance norm (AdaIN, Huang and Belongie, arXiv 1703.06868). z is [class, content], so that its KL divergence is the
sum of both encoders', and every objective trains the pair as it trains any other.

No labels: LORD learns one class code for all images of a labelled class; here each image has its own, and nothing but the
networks tells class from content. Class is pooled over all pixels and reaches the decoder as what is the same at every
pixel; the content encoder sees features after instance norm, which takes away means and contrasts (as in MUNIT, Huang et
al., arXiv 1804.04732). What neither rules out, such as a class that is told by the arrangement of pixels, may go either way.

Differs on purpose: the blocks are this library's residual ones in the encoders, and no perceptual loss is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sivae.models import recompute
from sivae.models.conv import SLOPE, enlarge, make_blocks, make_norm
from sivae.models.instance_norm import adaptive_instance_norm


class _Features(nn.Module):
    """Images [B, C, H, W] -> features [B, channels[-1], H / 2^levels, W / 2^levels]."""

    def __init__(self, num_channels: int, resolution: int, channels: list[int], group_size: int):
        super().__init__()
        self.stem = nn.Conv2d(num_channels, channels[0], 5, padding=2, bias=False)
        self.stem_norm = make_norm("group", channels[0], group_size)
        self.blocks = make_blocks(channels, "group", group_size, "soft_intro_vae")
        self.block_pixels = [resolution >> (i + 1) for i in range(len(self.blocks))]

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.leaky_relu(self.stem_norm(self.stem(x)), SLOPE, inplace=True), 2)
        for block in self.blocks[:-1]:
            x = F.avg_pool2d(recompute.call(block, x), 2)
        return recompute.call(self.blocks[-1], x)


class TranslationEncoder(nn.Module):
    """Both encoders. Without labels, which are taken and not looked at."""

    def __init__(
        self, num_channels: int, resolution: int, channels: list[int], latent_dim: int, class_dim: int, style_dim: int,
        group_size: int, output: str,
    ):  # fmt: skip
        super().__init__()
        self.dims = [class_dim, latent_dim - class_dim]
        size = resolution // 2 ** len(channels)
        self.class_features = _Features(num_channels, resolution, channels, group_size)
        self.class_head = nn.Linear(channels[-1], 2 * self.dims[0])
        # Groups of one channel: instance norm.
        self.content_features = _Features(num_channels, resolution, channels, group_size=1)
        self.content_head = nn.Linear(channels[-1] * size**2, 2 * self.dims[1])

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.class_features.blocks, *self.content_features.blocks]

    @property
    def block_pixels(self) -> list[int]:
        return [*self.class_features.block_pixels, *self.content_features.block_pixels]

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1] -> mu, logvar, each [B, latent_dim], the class's values first."""
        mu_class, logvar_class = self.class_head(self.class_features(x).mean(dim=(2, 3))).chunk(2, dim=1)
        mu_content, logvar_content = self.content_head(self.content_features(x).flatten(1)).chunk(2, dim=1)
        return torch.cat([mu_class, mu_content], dim=1), torch.cat([logvar_class, logvar_content], dim=1)


class AdaptiveInstanceNorm(nn.Module):
    """Each channel of each image to mean 0 and deviation 1, then to the deviation and mean that the style says."""

    def __init__(self, width: int, style_dim: int):
        super().__init__()
        self.affine = nn.Linear(style_dim, 2 * width)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return adaptive_instance_norm(x, self.affine(style), eps=1e-5)


class _AdaptiveBlock(nn.Module):
    """[B, width_in, H, W] and a style [B, style_dim] -> [B, width_out, H, W]."""

    def __init__(self, width_in: int, width_out: int, style_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.norm1 = AdaptiveInstanceNorm(width_out, style_dim)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = AdaptiveInstanceNorm(width_out, style_dim)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x), style), SLOPE, inplace=True)
        return F.leaky_relu(self.norm2(self.conv2(x), style), SLOPE, inplace=True)


class TranslationDecoder(nn.Module):
    def __init__(
        self, num_channels: int, resolution: int, channels: list[int], latent_dim: int, class_dim: int, style_dim: int,
        group_size: int, output: str,
    ):  # fmt: skip
        super().__init__()
        self.dims, self.sigmoid = [class_dim, latent_dim - class_dim], output == "sigmoid"
        self.size = resolution // 2 ** len(channels)
        self.mapping = nn.Sequential(
            nn.Linear(class_dim, style_dim), nn.LeakyReLU(SLOPE), nn.Linear(style_dim, style_dim), nn.LeakyReLU(SLOPE)
        )
        self.stem = nn.Linear(self.dims[1], channels[-1] * self.size**2)
        widths = [channels[-1], *channels[::-1], channels[0]]
        self.blocks = nn.ModuleList(_AdaptiveBlock(*pair, style_dim) for pair in zip(widths, widths[1:]))
        self.block_pixels = [self.size << i for i in range(len(self.blocks))]
        self.head = nn.Conv2d(channels[0], num_channels, 5, padding=2)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z [B, latent_dim], the class's values first -> images [B, C, H, W]; about [0, 1], not clamped."""
        z_class, z_content = z.split(self.dims, dim=1)
        style = self.mapping(z_class)
        x = F.relu(self.stem(z_content)).unflatten(1, (-1, self.size, self.size))
        for block in self.blocks[:-1]:
            x = enlarge(recompute.call(block, x, style))
        x = self.head(recompute.call(self.blocks[-1], x, style))
        return x.sigmoid() if self.sigmoid else x
