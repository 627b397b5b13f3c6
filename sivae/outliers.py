"""Outliers by a model's scores: of each image, how unlike the training images the model finds it.

Scores, in nats, higher for outliers. With w = beta_rec / beta_kl of the model's training, its likelihood is
log p(x | z) = -w rec(x, decode(z)) + a constant, which is left out: it is the same for every image.

negative_elbo        E_q[w rec] + KL(q(z | x) || p(z)), the first over K draws (Daniel and Tamar, arXiv 2012.13253, section 5)
kl                   KL(q(z | x) || p(z))
reconstruction       rec(x, decode(mu)), unweighted
importance_weighted  -log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x), which nears -log p(x) as K grows (Burda et al.,
                     arXiv 1509.00519)
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sivae.data import ImageStream
from sivae.errors import UserError, shown
from sivae.evaluate import keep
from sivae.images import to_float
from sivae.inference import Model, weights_digest
from sivae.metrics import ood
from sivae.objectives import kl, reconstruction_error, reparameterize
from sivae.progress import progress_bar
from sivae.randomness import score_draws
from sivae.storage import Folder

SCORES = ("negative_elbo", "kl", "reconstruction", "importance_weighted")
BATCH = 64
PERCENTS = 100  # steps of the inliers' quantiles that are kept; a threshold takes as many inliers

Scores = dict[str, np.ndarray]


def weighting(model: Model) -> tuple[str, float]:
    """The reconstruction error and w of the model's training; mse and 1 for a model that does not know its training."""
    trained = model.info.get("objective") or {}
    beta_rec, beta_kl = trained.get("beta_rec", 1.0), trained.get("beta_kl", 1.0)
    return trained.get("reconstruction", "mse"), beta_rec / beta_kl if beta_kl else 1.0


@torch.no_grad()
def score(model: Model, images: Tensor, numbers: range, *, num_samples: int = 16, seed: int = 0) -> Scores:
    """Every score of uint8 images [B, C, H, W], each float64 [B]; image `numbers` decide the draws."""
    if model.num_classes:
        raise UserError(
            "outliers: this model is conditional on classes, and an outlier has none; take an unconditional one"
        )
    kind, weight = weighting(model)
    x = to_float(images.to(model.device), *model.value_range)
    mu, logvar = model.encode(images)
    divergence = kl(mu, logvar).double()
    draws = score_draws(seed, numbers, model.latent_dim, num_samples).to(model.device)
    errors, logs = [], []
    for eps in draws.unbind(1):
        z = reparameterize(mu, logvar, eps)
        error = reconstruction_error(x, model.decode(z), kind).double()
        log_ratio = 0.5 * (eps.double().square() - z.double().square() + logvar.double()).sum(dim=1)  # p(z) / q(z | x)
        errors.append(error)
        logs.append(log_ratio - weight * error)
    found = {
        "negative_elbo": weight * torch.stack(errors).mean(dim=0) + divergence,
        "kl": divergence,
        "reconstruction": reconstruction_error(x, model.decode(mu), kind).double(),
        "importance_weighted": math.log(num_samples) - torch.stack(logs).logsumexp(dim=0),
    }
    return {name: value.cpu().numpy() for name, value in found.items()}


def check_sets(inliers: ImageStream, outliers: ImageStream, count: int | None) -> None:
    """Raises UserError for sets from which nothing, or no threshold, can be told."""
    if inliers.digest == outliers.digest:
        raise UserError("--outlier: is the same set of images as --inlier")
    for stream in (inliers, outliers):
        if count is not None and count > len(stream):
            raise UserError(f"--count: {count:,} images are asked for; {stream.where} has {len(stream):,}")
    found = len(inliers) if count is None else count
    if found < PERCENTS:
        raise UserError(f"{inliers.where}: {found} inliers are too few for a threshold; give {PERCENTS} or more")


