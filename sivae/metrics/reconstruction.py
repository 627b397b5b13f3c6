"""How close a reconstruction is to its image, for each image by itself.

Sources: SSIM of Wang et al., IEEE TIP 13(4), 2004 (a Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03,
only where the window lies inside); MS-SSIM of Wang et al., Asilomar 2003 (its five exponents, halving by the mean over 2x2
pixels); LPIPS of Zhang et al., arXiv 1801.03924. All are of each colour channel by itself, averaged over channels; the
papers take grey images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Height and width that a figure needs: the window must fit, at the last scale of MS-SSIM too.
MIN_PIXELS = {"ssim": WINDOW, "ms_ssim": WINDOW * 2 ** (len(EXPONENTS) - 1)}


def mse(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared error, images [B, C, H, W] in [0, 1] -> [B] float64."""
    _check(first, second)
    return (first.double() - second.double()).square().flatten(1).mean(dim=1)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, images [B, C, H, W] in [0, 1] -> [B] float64; infinite for equal images."""
    return -10 * mse(first, second).log10()


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity, images [B, C, H, W] in [0, 1] -> [B] float64 in [-1, 1]. Raises ValueError below 11 pixels."""
    _check(first, second, MIN_PIXELS["ssim"])
    luminance, contrast = _ssim_maps(first.double(), second.double())
    return (luminance * contrast).flatten(1).mean(dim=1)


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """Multi-scale structural similarity, images [B, C, H, W] in [0, 1] -> [B] float64. Raises ValueError below 176 pixels.

    A scale whose mean contrast term is negative, as for images that are each other's negative, counts as 0: powers of
    negative numbers are not defined.
    """
    _check(first, second, MIN_PIXELS["ms_ssim"])
    first, second = first.double(), second.double()
    product = 1.0
    for scale, exponent in enumerate(EXPONENTS):
        luminance, contrast = _ssim_maps(first, second)
        last = scale == len(EXPONENTS) - 1
        mean = ((luminance * contrast) if last else contrast).flatten(2).mean(dim=2)
        product = product * mean.clamp(min=0) ** exponent
        if not last:
            first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
    return product.mean(dim=1)


def _ssim_maps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast with structure, at every place of the window: [B, C, H - 10, W - 10] each."""
    mean1, mean2 = _blur(first), _blur(second)
    variance1, variance2 = _blur(first * first) - mean1**2, _blur(second * second) - mean2**2
    covariance = _blur(first * second) - mean1 * mean2
    c1, c2 = K1**2, K2**2  # the values reach from 0 to 1
    luminance = (2 * mean1 * mean2 + c1) / (mean1**2 + mean2**2 + c1)
    return luminance, (2 * covariance + c2) / (variance1 + variance2 + c2)


def _blur(images: Tensor) -> Tensor:
    """Weighted means over the window, [B, C, H, W] -> [B, C, H - 10, W - 10]."""
    place = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = (-(place**2) / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    channels = images.shape[1]
    rows = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    return F.conv2d(F.conv2d(images, rows, groups=channels), rows.transpose(2, 3), groups=channels)


def _check(first: Tensor, second: Tensor, min_pixels: int = 1) -> None:
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(
            f"images of different sizes cannot be compared: {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if min(first.shape[2:]) < min_pixels:
        raise ValueError(f"this figure needs images of {min_pixels} pixels, not {tuple(first.shape[2:])}")
