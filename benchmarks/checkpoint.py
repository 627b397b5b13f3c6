"""What a checkpoint costs the step that begins it, and those that follow while it is written. Prints a table and writes it.

    python -m benchmarks.checkpoint [--resolution 64] [--batch-size 4] [--rounds 3] [--output benchmarks/results]

The networks of configs/celebahq256_conv.yaml, with a level less for each halving of its pixels, trained by the trainer itself
on drawn shapes. Each round: steps by themselves; a save in the background; one that is
waited for, as all were before. The state is 16 bytes a parameter: weights, their average and Adam's two moments.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from benchmarks.digits import machine
from sivae import checkpoint, config, distributed
from sivae.checkpoint import to_safetensors
from sivae.interval import Interval
from sivae.trainer import Trainer

NUM_NORMAL, MAX_DURING = 6, 12  # steps by themselves in a round; at most so many while a save is under way
TICK_SEC = 0.001
CHANNELS = [64, 128, 256, 512, 512, 512]


def seconds(work: Callable[[], Any]) -> np.ndarray:
    """[2]: on the clock, and of the processor in this thread alone, which other programs of the machine do not lengthen."""
    start = np.array([time.perf_counter(), time.thread_time()])
    work()
    return np.array([time.perf_counter(), time.thread_time()]) - start


def longest_pause(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of `work`, and the longest that it kept another Python thread from running."""
    pauses, done = [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(TICK_SEC)
            now = time.perf_counter()
            pauses.append(now - last - TICK_SEC)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    spent = seconds(work)[0]
    done.set()
    thread.join()
    return spent, max(pauses)


def measure(trainer: Trainer, rounds: int) -> dict[str, list[np.ndarray]]:
    """`seconds` by kind: normal and during steps, the step and the save of either kind, and how long a save was under way."""
    batches = trainer.levels.stream.batches(trainer.images_seen)
    trainer.interval = Interval(trainer.images_seen)
    found: dict[str, list[np.ndarray]] = {
        name: [] for name in ("normal", "begins", "copies", "during", "writes", "waits")
    }

    def step() -> None:
        trainer._step(next(batches))
        trainer.state.gate.read()

    for number in range(rounds + 1):
        normal = [seconds(step) for _ in range(NUM_NORMAL)]
        after_step = seconds(step)
        start = time.perf_counter()
        copies = seconds(trainer._save)
        begins, during = after_step + copies, []
        while not trainer.saver.has_news and len(during) < MAX_DURING:
            during.append(seconds(step))
        trainer._settle()
        writes = np.full(2, time.perf_counter() - start)
        step()
        waits = seconds(step) + seconds(lambda: trainer._save(waits=True))
        if number:  # the first warms up
            for name, values in (
                ("normal", normal), ("begins", [begins]), ("copies", [copies]), ("during", during[:-1] or during), ("writes", [writes]),
                ("waits", [waits]),
            ):  # fmt: skip
                found[name] += values
    return found


def cells(spent: np.ndarray, normal: np.ndarray) -> str:
    return " | ".join(f"{value:.2f} | {value / one:.2f}" for value, one in zip(spent, normal))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    channels = CHANNELS[: options.resolution.bit_length() - 3]  # down to 4 pixels, as at 256
    with tempfile.TemporaryDirectory() as folder, distributed.join() as group:
        settings = config.load(
            "configs/celebahq256_conv.yaml",
            [
                f"run.directory={folder}/run", f"data.cache_dir={folder}/cache", "data.url='shapes:'", "data.num_workers=0",
                "data.flip=false", f"model.resolution={options.resolution}", f"model.channels={channels}", f"schedule.batch_size={options.batch_size}",
                "tracking.progress=false", "tracking.tensorboard=false",
                f"engine.precision={'bfloat16' if group.device.type == 'cuda' else 'float32'}", "run.cpu_threads=1",
            ],
        )  # fmt: skip
        torch.set_num_threads(1)
        trainer = Trainer(settings, group, lambda metrics, name: None)
        found = measure(trainer, options.rounds)
        tensors = trainer.state.tensors()
        size = sum(value.numel() * value.element_size() for named in tensors.values() for value in named.values())
        trainer.background.close()
        trainer.tracker.close()
        weights = tensors["optimizer"]
        parts = to_safetensors(weights)
        pauses = {
            "copying it together with `safetensors.torch.save` (as before)": longest_pause(
                lambda: save_tensors(weights)
            ),
            "listing its parts (now)": longest_pause(lambda: to_safetensors(weights)),
            "sha256": longest_pause(lambda: [hashlib.sha256(part).digest() for part in parts]),
            "writing the file": longest_pause(lambda: trainer.folder.write(parts, "probe")),
        }
        optimizer_bytes = sum(map(len, parts))
        assert checkpoint.list_names(trainer.folder)
    middle = {name: np.median(values, axis=0) for name, values in found.items()}
    rows = [
        ("a step by itself", "normal"), ("a step that begins a save", "begins"), ("of that: the copy", "copies"),
        ("a step while a save is written", "during"), ("a step with a save that is waited for", "waits"),
    ]  # fmt: skip
    lines = [
        f"# Checkpoints in the background: {time.strftime('%Y-%m-%d')}",
        "",
        f"`python -m benchmarks.checkpoint --resolution {options.resolution} --batch-size {options.batch_size} --rounds {options.rounds}` on {machine()}"
        f"{'' if group.device.type == 'cpu' else ', ' + torch.cuda.get_device_name()}, torch {torch.__version__}, one thread for training,",
        f"a local disk. The networks of configs/celebahq256_conv.yaml at {options.resolution} pixels, {options.batch_size} images a step; a checkpoint of {size / 1e6:,.0f} MB. Medians.",
        "Where a machine is shared, the clock also counts what other programs took; the processor's time does not, nor does it count waiting.",
        "",
        "| | seconds | times a step | seconds of the training thread's processor | times a step |",
        "|---|---|---|---|---|",
        *(f"| {label} | {cells(middle[name], middle['normal'])} |" for label, name in rows),
        "",
        f"From the copy's begin a checkpoint was published after {middle['writes'][0]:.1f} s; {len(found['during'])} steps were measured meanwhile, of all rounds together.",
        "",
        f"What keeps Python's lock (optimizer.safetensors, {optimizer_bytes / 1e6:,.0f} MB; the longest that another thread had to wait):",
        "",
        "| work | seconds | longest wait, ms |",
        "|---|---|---|",
        *(f"| {label} | {spent:.2f} | {1e3 * pause:.0f} |" for label, (spent, pause) in pauses.items()),
        "",
    ]  # fmt: skip
    print("\n".join(lines))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "checkpoint.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
