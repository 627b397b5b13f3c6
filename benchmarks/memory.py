"""Memory and time of a real training step at 1024 pixels on a CPU, beside what `sivae plan` expects. Prints a table and writes it.

    python -m benchmarks.memory [--output benchmarks/results] [--families conv style] [--batches 1 2] [--steps 2]

Every row is a process of its own, which takes some steps through the real DeepSpeed engines at the batch given. Measured is
what torch's allocator handed out during the last step, at its highest, beyond what lay there before it (weights, optimizer
and average): activations and, in passing, gradients. The peak of the resident set is the whole process, torch and DeepSpeed too.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.digits import machine
from sivae import config, distributed, randomness
from sivae.config import Config
from sivae.state import TrainingState, peak_memory_bytes
from sivae.step import train_step
from sivae.step_trace import example_pass, trace_step

FAMILIES = ("conv", "style")
SETTINGS = {
    "float32": ["engine.precision=float32"],
    "float32, all blocks computed again": ["engine.precision=float32", "engine.recompute_from_pixels=1"],
    "bfloat16": ["engine.precision=bfloat16"],
    "bfloat16, all blocks computed again": ["engine.precision=bfloat16", "engine.recompute_from_pixels=1"],
}
GIB = 2**30


def measure(settings: Config, batch_size: int, num_steps: int = 2) -> dict[str, float]:
    """Bytes and seconds of the last of `num_steps` steps of `batch_size` images on this CPU."""
    torch.manual_seed(0)
    with distributed.join("cpu") as group:
        state = TrainingState(settings, group, accumulation=1)
        for step in range(num_steps):
            passes = [example_pass(settings, batch_size)]
            randomness.seed_noise(0, step, 0)
            gc.collect()
            start = time.monotonic()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
                train_step(
                    state.encoder, state.decoder, state.target, state.objective, passes, state.gate, step,
                    lr_encoder=1e-4, lr_decoder=1e-4, ema_decay=0.5, graphs=state.graphs(1),
                )  # fmt: skip
            seconds = time.monotonic() - start
        if state.gate.read() is not None:
            raise RuntimeError("the step was not finite")
    return {
        "peak_bytes": live_and_peak_bytes(allocations)[1],
        "resident_bytes": peak_memory_bytes(group.device),
        "seconds": seconds,
    }


def live_and_peak_bytes(allocations: profile) -> tuple[int, int]:
    """What the allocator had handed out since the profile began: at its end, and the most at any time."""
    events = [e for e in allocations.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return live, peak


def settings_of(family: str, overrides: list[str]) -> Config:
    """The 1024-pixel recipe of a family; of one that grows, at its last level."""
    return config.load(f"configs/ffhq1024_{family}.yaml", overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=2, help="the last one is measured; the first is slower")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        family, batch_size, *overrides = options.one
        print(json.dumps(measure(settings_of(family, overrides), int(batch_size), options.steps)))
        return

    Path(options.output).mkdir(parents=True, exist_ok=True)
    first = "All are first steps. " if options.steps == 1 else ""
    head = HEAD.format(date=date.today(), machine=machine(), torch=torch.__version__, steps=options.steps, first=first)
    rows = []
    for batch_size in options.batches:
        for family in options.families:
            for name, overrides in SETTINGS.items():
                expected = trace_step(settings_of(family, overrides), batch_size, device_type="cpu").activation_bytes
                command = [
                    sys.executable, "-m", "benchmarks.memory", "--steps", str(options.steps), "--one", family, str(batch_size),
                    *overrides,
                ]  # fmt: skip
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                rows.append(
                    f"| {family} | {batch_size} | {name} | {expected / GIB:.2f} | {found['peak_bytes'] / GIB:.2f}"
                    f" | {expected / found['peak_bytes']:.2f} | {found['resident_bytes'] / GIB:.2f} | {found['seconds']:.0f} |"
                )
                print(rows[-1], flush=True)
                # At once: what was measured stays.
                Path(options.output, "memory.md").write_text(head + "\n".join(rows) + "\n")


HEAD = """\
# Memory of a training step at 1024 pixels: {date}, {machine}, torch {torch}

`python -m benchmarks.memory --steps {steps}`. {first}Networks: those of [ffhq1024_conv](../../configs/ffhq1024_conv.yaml) and
[ffhq1024_style](../../configs/ffhq1024_style.yaml), this one at its last level. Real steps through the real engines, on the CPU.
*Planned* is what `sivae plan` counts on shapes alone; *measured* what the step held at its highest beyond weights, optimizer
and average. The resident set is the whole process. The time is that of a shared machine, and says only that a step runs.

| family | batch | precision | planned GiB | measured GiB | planned / measured | resident GiB | seconds |
|---|---|---|---|---|---|---|---|
"""


if __name__ == "__main__":
    main()
