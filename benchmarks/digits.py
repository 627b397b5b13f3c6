"""How well the digits recipe learns, beside the published settings at the same images. Prints a table, writes it and a picture.

    python -m benchmarks.digits [--output benchmarks/results] [--only NAME ...] [--seeds 0 1 2]

Every row is a run of `sivae train` over 30 epochs (53,904 images), judged from its saved checkpoints in eval mode:
Fréchet distance in pixel space ([0, 1], 256 pixels) of 2,000 samples to the 1,797 digits, mean squared error of their
reconstruction. `train mode` rows judge the same checkpoint with BatchNorm in train mode, as published figures were made.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

import sivae
from sivae import config, images, trainer
from sivae.data import open_stream
from sivae.inference import Model
from sivae.metrics.frechet import frechet_distance, moments

PUBLISHED = [
    "model.norm=batch", "objective.beta_kl=1.0", "objective.beta_neg=256.0", "objective.gamma_r=1e-8", "schedule.batch_size=32",
    "encoder_optimizer.lr=2e-4", "encoder_optimizer.betas=[0.9,0.999]", "encoder_optimizer.schedule.warmup_images=0",
    "decoder_optimizer.lr=2e-4", "decoder_optimizer.betas=[0.9,0.999]", "decoder_optimizer.schedule.warmup_images=0",
    "ema.halflife_images=0",
]  # fmt: skip
CONV, STYLE = "configs/digits.yaml", "configs/digits_style.yaml"
RUNS = {
    CONV: (CONV, []),
    "the same with BatchNorm": (CONV, ["model.norm=batch"]),
    "published settings (BatchNorm)": (CONV, PUBLISHED),
    "published settings, GroupNorm": (CONV, [*PUBLISHED, "model.norm=group"]),
    STYLE: (STYLE, []),
}
EPOCH = 1797
SAMPLES = 2000


def judge(model: Model, real: torch.Tensor, train_mode: bool = False) -> tuple[float, float]:
    """Fréchet distance in pixel space and reconstruction error of a model; `real` uint8 [N, 1, 16, 16]."""
    if train_mode:
        # Batches of 32, whose statistics replace the saved ones; those change meanwhile, so this comes last.
        model.encoder.train()
        model.decoder.train()
    target, (low, high) = real.float() / 255, model.value_range
    # From the family's range to [0, 1], so that errors of all are on one scale.
    samples = ((model.sample(SAMPLES, seed=1, batch_size=32) - low) / (high - low)).clamp(0, 1)
    again = torch.cat([(model.reconstruct(part) - low) / (high - low) for part in real.split(32)])
    error = (again - target).square().mean().item()
    return frechet_distance(moments(samples.flatten(1).numpy()), moments(target.flatten(1).numpy())), error


def machine(gpu: bool = False) -> str:
    """The processor's name and its cores, as Linux tells; with `gpu` also the GPU that a run takes where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return f"{found}, {torch.cuda.get_device_name()}" if gpu and torch.cuda.is_available() else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    options = parser.parse_args()
    real_stream = open_stream("digits:", resolution=16, batch_size=1)
    real = real_stream.sample(range(len(real_stream))).images
    even, odd = real[::2].flatten(1).numpy() / 255, real[1::2].flatten(1).numpy() / 255
    lines = [
        f"# Digits: {time.strftime('%Y-%m-%d')}, {machine(gpu=True)}, torch {torch.__version__}",
        "",
        f"`python -m benchmarks.digits`. Floor of the distance, between two halves of the real digits: {frechet_distance(moments(even), moments(odd)):.2f}.",
        "",
        "| run | seed | mode | distance after 10, 20, 30 epochs | reconstruction error | minutes |",
        "|---|---|---|---|---|---|",
    ]
    grids = {"real": real[:16]}
    print("\n".join(lines))
    for name in options.only:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                overrides = [
                    f"run.directory={folder}", f"run.seed={seed}", f"run.checkpoint_images={10 * EPOCH}", "run.keep_checkpoints=9",
                    "tracking.tensorboard=false", "tracking.progress=false",
                ]  # fmt: skip
                start = time.monotonic()
                path, changes = RUNS[name]
                settings = config.load(path, [*overrides, *changes])
                trainer.train(settings)
                minutes = (time.monotonic() - start) / 60
                checkpoints = sorted((Path(folder) / "checkpoints").iterdir())[:3]
                batch_norm = getattr(settings.model, "norm", None) == "batch"
                for train_mode in (False, True)[: 1 + batch_norm]:
                    models = [sivae.load(str(path)) for path in checkpoints]
                    judged = [
                        judge(model, real, train_mode) if model.sample_shape == real.shape[1:] else None
                        for model in models
                    ]
                    distances, errors = (
                        " / ".join(f"{pair[i]:.{2 + 2 * i}f}" if pair else "still growing" for pair in judged)
                        for i in (0, 1)
                    )
                    mode = "train" if train_mode else "eval"
                    lines.append(f"| {name} | {seed} | {mode} | {distances} | {errors} | {minutes:.1f} |")
                    print(lines[-1], flush=True)
                model = sivae.load(str(checkpoints[-1]))
                grids.setdefault(f"{name}, 30 epochs", model.to_uint8(model.sample(32, seed=1)))
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "digits.md").write_text("\n".join([*lines, "", "![samples](digits.png)", ""]))
    (output / "digits.png").write_bytes(images.png_bytes(images.panels(grids, columns=16)))


if __name__ == "__main__":
    main()
