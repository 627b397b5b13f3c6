"""The published training step against ours: speed, memory, FLOPs, and what each switch brings. Prints a table and writes it.

    python -m benchmarks.step [--cases conv32 mlp ...] [--rounds 5] [--device auto] [--output benchmarks/results]

The published step is benchmarks/published.py. Ours is that of `sivae train`: both DeepSpeed engines, draws, the gate against
non-finite losses, gradient norms, the running averages. Every contender of a case is a process of its own and all live through
the case; in each round they take turns, so that a slow minute of the machine falls on all. Shown are medians over the rounds,
and ratios are medians of the ratios within a round. On a CPU the clock is that of the process, with one thread: what others
use of the machine is not counted, though what they take from its caches is.

Results are kept as step-MACHINE.json beside the table, so that cases can be measured one after the other. A `note` that somebody
writes into a case there is told below its table, until the case is measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import sivae
from benchmarks.contenders import OUT_OF_MEMORY
from benchmarks.digits import machine
from sivae.distributed import pick_device

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Switch:
    """A setting that makes a step faster, and how it is left out. `families` that have it; `devices` that gain by it."""

    on: str
    off: str
    families: tuple[str, ...] = ("conv", "mlp", "style")
    devices: tuple[str, ...] = ("cpu", "cuda")
    alone: bool = False
    """Never together with the others."""


SWITCHES = {
    "shared forward": Switch("engine.shared_forward=true", "engine.shared_forward=false", ("conv", "mlp")),
    "channels last": Switch("engine.channels_last=true", "engine.channels_last=false", ("conv",)),
    "compile": Switch("engine.compile=true", "engine.compile=false"),
    "tf32": Switch("engine.precision=tf32", "engine.precision=float32", devices=("cuda",), alone=True),
    "bfloat16": Switch("engine.precision=bfloat16", "engine.precision=float32"),
}
AS_PUBLISHED = "ours, maths as published"
SAME_MATHS = ["objective.gamma_r=1e-8"]
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A family and size. `batch_size` None is the largest power of two that fits. `parts` are those of `contenders`."""

    title: str
    config: str
    batch_size: int | None
    overrides: list[str] = field(default_factory=list)
    parts: tuple[str, ...] = ("switches",)
    peak: str = "convolution"
    needs_gpu: bool = False
    others: dict[str, list[str]] = field(default_factory=dict)
    """Further rows with every switch off: what a row has, and its settings."""

    @property
    def family(self) -> str:
        return re.search(r"conv|style|mlp", self.title)[0]


