"""Outliers on handwritten digits: a VAE beside Soft-IntroVAE, with the same network, images and settings. Prints a table, writes
it and two pictures.

    python -m benchmarks.ood [--output benchmarks/results] [--seeds 0 1 2] [--runs FOLDER]

Both are trained by configs/digits.yaml on three quarters of scikit-learn's digits and judged on the last quarter. The
outliers are that quarter altered, textures of the two photographs that scikit-learn ships, and noise. With --runs the trained
models are kept there, and found again.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import sivae
from benchmarks.digits import machine
from sivae import config, images, outliers, trainer
from sivae.config.objective import VaeObjective
from sivae.data import open_stream
from sivae.data.pack import pack
from sivae.inference import Model
from sivae.metrics import ood

RESOLUTION, NUM_SAMPLES = 16, 16
TOTAL_IMAGES = 39_510  # 30 epochs
MIN_CONTRAST = 20  # standard deviation of a patch's values, of 255
COLUMNS = 12  # of the picture of images
MODELS = ("VAE", "Soft-IntroVAE")


def packed_digits(folder: Path) -> str:
    """Three quarters to train on, one to judge by: drawn by a hash of the number, the same everywhere."""
    dest = folder / "digits"
    if not (dest / "index.json").exists():
        pack("digits:", str(dest), resolution=RESOLUTION, splits="test=25%", num_workers=0)
    return str(dest)


def kinds_of_outliers(digits: torch.Tensor, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """uint8 [N, 1, 16, 16] by name, as many of each as there are digits."""
    from sklearn.datasets import load_sample_images

    count = len(digits)
    place = torch.arange(-3, 4).float()
    weights = (-(place**2) / (2 * 1.2**2)).exp()
    window = torch.outer(weights, weights)[None, None] / weights.sum() ** 2
    blurred = F.conv2d(F.pad(digits.float(), (3, 3, 3, 3), mode="replicate"), window)
    grey = [torch.from_numpy(photo.mean(axis=2)) for photo in load_sample_images().images]
    patches = []
    while len(patches) < count:
        photo = grey[len(patches) % 2]
        top, left = (int(torch.randint(0, size - 2 * RESOLUTION, (), generator=draw)) for size in photo.shape)
        patch = F.avg_pool2d(photo[None, top : top + 2 * RESOLUTION, left : left + 2 * RESOLUTION].float(), 2)
        if patch.std() > MIN_CONTRAST:  # not of the sky
            patches.append(patch)
    noise = torch.randint(0, 256, digits.shape, generator=draw, dtype=torch.uint8)
    noisy = digits.float() + 40 * torch.randn(digits.shape, generator=draw)
    return {
        "rotated by 90 degrees": digits.rot90(1, (2, 3)),
        "inverted": 255 - digits,
        "blurred, deviation 1.2 pixels": blurred.round().to(torch.uint8),
        "with noise, deviation 40 of 255": noisy.clamp(0, 255).round().to(torch.uint8),
        "textures of photographs": torch.stack(patches).round().to(torch.uint8),
        "uniform noise": noise,
    }


def train(name: str, seed: int, data: str, runs: Path) -> tuple[Model, float]:
    """A trained model, and the minutes that took (of a run found again: about none)."""
    run = runs / f"{name}-{seed}"
    overrides = [
        f"run.directory={run}", f"run.seed={seed}", f"data.url={data}", f"schedule.total_images={TOTAL_IMAGES}",
        "tracking.tensorboard=false", "tracking.progress=false", "data.num_workers=0",
    ]  # fmt: skip
    settings = config.load("configs/digits.yaml", overrides)
    if name == "VAE":
        plain = VaeObjective(beta_rec=settings.objective.beta_rec, beta_kl=settings.objective.beta_kl)
        settings = settings.model_copy(update={"objective": plain})
    start = time.monotonic()
    trainer.train(settings)
    return sivae.load(str(run)), (time.monotonic() - start) / 60


def scores(model: Model, pictures: torch.Tensor) -> outliers.Scores:
    parts = [
        outliers.score(model, pictures[i : i + 64], range(i, min(i + 64, len(pictures))), num_samples=NUM_SAMPLES)
        for i in range(0, len(pictures), 64)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in outliers.SCORES}


def histograms(found: dict[str, dict[str, outliers.Scores]], inliers: dict[str, outliers.Scores]) -> bytes:
    """Rows are outliers, columns models: the negative ELBO of inliers and outliers, on a logarithmic axis."""
    import matplotlib.ticker

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(next(iter(found.values())))
    size = (9, 1.7 * len(kinds))
    figure, rows = pyplot.subplots(len(kinds), len(MODELS), figsize=size, layout="constrained", sharex="col")
    for column, name in enumerate(MODELS):
        everything = np.concatenate(
            [inliers[name]["negative_elbo"], *(s["negative_elbo"] for s in found[name].values())]
        )
        bins = np.geomspace(everything.min(), everything.max(), 60)
        for row, kind in enumerate(kinds):
            axes, inside, outside = (
                rows[row, column],
                inliers[name]["negative_elbo"],
                found[name][kind]["negative_elbo"],
            )
            for values, label, colour in ((inside, "digits", "#3b6fb6"), (outside, "outliers", "#d9822b")):
                axes.hist(
                    values, bins, weights=np.full(len(values), 1 / len(values)), alpha=0.6, color=colour, label=label
                )
            axes.axvline(ood.threshold(inside), color="black", lw=1, ls="--", label="95% of digits")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            axes.set_title(f"{name}, {kind}: AUROC {ood.separation(inside, outside).auroc[0]:.3f}", fontsize=8)
            axes.tick_params(labelsize=7)
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    for axes in rows[-1]:
        axes.set_xlabel("negative ELBO in nats", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--runs", help="keep the trained models in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(options.runs or scratch)
        runs.mkdir(parents=True, exist_ok=True)
        write(options, packed_digits(runs), runs)


def write(options: argparse.Namespace, data: str, runs: Path) -> None:
    stream = open_stream(data, split="test", resolution=RESOLUTION, batch_size=1)
    digits = stream.sample(range(len(stream))).images.contiguous()
    kinds = kinds_of_outliers(digits, torch.Generator().manual_seed(0))
    auroc: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
    first: dict[str, dict[str, outliers.Scores]] = {}
    inliers: dict[str, outliers.Scores] = {}
    grids, minutes = {}, []
    for seed in options.seeds:
        for name in MODELS:
            model, took = train(name, seed, data, runs)
            minutes.append(took)
            inside = scores(model, digits)
            found = {kind: scores(model, pictures) for kind, pictures in kinds.items()}
            for kind, outside in found.items():
                for score, result in outliers.compare(inside, outside).items():
                    auroc.setdefault((kind, score, name), []).append(result.auroc)
            if seed == options.seeds[0]:
                first[name], inliers[name] = found, inside
                for kind, pictures in {"digits": digits, **kinds}.items():
                    again = model.to_uint8(model.reconstruct(pictures[:COLUMNS]))
                    title = f"{kind}; below, as the VAE and as Soft-IntroVAE reconstruct them"
                    grids[title] = torch.cat([grids.get(title, pictures[:COLUMNS]), again])
            print(f"seed {seed}, {name}: {took:.1f} minutes", flush=True)
    lines = [
        f"# Outliers on digits: {time.strftime('%Y-%m-%d')}, {machine(gpu=True)}, torch {torch.__version__}",
        "",
        f"`python -m benchmarks.ood --seeds {' '.join(map(str, options.seeds))}`. A VAE and Soft-IntroVAE by configs/digits.yaml, {TOTAL_IMAGES:,} images; {len(digits)} digits"
        f" held out, as many outliers of each kind; {NUM_SAMPLES} latent draws. AUROC, mean over the seeds; in brackets"
        " the 95% bootstrap interval of each seed. Below 0.5 a score takes outliers for inliers.",
        "",
        "| outliers | score | VAE | Soft-IntroVAE | Soft-IntroVAE at least the VAE |",
        "|---|---|---|---|---|",
    ]
    behind, useless = [], []
    for kind in kinds:
        for score in outliers.SCORES:
            pair = [auroc[kind, score, name] for name in MODELS]
            means = [float(np.mean([value for value, _, _ in each])) for each in pair]
            intervals = (", ".join(f"{low:.3f} to {high:.3f}" for _, low, high in each) for each in pair)
            cells = (f"{mean:.3f} ({interval})" for mean, interval in zip(means, intervals))
            verdict = "yes" if means[1] >= means[0] else "no"
            behind += [f"{kind} by {score}"] if verdict == "no" else []
            useless += [f"{kind} by {score}"] if max(means) < 0.5 else []
            lines.append(f"| {kind} | {score} | {' | '.join(cells)} | {verdict} |")
    count = len(kinds) * len(outliers.SCORES)
    finding = f"Soft-IntroVAE's AUROC is at least the VAE's in {count - len(behind)} of {count} rows"
    lines += ["", f"{finding}; not in: {', '.join(behind)}." if behind else f"{finding}."]
    if useless:
        lines[-1] += f" Neither tells anything, with both below 0.5, in: {', '.join(useless)}."
    print("\n".join(lines))
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    pictures = ["", "![scores](ood.png)", "", "![images and their reconstructions](ood_images.png)", ""]
    (output / "ood.md").write_text("\n".join([*lines, *pictures]))
    (output / "ood.png").write_bytes(histograms(first, inliers))
    (output / "ood_images.png").write_bytes(images.png_bytes(images.panels(grids, columns=COLUMNS)))


if __name__ == "__main__":
    main()
