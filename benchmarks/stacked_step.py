"""What a step costs one model: stepped by itself as `sivae train` does, and in a stack. Prints a table and writes it.

    python -m benchmarks.stacked_step [--models 5] [--rounds 15] [--output benchmarks/results]

The published MLP at a batch of 512. One model at a time goes through the two engines (`sivae.step.train_step`, with draws,
gate and averages, without reading data); the stack through `sivae.stacked_step`. Both in turn in one process on one thread,
CPU time, the median of the rounds. The last row is what the products of the stack's hidden layers take by themselves: no way
of stepping these models on this processor can be faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.digits import machine
from sivae import distributed, models, objectives, randomness, toy2d
from sivae.data.toy2d import DENSITIES
from sivae.engines import Engine
from sivae.stacked_step import StackedModels
from sivae.step import FiniteGate, Pass, train_step

OBJECTIVES = {
    "VAE": objectives.Vae(0.2, 0.3),
    "IntroVAE": objectives.IntroVae(0.2, 0.3, margin=2.0),
    "Soft-IntroVAE": objectives.SoftIntroVae(0.2, 0.3, beta_neg=0.9, scale=0.5),
}
FIELDS = dict(family="mlp", sample_shape=[2], latent_dim=2, num_hidden=256, num_layers=3)
SIZE = 512
# Passes of a network that a step of the stack needs: 1 forward, 1 for the gradient by its input, 1 by its weights
PASSES = {"VAE": 6, "IntroVAE": 20, "Soft-IntroVAE": 24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    density, seeds = DENSITIES["8gaussians"], list(range(options.models))
    device = torch.device("cpu")

    def single(precision: str):
        gate = FiniteGate(group)
        engines = [
            Engine(
                network, group, lr=2e-4, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, clip_grad_norm=None, zero_stage=0,
                precision=precision, offload_optimizer=False, micro_batch_size=SIZE, accumulation=1, found_inf=gate.found_inf,
            )
            for network in models.build(**FIELDS)
        ]  # fmt: skip

        def step(objective, images_seen: int) -> None:
            x = density.sample(SIZE, randomness.generator(0, images_seen))
            draws = randomness.step_draws(0, range(images_seen, images_seen + SIZE), 2, device)
            train_step(
                *engines, None, objective, [Pass(x, None, draws)], gate, images_seen, lr_encoder=2e-4, lr_decoder=2e-4,
                ema_decay=0.99,
            )  # fmt: skip

        return step

    def stacked(precision: str):
        stack = StackedModels([models.build(seed=seed, **FIELDS) for seed in seeds], 2e-4, getattr(torch, precision))

        def step(objective, images_seen: int) -> None:
            stack.step(objective, *toy2d.step_draws(density, seeds, images_seen, SIZE, 2))

        return step

    with distributed.join("cpu") as group:
        ways = {
            ("one at a time", "float32"): (single("float32"), 1), ("one at a time", "bfloat16"): (single("bfloat16"), 1),
            ("stack", "float32"): (stacked("float32"), len(seeds)), ("stack", "bfloat16"): (stacked("bfloat16"), len(seeds)),
        }  # fmt: skip
        spent = {(name, way): [] for name in OBJECTIVES for way in ways}
        width, hidden = FIELDS["num_hidden"], FIELDS["num_layers"]
        factors = [torch.randn(len(seeds), *shape, dtype=torch.bfloat16) for shape in ((SIZE, width), (width, width))]
        products = []
        for number in range(options.rounds + 2):
            start = time.process_time()
            for _ in range(10 * hidden):
                torch.bmm(*factors)
            products.append((time.process_time() - start) / 10 / len(seeds))
            for name, objective in OBJECTIVES.items():
                for way, (step, count) in ways.items():
                    start = time.process_time()
                    step(objective, number * SIZE)
                    spent[name, way].append((time.process_time() - start) / count)
    lines = [
        "# Stacked steps",
        "",
        f"`python -m benchmarks.stacked_step --models {len(seeds)}` on {machine()}, torch {torch.__version__}; CPU milliseconds of one",
        "thread for a step of one model, median of the rounds, and how many times faster that is than one float32 model at a time.",
        "",
        f"| | {' | '.join(OBJECTIVES)} |",
        "|---|" + "---|" * len(OBJECTIVES),
    ]  # fmt: skip
    # The first two rounds warm up.
    cost = {key: 1e3 * statistics.median(values[2:]) for key, values in spent.items()}
    alone = next(iter(ways))
    for way in ways:
        cells = (f"{cost[name, way]:.1f} ({cost[name, alone] / cost[name, way]:.1f}x)" for name in OBJECTIVES)
        label = f"{way[0]}, {way[1]}" if way[0] != "stack" else f"stack of {len(seeds)}, {way[1]}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    least = 1e3 * statistics.median(products[2:])
    cells = (f"{count * least:.1f} ({cost[name, alone] / (count * least):.1f}x)" for name, count in PASSES.items())
    lines.append(f"| products of the stack alone, bfloat16 | {' | '.join(cells)} |")
    print("\n".join(lines))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "stacked_step.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
