"""The 2D table of the Soft-IntroVAE paper: {VAE, IntroVAE, Soft-IntroVAE} on densities in the plane, mean over seeds.

    python -m benchmarks.toy2d [--densities NAME ...] [--methods NAME ...] [--seeds N ...] [--table-only]

A cell is a method on a density: the recipe of configs/toy2d, 2,000 steps as a VAE and 28,000 more, of 512 points. Its missing
seeds are trained together, and their figures stored under results/toy2d as soon as they are there; killed and run again, it
goes on. After each cell, and with --table-only at once, it writes the table and the pictures of what there is. --unfinished
judges also what has been stopped on the way; the table says after how many steps. A seed that is done in one precision is done.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import sivae
from sivae import config, toy2d
from sivae.data.toy2d import DENSITIES

ROOT = Path(__file__).resolve().parents[1]
# What a row is called, the method, settings beside the recipe's
METHODS = {
    "vae": ("VAE", "vae", []),
    "vae_sharp": (
        "VAE, beta_rec 1, beta_kl 0.05",
        "vae",
        ["objectives.vae.beta_rec=1.0", "objectives.vae.beta_kl=0.05"],
    ),
    "soft_intro_vae": ("Soft-IntroVAE", "soft_intro_vae", []),
    "intro_vae": ("IntroVAE", "intro_vae", []),
}
BATCH_SIZE, STEPS = 512, 30_000
PAPER = ["8gaussians", "2spirals", "checkerboard", "rings"]
FIGURES = {
    "gnelbo": ("gnELBO (1e-7)", 1e7, 2), "kl": ("KL", 1, 2), "jsd": ("JSD", 1, 2),
    "histogram_kl": ("textbook KL", 1, 3), "histogram_jsd": ("textbook JSD", 1, 3),
}  # fmt: skip


def cell_file(output: Path, density: str, method: str) -> Path:
    return output / "toy2d" / f"{density}-{method}.json"


def read(output: Path, density: str, method: str) -> dict[int, dict]:
    """Stored figures by seed."""
    path = cell_file(output, density, method)
    return {entry["seed"]: entry for entry in json.loads(path.read_text())} if path.exists() else {}


def read_settings(options: argparse.Namespace, density: str, method: str, *overrides: str) -> toy2d.Toy2dConfig:
    _, name, own = METHODS[method]
    path = ROOT / "configs" / "toy2d" / f"{density}.yaml"
    fixed = [f"method={name}", f"run.precision={options.precision}"]
    return config.load(str(path), [*fixed, *own, *overrides], toy2d.Toy2dConfig)


def train_missing(options: argparse.Namespace, density: str, method: str) -> None:
    whole = read_settings(options, density, method).schedule.total_images
    done = read(options.output, density, method)
    missing = [seed for seed in options.seeds if seed not in done or done[seed]["images_seen"] < whole]
    if missing:
        directory = options.work / f"{density}-{method}-{options.precision}-{'-'.join(map(str, missing))}"
        settings = read_settings(options, density, method, f"run.directory={directory}", f"run.seeds={missing}")
        store(options, density, method, toy2d.train(settings, f"{density} {method} {missing}"))


def judge_unfinished(options: argparse.Namespace, density: str, method: str) -> None:
    """Figures of models whose run has a state but no figures yet, from a copy of the state."""
    for directory in options.work.glob(f"{density}-{method}-{options.precision}-*[0-9]"):
        if not (directory / toy2d.STATE_FILE).exists() or (directory / toy2d.FIGURES_FILE).exists():
            continue
        copy = directory.with_name(f"{directory.name}-unfinished")
        copy.mkdir(exist_ok=True)
        shutil.copy(directory / toy2d.STATE_FILE, copy)
        state = load_file(copy / toy2d.STATE_FILE)
        overrides = [f"run.directory={copy}", f"run.seeds={state['seeds'].tolist()}"]
        # Nothing is left to train of a run that ends where it is.
        overrides.append(f"schedule.total_images={int(state['images_seen'])}")
        store(options, density, method, toy2d.train(read_settings(options, density, method, *overrides)))


def store(options: argparse.Namespace, density: str, method: str, figures: list[dict]) -> None:
    """Beside those of other seeds, and in place of the same seed's where they are of more images."""
    entries = read(options.output, density, method)
    for entry in figures:
        if entry["images_seen"] >= entries.get(entry["seed"], entry)["images_seen"]:
            entries[entry["seed"]] = entry | {"precision": options.precision}
    path = cell_file(options.output, density, method)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([entries[seed] for seed in sorted(entries)], indent=1) + "\n")


