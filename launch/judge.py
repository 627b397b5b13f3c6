"""How good a checkpoint is, by measures that do not depend on the betas, so that trials with different ones can be compared.

`frechet_pixels`: Fréchet distance between real images and samples, in pixel space, of images shrunk to at most 16 pixels
(the mean over blocks). It sees shapes and colours, not detail: good for small images and for telling a bad trial, no FID.
`reconstruction_mse`: mean squared error of reconstructions, values in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sivae import inference
from sivae.config import Config
from sivae.data import open_stream
from sivae.metrics.frechet import frechet_distance, moments

PIXELS, BATCH = 16, 32


def judge(settings: Config, checkpoint: str, count: int) -> dict[str, float]:
    """Measures of a run's checkpoint, by name, from `count` real images (at most what the set has) and as many samples."""
    data, run = settings.data, settings.run
    model = inference.load(f"{run.directory}/checkpoints/{checkpoint}", storage_options=run.storage_options)
    stream = open_stream(
        data.url, resolution=settings.model.resolution, num_channels=settings.model.num_channels, batch_size=BATCH,
        random_crop=model.random_crop, cache_dir=data.cache_dir, storage_options=data.storage_options, timeout_sec=data.timeout_sec, progress=False,
    )  # fmt: skip
    count = min(count, len(stream))
    error, values, real, drawn = 0.0, 0, [], []
    for first in range(0, count, BATCH):
        batch = stream.sample(range(first, min(first + BATCH, count)))
        images = batch.images.float() / 255
        labels = batch.labels if settings.model.num_classes else None
        again = model.to_uint8(model.reconstruct(batch.images, labels)).float() / 255
        error, values = error + (again - images).square().sum().item(), values + images.numel()
        samples = model.to_uint8(model.sample(len(images), seed=first, labels=labels)).float() / 255
        real.append(_shrunk(images))
        drawn.append(_shrunk(samples))
    distance = frechet_distance(moments(torch.cat(drawn).numpy()), moments(torch.cat(real).numpy()))
    return {"frechet_pixels": distance, "reconstruction_mse": error / values}


def _shrunk(images: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] in [0, 1] -> [N, C * h * w]."""
    if images.shape[-1] > PIXELS:
        images = F.adaptive_avg_pool2d(images, PIXELS)
    return images.flatten(1)
