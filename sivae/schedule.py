"""What changes over a run, as pure functions of the images seen: levels of detail, learning rates, EMA decay, due dates."""

import math
from collections.abc import Sequence


def lr_factor(
    images_seen: int, total_images: int, *, kind: str, warmup_images: int = 0, milestones_images: tuple[int, ...] | list[int] = (),
    gamma: float = 0.1, hold_images: int = 0, final_fraction: float = 0.0,
) -> float:  # fmt: skip
    """Factor in [0, 1] on the learning rate of the step that ends at `images_seen` images."""
    if images_seen < warmup_images:
        return images_seen / warmup_images
    if kind == "milestones":
        return gamma ** sum(images_seen > milestone for milestone in milestones_images)
    if kind == "cosine":
        start = warmup_images + hold_images
        progress = min(max((images_seen - start) / max(total_images - start, 1), 0.0), 1.0)
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def level_at(images_seen: int, levels: Sequence[tuple[int | None, int]]) -> tuple[int, float]:
    """Progressive growing: which level the step that begins at `images_seen` trains, and its blend in [0, 1].

    `levels`: for each the images that it lasts (the last one's is ignored) and those over which it fades in. The blend is the
    weight of the new level beside the one below: half a period of a cosine, as published (style Soft-IntroVAE, after ALAE).
    """
    start = 0
    for index, (lasts, fade) in enumerate(levels):
        if index == len(levels) - 1 or images_seen < start + lasts:
            break
        start += lasts
    progress = (images_seen - start) / fade if images_seen - start < fade else 1.0
    return index, 0.5 - 0.5 * math.cos(math.pi * progress)


def ema_decay(images_seen: int, batch_size: int, halflife_images: float, rampup_ratio: float | None) -> float:
    """Share of the old average that a step of `batch_size` images keeps (after StyleGAN2: half-life and ramp-up)."""
    if rampup_ratio is not None:
        halflife_images = min(halflife_images, images_seen * rampup_ratio)
    return 0.5 ** (batch_size / halflife_images) if halflife_images > 0 else 0.0


def due(images_seen: int, batch_size: int, every_images: int) -> bool:
    """Whether the step that ended at `images_seen` passed a multiple of `every_images`."""
    return images_seen // every_images > (images_seen - batch_size) // every_images