def row(label: str, seeds: dict[int, dict]) -> str:
    """A line of the table: mean and standard deviation over the finite seeds."""
    finite = [entry for entry in seeds.values() if entry["finite"]]
    cells = []
    for name, (_, factor, digits) in FIGURES.items():
        cells.append(spread([entry[name] * factor for entry in finite], digits) or "-")
    modes = [f"{entry['modes']}/{entry['num_modes']}" for entry in finite if "modes" in entry]
    on_mode = [entry["on_mode"] for entry in finite if "on_mode" in entry]
    cells += [", ".join(modes), f"{statistics.mean(on_mode):.2f}" if on_mode else "", f"{len(finite)} of {len(seeds)}"]
    precise = sum(entry["precision"] == "float32" for entry in seeds.values())
    if precise:
        label += f" ({precise} of {len(seeds)} in float32)"
    steps = sorted({entry["images_seen"] // BATCH_SIZE for entry in seeds.values()})
    if steps != [STEPS]:
        label += f" (after {', '.join(f'{count:,}' for count in steps)} steps)"
    return f"| {label} | {' | '.join(cells)} |"


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation, as far as there are any."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}" if values else ""


@functools.cache
def real_points(density: str) -> dict[str, list[float]]:
    """The figures of a second set of real points in place of a model's, drawn five times."""
    points, found = DENSITIES[density], []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        real, second = (points.sample(toy2d.NUM_POINTS_FINE, generator).numpy() for _ in range(2))
        found.append(toy2d.divergences(real, second, points.limit))
    return {name: [entry[name] for entry in found] for name in found[0]}


def verdict(output: Path, density: str, of_real: dict[str, float]) -> str:
    """How Soft-IntroVAE's means compare; they fall short above half of a VAE's, or above IntroVAE's. `of_real`: those of a second
    set of real points."""
    means = {}
    for method in METHODS:
        finite = [entry for entry in read(output, density, method).values() if entry["finite"]]
        if finite:
            means[method] = {name: statistics.mean(entry[name] for entry in finite) for name in ("kl", "jsd")}
    if "soft_intro_vae" not in means:
        return "Soft-IntroVAE has not been trained on it yet."
    ours, said = means.pop("soft_intro_vae"), []
    if not means:
        return "Nothing to compare Soft-IntroVAE with has been trained on it yet."
    for method, theirs in means.items():
        for name in ("kl", "jsd"):
            ratio = ours[name] / theirs[name]
            bound = 1.0 if method == "intro_vae" else 0.5
            real = of_real[name] / theirs[name]
            falls_short = "" if ratio <= bound else f" (**falls short**; real points: {real:.2g})"
            said.append(f"{name.upper()} {ratio:.2g} times that of {METHODS[method][0]}{falls_short}")
    said += coverage(list(read(output, density, "soft_intro_vae").values()))
    return f"Soft-IntroVAE: {'; '.join(said)}."


def coverage(entries: list[dict]) -> list[str]:
    """Whether every seed is finite, and covers every mode where the density has modes."""
    finite = [entry for entry in entries if entry["finite"]]
    told = [
        f"{len(finite)} of {len(entries)} seeds finite{'' if len(finite) == len(entries) else ' (**falls short**)'}"
    ]
    if any("modes" in entry for entry in finite):
        whole = sum(entry["modes"] == entry["num_modes"] and entry["on_mode"] > 0.5 for entry in finite)
        told.append(
            f"every mode covered by {whole} of {len(entries)}{'' if whole == len(entries) else ' (**falls short**)'}"
        )
    return told


def write_table(options: argparse.Namespace) -> None:
    heads = ["", *(head for head, _, _ in FIGURES.values()), "modes of each seed", "on a mode", "finite"]
    lines = [
        "# Densities in the plane",
        "",
        f"`python -m benchmarks.toy2d --densities {' '.join(DENSITIES)}`, of rows in float32 with `--precision float32`; sivae",
        f"{sivae.__version__}, torch {torch.__version__}; 30,000 steps of 512 points, bfloat16 in the hidden layers where a row does not say",
        "float32. Mean and standard deviation over as many seeds as the last column says; what is missing has not been trained yet. Lower is better everywhere but in the two columns of modes. gnELBO, KL and JSD are the",
        "published figures, which are no divergences; the textbook's beside them are in nats (see sivae/metrics/toy2d.py). The betas are",
        "those of the published README, which gives one set for each density; as they blur a VAE, a row has a VAE with sharper ones.",
        "The last row is what a model would get that draws from the density itself. The published figures, of 5,000 points in 10,000 bins,",
        "are far from 0 there wherever the density is spread over many bins. A mode is covered that has a tenth of its fair share of the",
        "points that are on modes; where few are, as of a blurred VAE, that says nothing. Pictures have exp(ELBO) above, each by its own scale, and",
        "samples below, of one seed, and only the methods that were there when they were drawn.",
    ]  # fmt: skip
    for density in [*PAPER, "25gaussians"]:
        rows = [
            row(label, seeds)
            for method, (label, _, _) in METHODS.items()
            if (seeds := read(options.output, density, method))
        ]
        if rows:
            lines += ["", f"## {density}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows]
            second = real_points(density)
            of_real = {name: statistics.mean(second[name]) for name in ("kl", "jsd")}
            cells = (spread(second.get(name, []), digits) for name, (_, _, digits) in FIGURES.items())
            lines += [f"| a second set of real points | {' | '.join(cells)} | | | |"]
            lines += ["", verdict(options.output, density, of_real)]
            if draw(options, density):
                lines += ["", f"![densities and samples](toy2d/{density}.png)"]
    (options.output / "toy2d.md").write_text("\n".join([*lines, ""]))


def draw(options: argparse.Namespace, density: str) -> bool:
    """A model of each method that has figures side by side, where all are still in the work folder; whether there is a picture."""
    found = {}
    judged = [method for method in METHODS if cell_file(options.output, density, method).exists()]
    for method in judged:
        models = sorted(options.work.glob(f"{density}-{method}-*float*[0-9]/models/*"), key=lambda path: int(path.name))
        if models:
            found[METHODS[method][0].replace(", ", "\n", 1)] = sivae.load(str(models[0]))
    path = options.output / "toy2d" / f"{density}.png"
    if len(found) == len(judged):
        path.write_bytes(toy2d.draw(DENSITIES[density], found))
    return path.exists()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--densities", nargs="*", choices=list(DENSITIES), default=PAPER)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the hidden layers")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "toy2d-benchmark", help="states of what is trained"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--unfinished", action="store_true", help="train nothing, judge what has been stopped on the way"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        for density in () if options.table_only else options.densities:
            for method in options.methods:
                (judge_unfinished if options.unfinished else train_missing)(options, density, method)
                write_table(options)
    except toy2d.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 75
    write_table(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
