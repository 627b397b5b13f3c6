"""What the Fréchet statistics cost beside the detector that they need. Prints a table and writes it.

    python -m benchmarks.metrics [--images 10000] [--device auto] [--output benchmarks/results]

The detector is a stand-in with random weights: a TorchScript file that takes uint8, resizes inside and returns 2,048
features, as Inception-v3 does, at about a twentieth of its cost, so that what the sums add weighs twenty times as much here.
Detector and sums take turns batch by batch, so that a slow minute of the machine falls on both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.digits import machine
from sivae.data import open_stream
from sivae.data.pack import pack
from sivae.distributed import pick_device
from sivae.metrics.features import open_detector
from sivae.metrics.frechet import MomentSums, frechet_distance

SIZE, BATCH, INCEPTION_FLOPS = 32, 64, 11.4e9  # of one image: Szegedy et al., arXiv 1512.00567, 5.7e9 multiply-adds
LIMIT = 0.10


class StandIn(nn.Module):
    """uint8 [B, 3, H, W] -> features [B, 2048]."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128, 256, 512)
        self.layers = nn.Sequential(
            *(nn.Conv2d(a, b, 3, padding=1, stride=2 - i % 2) for i, (a, b) in enumerate(zip(widths, widths[1:]))),
            nn.Conv2d(512, 2048, 1),
        )

    def forward(self, x: Tensor):
        x = F.interpolate(x.float() / 255, (64, 64), mode="bilinear", align_corners=False)
        for layer in self.layers:
            x = layer(x).relu()
        return x.mean(dim=(2, 3))


def timed(work: Callable, device: torch.device) -> tuple[float, object]:
    """Seconds on the wall until the device is done, and the result."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--output", default="benchmarks/results")
    options = parser.parse_args()
    device = pick_device(options.device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        network = StandIn().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
        torch.jit.script(network).save(f"{folder}/detector.pt")
        pixels = np.random.default_rng(0).integers(0, 256, (options.images, SIZE, SIZE, 3), dtype=np.uint8)
        np.save(f"{folder}/images.npy", pixels)
        pack(f"{folder}/images.npy", f"{folder}/set", resolution=SIZE, progress=False)
        detector = open_detector("standin", f"{folder}/detector.pt", (3, SIZE, SIZE), device)
        stream = open_stream(f"{folder}/set", batch_size=1)
        sums = MomentSums(detector.dim, device)
        seconds = dict.fromkeys(("reading", "detector", "sums"), 0.0)
        detector(torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8, device=device))  # warm up
        for first in range(0, options.images, BATCH):
            numbers = range(first, min(first + BATCH, options.images))
            took, batch = timed(lambda: stream.sample(numbers), device)
            seconds["reading"] += took
            images = batch.images.to(device)
            took, features = timed(lambda: detector(images), device)
            seconds["detector"] += took
            took, _ = timed(lambda: sums.add(features), device)
            seconds["sums"] += took
        moments_sec, moments = timed(sums.moments, device)
        distance_sec, _ = timed(lambda: frechet_distance(moments, moments), device)
    share = (seconds["sums"] + moments_sec) / seconds["detector"]
    flops = counter.get_total_flops()
    rows = [
        ("detector", seconds["detector"]),
        ("reading and decoding, which a thread does a batch ahead", seconds["reading"]),
        ("sums of the features in float64", seconds["sums"]),
        ("mean and covariance from the sums, once", moments_sec),
        ("the distance of two sets from these, once a figure", distance_sec),
    ]
    lines = [
        f"# Fréchet statistics: {time.strftime('%Y-%m-%d')}, {machine()}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "",
        f"`python -m benchmarks.metrics --images {options.images}`. The detector is a stand-in of {flops / 1e9:.2f} GFLOP an image, 1 /"
        f" {INCEPTION_FLOPS / flops:.0f} of Inception-v3's, with {detector.dim:,} features.",
        "",
        f"| {options.images:,} images | seconds | of the detector's time |",
        "|---|---|---|",
        *(f"| {name} | {took:.2f} | {took / seconds['detector']:.1%} |" for name, took in rows),
        "",
        f"Statistics (sums, mean and covariance) add {share:.1%} to the detector's time; the limit is {LIMIT:.0%}:"
        f" {'held' if share <= LIMIT else 'not held'}.",
        "",
    ]
    print("\n".join(lines))
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
