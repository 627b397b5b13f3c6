"""Image translation on drawn shapes, whose true translations are known. Prints a table, writes it and a picture.

    python -m benchmarks.translation [--output benchmarks/results] [--config configs/shapes_translation.yaml] [--seeds 0 1 2]
                                     [--images N] [--lpips FILE]

Both rows of models are runs of `sivae train` on the config: with its objective, and as a VAE (same networks, data, draws,
optimizers, beta_rec and beta_kl). Judged from saved checkpoints on the split `test`, of which training saw every class and
every content but never the pair: mean squared error, values in [0, 1], between D(class of i, content of j) and the true
image of that class and content, over all pairs of `--count` images that differ in both. Copying means to hand out i or j.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import sivae
from benchmarks.digits import machine
from sivae import config, images, trainer
from sivae.data.sources import open_source
from sivae.data.sources.shapes import NUM_CONTENTS
from sivae.images import to_float
from sivae.inference import Model
from sivae.metrics import features
from sivae.metrics.features import Lpips

ROWS = 8  # images on each side of the picture


class Pairs:
    """Every test image chosen as content (rows) with every one as class (columns), and the truth."""

    def __init__(self, resolution: int, count: int):
        source = open_source("shapes:", resolution=resolution)
        test = torch.as_tensor(source.splits["test"])
        # A stride that is prime to the number of images mixes classes and contents; after few steps all shapes and colours are there.
        self.numbers = test[torch.arange(count) * 61 % len(test)]
        classes, contents = self.numbers // NUM_CONTENTS, self.numbers % NUM_CONTENTS
        self.of = lambda i: torch.from_numpy(source[int(i)].pixels).permute(2, 0, 1).contiguous()
        self.images = torch.stack([self.of(i) for i in self.numbers])
        true = classes[None, :] * NUM_CONTENTS + contents[:, None]
        self.true = torch.stack([self.of(i) for i in true.flatten()]).unflatten(0, true.shape)
        self.both_differ = (classes[None, :] != classes[:, None]) & (contents[None, :] != contents[:, None])

    def error(self, found: Tensor) -> float:
        """Mean squared error of uint8 [N, N, C, H, W] over the pairs that differ in class and content."""
        squares = ((found.float() - self.true.float()) / 255).square().flatten(2).mean(dim=2)
        return squares[self.both_differ].mean().item()

    def distance(self, found: Tensor, lpips: Lpips) -> float:
        """Mean perceptual distance over the same pairs."""
        pairs = (to_float(cells.expand_as(self.true)[self.both_differ]).split(64) for cells in (found, self.true))
        return torch.cat([lpips(*parts) for parts in zip(*pairs)]).mean().item()

    def judge(self, model: Model, lpips: Lpips | None) -> tuple[float, float, float | None]:
        """Error of the translations and of the reconstructions, and the translations' perceptual distance."""
        again = model.to_uint8(model.reconstruct(self.images))
        error = ((again.float() - self.images.float()) / 255).square().mean().item()
        found = model.to_uint8(model.translate(self.images, self.images))
        return self.error(found), error, lpips and self.distance(found, lpips)

    def tiles(self, cells: Tensor) -> Tensor:
        """The corner of a table of all pairs, with its contents at the left and classes at the top."""
        part = self.images[:ROWS]
        return images.with_margins(cells[:ROWS, :ROWS], part, part)


def as_vae(settings: config.Config) -> config.Config:
    """The same run with the objective of a VAE."""
    tree = config.dump(settings)
    kept = ("reconstruction", "beta_rec", "beta_kl", "augment", "augment_probability")
    tree["objective"] = {"name": "vae"} | {name: tree["objective"][name] for name in kept}
    return config.parse(tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--config", default="configs/shapes_translation.yaml")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--images", type=int, help="length of the runs; the config's when not given")
    parser.add_argument("--lpips", metavar="FILE", help="TorchScript file of LPIPS, for a column of it")
    parser.add_argument("--count", type=int, default=48, help="test images that are paired with each other")
    options = parser.parse_args()
    length = [f"schedule.total_images={options.images}"] if options.images else []
    base = config.load(options.config, length)
    total, part = base.schedule.total_images, base.schedule.total_images // 4
    pairs = Pairs(base.model.resolution, options.count)
    lpips = features.open_lpips(options.lpips, base.model.resolution) if options.lpips else None
    more = f" --seeds {' '.join(map(str, options.seeds))}" + (f" --images {options.images}" if options.images else "")
    lines = [
        f"# Translation: {time.strftime('%Y-%m-%d')}, {machine(gpu=True)}, torch {torch.__version__}",
        "",
        f"`python -m benchmarks.translation{more}`: {options.config}, {total:,} images,"
        f" {int(pairs.both_differ.sum()):,} pairs. Error: mean squared, values in [0, 1].",
        "",
        f"| | seed | error of translation after 1/4, 1/2, 3/4 and all of the run | error of reconstruction |{' LPIPS of translation |' if lpips else ''}"
        " process seconds |",
        "|---" * (6 if lpips else 5) + "|",
    ]
    grids = {"true (rows: content, columns: class)": pairs.tiles(pairs.true)}
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)

    def add(line: str) -> None:
        """Kept at once: a run that is stopped leaves what it has."""
        lines.append(line)
        print(line, flush=True)
        (output / "translation.md").write_text("\n".join([*lines, "", "![translations](translation.png)", ""]))
        columns = ROWS + 1
        (output / "translation.png").write_bytes(images.png_bytes(images.panels(grids, columns)))

    print("\n".join(lines))
    copies = {"copying the content's image": pairs.images[:, None], "copying the class's image": pairs.images[None]}
    for name, copy in copies.items():
        far = f" {pairs.distance(copy, lpips):.4f} |" if lpips else ""
        add(f"| {name} | | {pairs.error(copy.expand_as(pairs.true)):.5f} | |{far} |")
    for seed in options.seeds:
        for name, change in {"VAE": as_vae, base.objective.name: lambda settings: settings}.items():
            with tempfile.TemporaryDirectory() as folder:
                overrides = [
                    f"run.directory={folder}", f"run.seed={seed}", f"run.checkpoint_images={part}", "run.keep_checkpoints=9",
                    "data.num_workers=0", "tracking.tensorboard=false", "tracking.progress=false", f"tracking.picture_images={total}",
                ]  # fmt: skip
                start = time.process_time()
                trainer.train(change(config.load(options.config, [*length, *overrides])))
                seconds = time.process_time() - start
                checkpoints = sorted((Path(folder) / "checkpoints").iterdir())
                found = [sivae.load(str(path)) for path in checkpoints]
                judged = [pairs.judge(model, lpips) for model in found]
                if seed == options.seeds[0]:
                    cells = found[-1].translate(pairs.images[:ROWS], pairs.images[:ROWS])
                    grids[name] = pairs.tiles(found[-1].to_uint8(cells))
                errors = " / ".join(f"{error:.5f}" for error, _, _ in judged)
                far = f" {judged[-1][2]:.4f} |" if lpips else ""
                add(f"| {name} | {seed} | {errors} | {judged[-1][1]:.5f} |{far} {seconds:.0f} |")


if __name__ == "__main__":
    main()