def score_set(model: Model, stream: ImageStream, *, count: int | None, num_samples: int, seed: int) -> Scores:
    """Every score of the first `count` images, or of all. Raises UserError when one is not finite."""
    count = len(stream) if count is None else count
    parts = []
    with progress_bar(count, f"scoring {stream.where}", " images") as bar:
        for first in range(0, count, BATCH):
            numbers = range(first, min(first + BATCH, count))
            images = stream.sample(numbers).images
            parts.append(score(model, images, numbers, num_samples=num_samples, seed=seed))
            bar.update(len(numbers))
    found = {name: np.concatenate([part[name] for part in parts]) for name in SCORES}
    for name, values in found.items():
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise UserError(f"{name} of {bad:,} images of {stream.where} is not finite; nothing is judged")
    return found


def compare(inliers: Scores, outliers: Scores, seed: int = 0) -> dict[str, ood.Separation]:
    return {name: ood.separation(inliers[name], outliers[name], seed) for name in inliers}


def table(results: dict[str, ood.Separation]) -> list[str]:
    """Lines of a Markdown table, with 95% confidence intervals."""
    lines = ["| score | AUROC | AUPR | FPR at 95% TPR |", "|---|---|---|---|"]
    for name, found in results.items():
        cells = (
            f"{value:.3f} ({low:.3f} to {high:.3f})"
            for value, low, high in (found.auroc, found.aupr, found.fpr_at_95_tpr)
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def write_figures(
    folder: Folder, model: Model, results: dict[str, ood.Separation], sets: dict[str, tuple[ImageStream, str]], count: int | None,
    num_samples: int, seed: int,
) -> str:  # fmt: skip
    """Keep what `compare` found of the first `count` images of each of `sets`, by name (with their URLs); see `evaluate.keep`."""
    kind, weight = weighting(model)
    protocol = {
        "sets": {
            name: {"digest": stream.digest, "split": list(stream.index.splits), "count": count or len(stream)}
            for name, (stream, _) in sets.items()
        },
        "num_samples": num_samples, "seed": seed, "kept": ood.KEPT, "reconstruction": kind, "reconstruction_weight": weight,
    }  # fmt: skip
    figures = {
        score: {figure: dict(zip(("value", "low", "high"), ends)) for figure, ends in asdict(found).items()}
        for score, found in results.items()
    }
    return keep(folder, "ood-", figures, protocol, model, {"data": {name: url for name, (_, url) in sets.items()}})


# The threshold, and what it says of one image


@dataclass(frozen=True)
class Verdict:
    """Of one image; `sentence` says it with the share of inliers that score as high."""

    is_outlier: bool
    score: float
    threshold: float
    sentence: str


def calibrate(
    model: Model, inliers: Scores, stream: ImageStream, name: str, num_samples: int, seed: int
) -> dict[str, Any]:
    """What `judge` needs: thresholds that 95% of the inliers keep, and what they belong to; `name` is what a person calls the set."""
    count = len(next(iter(inliers.values())))
    return {
        "format": 1, "weights_sha256": weights_digest(model), "num_samples": num_samples, "seed": seed,
        "kept": ood.KEPT, "inliers": {"name": name, "digest": stream.digest, "count": count},
        "scores": {
            name: {
                "threshold": ood.threshold(values),
                "quantiles": np.quantile(values, np.linspace(0, 1, PERCENTS + 1)).tolist(),
            }
            for name, values in inliers.items()
        },
    }  # fmt: skip


def calibration_file(model: Model) -> str:
    """Its name beside a model. Checkpoints of a run have other weights, and each its own."""
    return f"outliers-{weights_digest(model)[:12]}.json"


def write_calibration(folder: Folder, model: Model, calibration: dict[str, Any]) -> str:
    """Returns the file's path or URL, as it may be shown."""
    folder.write(json.dumps(calibration, indent=1).encode(), calibration_file(model))
    return f"{shown(folder.url)}/{calibration_file(model)}"


def read_calibration(folder: Folder, model: Model) -> dict[str, Any]:
    """Raises UserError when there is none of these weights."""
    again, name = "run sivae ood MODEL --inlier URL --outlier URL", calibration_file(model)
    if not folder.exists(name):
        raise UserError(f"{shown(folder.url)}: no threshold is calibrated for these weights; {again} first")
    try:
        calibration = json.loads(folder.read(name))
        whole = (
            calibration["weights_sha256"] == weights_digest(model)
            and all(isinstance(calibration[key], int) for key in ("num_samples", "seed"))
            and 0 < calibration["kept"] < 1
            and calibration["inliers"]["count"] > 0
            and isinstance(calibration["inliers"]["name"], str)
            and all(
                math.isfinite(
                    sum([calibration["scores"][score]["threshold"], *calibration["scores"][score]["quantiles"]])
                )
                for score in SCORES
            )
        )
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{shown(folder.url)}/{name}: is damaged; {again} again")
    return calibration


def inliers_of_calibration(folder: Folder, model: Model) -> str | None:
    """Their name, where thresholds of these weights are kept."""
    try:
        return read_calibration(folder, model)["inliers"]["name"]
    except UserError:
        return None


def carry_calibration(source: Folder, dest: Folder, model: Model) -> None:
    """Copy the thresholds of a model's weights, where there are any, to where it is exported."""
    if source.exists(name := calibration_file(model)):
        dest.write(source.read(name), name)


def judge(model: Model, image: Tensor, calibration: dict[str, Any], name: str = "negative_elbo") -> Verdict:
    """Whether one uint8 image [1, C, H, W] scores above the threshold."""
    settings = {"num_samples": calibration["num_samples"], "seed": calibration["seed"]}
    value = float(score(model, image, range(1), **settings)[name][0])
    if not math.isfinite(value):
        raise UserError(f"{name} of this image is not finite; nothing is judged")
    held = calibration["scores"][name]
    limit, quantiles, inliers = held["threshold"], held["quantiles"], calibration["inliers"]
    is_outlier = value > limit
    percent = 100 * (1 - np.interp(value, quantiles, np.linspace(0, 1, len(quantiles))))
    sentence = (
        f"{'outlier' if is_outlier else 'inlier'}; {name} is {value:.4g}, and {calibration['kept']:.0%} of {inliers['count']:,} inliers"
        f" ({inliers['name']}) stay below {limit:.4g}; {'less than 1' if percent < 1 else f'about {percent:.0f}'}% of them score as high"
    )
    return Verdict(is_outlier, value, limit, sentence)


# The picture


def histograms(
    inliers: Scores, outliers: Scores, results: dict[str, ood.Separation], inlier_name: str, outlier_name: str
) -> bytes:
    """A PNG: for each score, how inliers and outliers are distributed, and the threshold that keeps 95% of the inliers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    all_axes = figure.subplots(2, 2)
    for axes, name in zip(all_axes.flat, inliers):
        low, high = np.quantile(np.concatenate([inliers[name], outliers[name]]), [0.0, 0.995])
        bins = np.linspace(low, high if high > low else low + 1, 60)
        for values, label, colour in (
            (inliers[name], inlier_name, "#3b6fb6"),
            (outliers[name], outlier_name, "#d9822b"),
        ):
            shares = np.full(len(values), 1 / len(values))
            # What lies beyond is in the last bar.
            axes.hist(values.clip(bins[0], bins[-1]), bins, weights=shares, alpha=0.6, color=colour, label=label)
        axes.axvline(ood.threshold(inliers[name]), color="black", lw=1, ls="--", label="95% of inliers")
        axes.set_title(f"{name}: AUROC {results[name].auroc[0]:.3f}", fontsize=10)
        axes.set_xlabel("summed error" if name == "reconstruction" else "nats", fontsize=8)
        axes.set_ylabel("share of images", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.legend(*all_axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()