CASES = {
    "conv32": Case("conv, 32 pixels (CIFAR-10)", "cifar10", 16, parts=("switches", "engines")),
    "mlp": Case(
        "mlp, points in the plane", "digits_mlp", 512,
        ["model.sample_shape=[2,1,1]", "model.latent_dim=2", "model.num_hidden=256", "model.num_layers=3"], peak="matrix",
    ),
    "conv256": Case(
        "conv, 256 pixels (CelebA-HQ)", "celebahq256_conv", 4, parts=(),
        others={"blocks from 128 pixels on computed again": ["engine.recompute_from_pixels=128"]},
    ),
    "style256": Case("style, 256 pixels (CelebA-HQ)", "celebahq256_style", 2, parts=()),
    "conv256_b32": Case("conv, 256 pixels (CelebA-HQ)", "celebahq256_conv", 32, needs_gpu=True),
    "style256_b32": Case("style, 256 pixels (CelebA-HQ)", "celebahq256_style", 32, needs_gpu=True),
    "conv1024": Case("conv, 1024 pixels (FFHQ)", "ffhq1024_conv", None, parts=(), needs_gpu=True),
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """`kind` is that of benchmarks/contenders.py; `switches` are on, all others off."""

    name: str
    kind: str
    switches: tuple[str, ...] = ()
    overrides: list[str] = field(default_factory=list)

    @property
    def settings(self) -> list[str]:
        off = [switch.off for switch in SWITCHES.values()]
        return [*off, *(SWITCHES[name].on for name in self.switches), *self.overrides]


def contenders(case: Case, wanted: list[str], device_type: str) -> list[Contender]:
    """The first is what the others are compared with. `wanted` are the switches to look at."""
    found = [Contender("published", "published")]
    if case.family == "conv":
        batch_norm = ["model.norm=batch"]
        as_published = [*SAME_MATHS, *batch_norm]
        if "engines" in case.parts:
            found += [
                Contender(f"{AS_PUBLISHED}, DeepSpeed left out", "plain", (), as_published),
                Contender(AS_PUBLISHED, "ours", (), as_published),
                Contender(f"{AS_PUBLISHED}, zero_stage 1", "ours", (), [*as_published, "engine.zero_stage=1"]),
            ]
        found.append(Contender("ours, BatchNorm", "ours", (), batch_norm))
    found.append(Contender("ours", "ours"))
    found += [Contender(f"ours, {name}", "ours", (), overrides) for name, overrides in case.others.items()]
    there = [
        name for name in wanted if case.family in SWITCHES[name].families and device_type in SWITCHES[name].devices
    ]
    together = tuple(name for name in there if not SWITCHES[name].alone)
    if "switches" in case.parts:
        found += [Contender(f"ours + {name}", "ours", (name,)) for name in there]
        if len(together) > 1:
            found.append(Contender("ours + all", "ours", together))
        if len(together) > 2:
            rest = {name: tuple(other for other in together if other != name) for name in together}
            found += [Contender(f"ours + all but {name}", "ours", others) for name, others in rest.items()]
    elif together:
        found.append(Contender("ours + all", "ours", together))
        if "compile" in together:  # whose FLOPs and passes nobody can count; without it is what a GPU runs by default
            rest = tuple(name for name in together if name != "compile")
            found.append(Contender("ours + all but compile", "ours", rest))
    if case.family == "mlp":
        found.append(Contender("ours, sivae toy2d", "points"))
        found.append(Contender("ours, sivae toy2d + bfloat16", "points", ("bfloat16",)))
    return found


class DoesNotFit(RuntimeError):
    """A contender wanted more memory than there is."""


class Process:
    """A contender at work; `ask` sends one request and waits for its answer."""

    def __init__(self, case: Case, contender: Contender, batch_size: int, options: argparse.Namespace):
        asked = {
            "kind": contender.kind, "config": str(ROOT / "configs" / f"{case.config}.yaml"),
            "overrides": ["engine.zero_stage=0", *case.overrides, *contender.settings], "batch_size": batch_size,
            "device": options.device, "threads": options.threads,
        }  # fmt: skip
        self.log = open(options.log, "a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contenders", json.dumps(asked)], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        self.name = contender.name

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            if code in (
                OUT_OF_MEMORY,
                -signal.SIGKILL,
            ):  # as Linux ends a process when the memory of the machine is gone
                raise DoesNotFit("more memory than there is")
            raise RuntimeError(f"{self.name} ended with code {code}; see {self.log.name}")
        return json.loads(line)

    def ask(self, request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


@contextmanager
def running(case: Case, contender: Contender, batch_size: int, options: argparse.Namespace) -> Iterator[Process]:
    process = Process(case, contender, batch_size, options)
    try:
        yield process
    finally:
        process.close()


def largest_batch(case: Case, contender: Contender, options: argparse.Namespace) -> tuple[int, str | None]:
    """The largest power of two with which a step fits, tried in fresh processes, and what but memory ended the search."""
    fits, batch_size = 0, 1
    while True:
        try:
            with running(case, contender, batch_size, options) as process:
                process.answer()
                process.ask(2)
        except RuntimeError as error:
            if not fits:
                raise
            return fits, None if isinstance(error, DoesNotFit) else str(error)
        fits, batch_size = batch_size, 2 * batch_size


def start(
    case: Case, contender: Contender, options: argparse.Namespace, stack: ExitStack
) -> tuple[Process, dict[str, Any], int]:
    """A warm contender, what is known of it, and the steps of a round. Raises RuntimeError when it cannot take one."""
    batch_size, limit = (case.batch_size, None) if case.batch_size else largest_batch(case, contender, options)
    process = stack.enter_context(running(case, contender, batch_size, options))
    process.answer()
    entry = {"batch_size": batch_size, "sec": [], "switches": contender.switches}
    entry |= {"limit": limit} if limit else {}
    begin = time.monotonic()
    entry |= (
        {} if "compile" in contender.switches else process.ask("counts")
    )  # the counters would take a compiled step apart
    slow = time.monotonic() - begin > 10  # a second warm-up would be long and change little
    if not slow:
        process.ask(1)
    entry |= process.ask("memory")
    return process, entry, 1 if slow else max(1, round(options.seconds / process.ask(1)))


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All contenders of a case, in turns. Times are seconds of a step by contender and round."""
    found: dict[str, Any] = {"contenders": {}, "time": time.strftime("%Y-%m-%d"), "sivae": sivae.__version__, "torch": torch.__version__, "left_out": {}}  # fmt: skip
    if case.family != "style":
        norm = ["model.norm=batch"] if case.family == "conv" else []
        asked = Contender("same losses", "same losses", (), [*SAME_MATHS, *norm])
        with running(case, asked, case.batch_size or 1, options) as process:
            found["losses"] = process.answer()
    with ExitStack() as stack:
        peaks = stack.enter_context(running(case, Contender("peaks", "peaks"), 0, options))
        peaks.answer()
        processes, num_steps = {}, {}
        for contender in contenders(case, options.switches, options.device):
            try:
                ready = start(case, contender, options, stack)
            except RuntimeError as error:
                if not processes:  # the first is what the others are compared with
                    raise
                print(f"{case.title}: {contender.name}: left out, {error}", file=sys.stderr)
                found["left_out"][contender.name] = str(error)
                continue
            processes[contender.name], found["contenders"][contender.name], num_steps[contender.name] = ready
            print(f"{case.title}: {contender.name}: ready, {num_steps[contender.name]} steps a round", file=sys.stderr)
        found["peaks"] = []
        for number in range(options.rounds):
            found["peaks"].append(peaks.ask("peaks"))
            for name, process in processes.items():
                found["contenders"][name]["sec"].append(process.ask(num_steps[name]))
            print(f"{case.title}: round {number + 1} of {options.rounds}", file=sys.stderr)
    return found


# The tables


def table(case: Case, found: dict[str, Any]) -> list[str]:
    entries = found["contenders"]
    first = next(iter(entries))
    batches = sorted({entry["batch_size"] for entry in entries.values()})
    rounds = len(entries[first]["sec"])
    lines = [
        f"## {case.title}, batch {' and '.join(map(str, batches))}",
        "",
        f"| {found['time']}, {rounds} round{'s' * (rounds > 1)} | images/s | lowest to highest | against {first} | GiB beyond weights | GiB with them | GFLOP an image"
        f" | GFLOP/s | of the {case.peak} peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    peaks = {name: max(peak[name] for peak in found["peaks"]) for name in found["peaks"][0]}
    for name, entry in entries.items():
        speeds = sorted(entry["batch_size"] / sec for sec in entry["sec"])
        ratio = statistics.median(_ratios(entries, first, name))
        flops = (entry.get("flops") or _flops_of(entries, entry)) / entry["batch_size"]
        rate = flops * statistics.median(speeds)
        kind = next((dtype for dtype in ("bfloat16", "tf32") if dtype in entry["switches"]), "float32")
        if name == "published" and f"{case.peak} tf32" in peaks and case.peak == "convolution":
            kind = "tf32"  # torch's default for convolutions on a GPU, and so how users run it
        cells = [
            _number(statistics.median(speeds)), f"{_number(speeds[0])} to {_number(speeds[-1])}", f"{ratio:.2f}x",
            _gib(entry["beyond"]), _gib(entry["held"] + entry["beyond"]), _number(flops / 1e9),
            f"{rate / 1e9:,.0f}", f"{rate / peaks[f'{case.peak} {kind}']:.0%} of {kind}",
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for what, reasons in (
        ("Left out", found.get("left_out", {})),
        ("No larger batch was tried", {name: entry["limit"] for name, entry in entries.items() if "limit" in entry}),
    ):
        if reasons:
            lines += ["", f"{what}: {'; '.join(f'{name}, {reason}' for name, reason in reasons.items())}."]
    if "note" in found:
        lines += ["", found["note"]]
    if "losses" in found:
        worst = max(abs(theirs - ours) / abs(theirs) for theirs, ours in found["losses"].values())
        lines += [
            "",
            f"Same losses: {len(found['losses'])} of the first step differ by {worst:.1e} of themselves at most.",
        ]
    lines += _engines(entries)
    told = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in peaks.items())
    return [*lines, "", f"Peaks of this machine in the same rounds, GFLOP/s: {told}."]


def _engines(entries: dict[str, Any]) -> list[str]:
    """What DeepSpeed adds to the same step in plain torch."""
    bare = f"{AS_PUBLISHED}, DeepSpeed left out"
    if bare not in entries:
        return []
    told = []
    for name in (AS_PUBLISHED, f"{AS_PUBLISHED}, zero_stage 1"):
        ratios = sorted(1 / ratio for ratio in _ratios(entries, bare, name))
        stage = 1 if name.endswith("1") else 0
        told.append(
            f"at stage {stage} {statistics.median(ratios) - 1:+.1%} ({ratios[0] - 1:+.1%} to {ratios[-1] - 1:+.1%})"
        )
    return ["", f"What DeepSpeed adds to the time of the same step in plain torch: {', '.join(told)}."]


def passes_table(found: dict[str, Any]) -> list[str]:
    """Counted passes of each network: forward, by its input, by its weights; a unit each."""
    kinds = [f"{network} {kind}" for network in ("encoder", "decoder") for kind in ("forward", "by_input", "by_weight")]
    lines = [
        "| counted network passes | encoder: forward, by input, by weights | decoder: forward, by input, by weights | units |",
        "|---|---|---|---|",
    ]
    seen = set()
    for name, entry in found["contenders"].items():
        counted = tuple(entry.get("passes", {}).get(kind, 0) for kind in kinds)
        if any(counted) and counted not in seen:
            seen.add(counted)
            encoder, decoder = (", ".join(map(str, part)) for part in (counted[:3], counted[3:]))
            lines.append(f"| {name} | {encoder} | {decoder} | {sum(counted)} |")
    return [*lines, "| least that the losses need | 5, 5, 3 | 4, 5, 2 | 24 |"]


def _ratios(entries: dict[str, Any], first: str, name: str) -> list[float]:
    """Speed against the first contender's, round by round."""
    one, other = entries[first], entries[name]
    return [
        (other["batch_size"] / b) / (one["batch_size"] / a) for a, b in zip(one["sec"], other["sec"])
    ]  # fmt: skip


def _flops_of(entries: dict[str, Any], compiled: dict[str, Any]) -> float:
    """Of a compiled step, which cannot be counted: those of one that makes the same passes; NaN where there is none."""
    same = (
        entry["flops"]
        for name, entry in entries.items()
        if name.startswith("ours + ") or name == "ours"
        if "flops" in entry and ("shared forward" in entry["switches"]) == ("shared forward" in compiled["switches"])
    )
    return next(same, float("nan"))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3f}" if num_bytes < GIB / 10 else f"{num_bytes / GIB:.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:#.3g}"


HEAD = """\
# A training step: ours and the published one, {machine}

`python -m benchmarks.step` (sivae {sivae}, torch {torch}); in each table all rows took turns on one machine{clock}.
Lowest and highest of the rounds tell how quiet the machine was; of two rounds they are all that there is.
*published*: the authors' step written anew operation by operation ([image and 2D](../published.py),
[style](../published_style.py)), float32, with BatchNorm (images) and two Adams{tf32}. *ours*: the step of `sivae train` through its
DeepSpeed engines, every switch off, with the recipe's GroupNorm and without the passes that the published `gamma_r` of 1e-8 asks
for and rounding swallows; *maths as published* has BatchNorm and those passes too. *+ NAME*: with that switch alone; *+ all but
NAME*: with all others. Memory: what tensors take at the highest in a step, beyond what lies there between steps, and with it:
weights, optimizer, of ours an average of the weights (of published the style code alone has one), of published the gradients
of the step before. FLOPs of
products and convolutions are counted, of which the published style code makes more: it blurs by convolutions. The published 2D
code also reconstructs from mu, to look at it only.{kept}
"""


def write(output: Path, stem: str, results: dict[str, Any], device: torch.device) -> None:
    (output / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    clock = "; seconds of one CPU thread" if device.type == "cpu" else ""
    kept = " Ours keep freed memory ([why](../../docs/speed.md)), published does not." if device.type == "cpu" else ""
    tf32 = "; torch lets a GPU round what its convolutions take to TF32" if device.type == "cuda" else ""
    found = next(iter(results.values()))
    lines = [
        HEAD.format(
            machine=name_of(device), sivae=found["sivae"], torch=found["torch"], clock=clock, tf32=tf32, kept=kept
        )
    ]
    if "conv32" in results:
        lines += [*passes_table(results["conv32"]), ""]
    for name, case in CASES.items():
        if name in results:
            lines += [*table(case, results[name]), ""]
    (output / f"{stem}.md").write_text("\n".join(lines))


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="all that the device can do, when not given")
    parser.add_argument(
        "--switches", nargs="+", choices=list(SWITCHES),
        help="to look at; all when not given, but compile on a CPU, which takes minutes there",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, help="instead of the cases' own, for a slow machine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender in a round, about")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    default_log = Path(tempfile.gettempdir(), "sivae-step.log")
    parser.add_argument("--log", default=default_log, help=f"where the contenders' own output goes ({default_log})")
    options = parser.parse_args()
    device = pick_device(options.device)
    options.device = device.type
    options.switches = options.switches or [name for name in SWITCHES if device.type == "cuda" or name != "compile"]
    chosen = options.cases or [name for name, case in CASES.items() if device.type == "cuda" or not case.needs_gpu]
    stem = "step-" + re.sub(r"[^a-z0-9]+", "-", name_of(device).lower()).strip("-")
    options.output.mkdir(parents=True, exist_ok=True)
    kept = options.output / f"{stem}.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in chosen:
        case = replace(CASES[name], batch_size=options.batch_size) if options.batch_size else CASES[name]
        results[name] = measure(case, options)
        write(options.output, stem, results, device)
        print("\n".join([*table(case, results[name]), ""]), flush=True)


if __name__ == "__main__":
    main()
