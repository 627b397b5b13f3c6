"""Instance norm whose scale and shift are a style (AdaIN, Huang and Belongie, arXiv 1703.06868), and the statistics it takes away.

One operation, which keeps one image for its backward pass. Statistics, norm, scale and shift, each by itself, keep three, and in
float32 where autocast runs in bfloat16.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST_VARIANCE = 1e-30  # far below what float32 leaves of any


def instance_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] -> the same of x's type, each channel of each image with mean 0 and variance 1; and the statistics that were
    taken away: [B, 2 C], float32 (float64 of float64), means, then standard deviations without `eps`. No second gradient.
    """
    shift = x.new_zeros(x.shape[:2], dtype=_wide(x))
    return _InstanceNorm.apply(x, shift + 1, shift, eps, True)


def adaptive_instance_norm(x: Tensor, style: Tensor, eps: float) -> Tensor:
    """Instance norm, then channels scaled by 1 + the first half of the style and shifted by the second.

    [B, C, H, W], [B, 2 C] -> [B, C, H, W] of x's type. No second gradient.
    """
    scale, shift = style.to(_wide(x)).chunk(2, dim=1)
    return _InstanceNorm.apply(x, 1 + scale, shift, eps, False)[0]


class _InstanceNorm(torch.autograd.Function):
    """Keeps x and numbers by channel for the backward pass, and no other image."""

    @staticmethod
    def forward(
        ctx, x: Tensor, scale: Tensor, shift: Tensor, eps: float, with_statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        mean = variance = statistics = None
        if with_statistics or not _has_kernel(x):
            mean, variance = _moments(x)
        if _has_kernel(x):
            y, mean, rstd = torch.native_batch_norm(
                _one_image(x), scale.flatten(), shift.flatten(), None, None, True, 0.0, eps
            )
            # No view of what is known only here: of one that a Function returns, autograd refuses any change in place.
            y, mean, rstd = torch.ops.aten._unsafe_view(y, x.shape), mean.view(scale.shape), rstd.view(scale.shape)
        else:
            rstd = (variance + eps).rsqrt()
            y = torch.addcmul(_maps(shift), x - _maps(mean), _maps(rstd * scale)).to(x.dtype)
        if with_statistics:
            statistics = torch.cat([mean, variance.sqrt()], dim=1)
        ctx.save_for_backward(x, scale, mean, variance, rstd)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, by_y: Tensor | None, by_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, mean, variance, rstd = ctx.saved_tensors
        by_x = by_scale = by_shift = None
        if by_y is not None:
            by_x, by_scale, by_shift = torch.ops.aten.native_batch_norm_backward(
                _one_image(by_y), _one_image(x), scale.flatten(), None, None, mean.flatten(), rstd.flatten(), True, ctx.eps,
                list(ctx.needs_input_grad[:3]),
            )  # fmt: skip
            by_x, by_scale, by_shift = (
                value if value is None else value.view(shape)
                for value, shape in ((by_x, x.shape), (by_scale, scale.shape), (by_shift, scale.shape))
            )
        if by_statistics is not None and ctx.needs_input_grad[0]:
            by_mean, by_deviation = (by_statistics / x.shape[2:].numel()).chunk(2, dim=1)
            # The deviation has no epsilon, as published; where a channel is constant its slope would be infinite, and is 0 here.
            slope = torch.where(variance > SMALLEST_VARIANCE, by_deviation * variance.rsqrt(), 0.0)
            part = torch.addcmul(_maps(by_mean), x - _maps(mean), _maps(slope)).to(x.dtype)
            by_x = part if by_x is None else by_x + part
        return by_x, by_scale, by_shift, None, None


def _has_kernel(x: Tensor) -> bool:
    """Whether batch norm subtracts the mean first. A CPU's computes x a + b, and rounds b, as large as the mean over the deviation."""
    return x.device.type != "cpu"


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and (biased) variances of the channels: [B, C, H, W] -> two of [B, C], float32 (float64 of float64)."""
    x = x.to(_wide(x))
    if x.device.type == "cpu":
        return _moments_on_cpu(x)
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    return mean, variance


@torch.library.custom_op("sivae::moments", mutates_args=(), device_types="cpu")
def _moments_on_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    """By what batch norm calls, in a fifth of the time of torch.var_mean. It knows no shapes without numbers, as `sivae plan` needs."""
    averages = x.new_zeros(2, x.shape[0] * x.shape[1])  # which it would also move
    mean, variance = torch.batch_norm_update_stats(_one_image(x), *averages, 0.0)
    return mean.view(x.shape[:2]), variance.view(x.shape[:2])


@_moments_on_cpu.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


def _one_image(x: Tensor) -> Tensor:
    # Contiguous: of an image with channels last and a gradient without, or the other way round, torch 2.13 makes wrong numbers.
    return x.contiguous().view(1, -1, *x.shape[2:])


def _maps(values: Tensor) -> Tensor:
    return values[:, :, None, None]
