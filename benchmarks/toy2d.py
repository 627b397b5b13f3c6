"""The 2D table of the Soft-IntroVAE paper: {VAE, IntroVAE, Soft-IntroVAE} on densities in the plane, mean over seeds.

    python benchmarks/toy2d.py [--densities NAME ...] [--methods NAME ...] [--seeds N ...] [--table-only]

A cell is a method on a density: the recipe of configs/toy2d, 2,000 steps as a VAE and 28,000 more, of 512 points. Its missing
seeds are trained together, and their figures stored under results/toy2d as soon as they are there; killed and run again, it
goes on. At the end of each cell, and with --table-only at once, it writes the table and the pictures of what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from sivae import config, toy2d
from sivae.data.toy2d import DENSITIES

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"vae": "VAE", "intro_vae": "IntroVAE", "soft_intro_vae": "Soft-IntroVAE"}
FIGURES = {
    "gnelbo": "gnELBO (1e-7)", "kl": "KL", "jsd": "JSD", "histogram_kl": "textbook KL", "histogram_jsd": "textbook JSD",
}  # fmt: skip


def read(output: Path, density: str, method: str, precision: str) -> dict[int, dict]:
    """Stored figures by seed."""
    path = cell_file(output, density, method, precision)
    return {entry["seed"]: entry for entry in json.loads(path.read_text())} if path.exists() else {}


def cell_file(output: Path, density: str, method: str, precision: str) -> Path:
    suffix = "" if precision == "bfloat16" else f"-{precision}"
    return output / "toy2d" / f"{density}-{method}{suffix}.json"


def train_missing(output: Path, work: Path, density: str, method: str, seeds: list[int], precision: str) -> None:
    done = read(output, density, method, precision)
    missing = [seed for seed in seeds if seed not in done]
    if not missing:
        return
    name = f"{density}-{method}-{precision}-{'-'.join(map(str, missing))}"
    settings = config.load(
        str(ROOT / "configs" / "toy2d" / f"{density}.yaml"),
        [f"run.directory={work / name}", f"run.seeds={missing}", f"method={method}", f"run.precision={precision}"],
        toy2d.Toy2dConfig,
    )
    for entry in toy2d.train(settings, f"{density} {method} {missing}"):
        done[entry["seed"]] = entry
    path = cell_file(output, density, method, precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([done[seed] for seed in sorted(done)], indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--densities", nargs="*", choices=list(DENSITIES), default=["8gaussians", "2spirals", "checkerboard", "rings"])  # fmt: skip
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=["vae", "soft_intro_vae", "intro_vae"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "toy2d-benchmark", help="states of what is trained"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        for density in options.densities if not options.table_only else ():
            for method in options.methods:
                train_missing(options.output, options.work, density, method, options.seeds, options.precision)
    except toy2d.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
