"""How training speed grows with processes: measured on this machine, and on paper for clusters. Prints tables and writes them.

    python -m benchmarks.scaling [--ranks 1 2 4] [--rounds 2] [--output benchmarks/results]

Each measurement is `sivae train --profile` under torchrun, with the real data stream, engines and collectives (gloo on CPUs,
NCCL on GPUs), one thread a process. Weak scaling: every rank has the same batch; strong: all share one batch. The columns:

compute        both phases, optimizer and averages, without the collectives inside them
communication  what an all-reduce of as many bytes takes by itself, when all ranks begin together
waiting        what the collectives of the step took beyond that: the wait for the slowest rank
data           reading and decoding that was not ready in time, images to the device

On paper: gradients of each network go once a step through rings (Patarasuk and Yuan, 2009); see ASSUMPTIONS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.digits import machine
from sivae import config, distributed, plan
from sivae.trainer import Trainer

ROOT = Path(__file__).parents[1]
BATCH = 8
SETTINGS = [
    'data.url="shapes:"', "data.num_workers=1", "model.resolution=32", "model.channels=[32,64,128]", "model.latent_dim=64",
    "tracking.progress=false", "tracking.tensorboard=false", "schedule.total_images=100000", "run.cpu_threads=1",
]  # fmt: skip
STEPS = 5
COMPUTE = ("encoder phase", "decoder phase", "optimizer", "averages")
DATA = ("data", "batch to device")

# On paper
LINKS = {
    "NVLink": 450e9,
    "InfiniBand": 50e9,
}  # bytes a second of a GPU in each direction: 4th generation; 400 Gb/s, one card a GPU
LINK_SHARE = 0.8  # of a link that a large all-reduce reaches
NODE = 8  # GPUs that NVLink joins
HOP_SEC = 10e-6  # for one of the 2 (n - 1) messages of a ring
NUM_REDUCES = 2  # a step, one for each network
SPREAD = 0.01  # standard deviation of a rank's step time; the slowest of n is about sqrt(2 ln n) of them late
GPU = "h100"
RECIPES = {"ffhq1024_conv": 4, "celebahq256_conv": 32, "cifar10": 128}  # images of a GPU and step
ASSUMPTIONS = f"""\
Assumed: {GPU.upper()}s, each as fast as `sivae plan` expects of one (half the roofline, not measured); gradients of float32, all of them
once a step; between the {NODE} GPUs of a node {LINKS["NVLink"] / 1e9:.0f} GB/s in each direction (NVLink), between nodes \
{LINKS["InfiniBand"] / 1e9:.0f} GB/s for each GPU (400 Gb/s InfiniBand, a card a GPU), {LINK_SHARE:.0%} of which an all-reduce reaches;
as many rings through all GPUs as a node has cards, so that all carry their share between nodes, which move 2 (n - 1) / n of the bytes
of each network, in 2 (n - 1) messages of {HOP_SEC * 1e6:.0f} microseconds each; ranks whose step times vary by {SPREAD:.0%}, so that the slowest of n is sqrt(2 ln n) times that late; data that is
always there (docs/streaming.md has those sums). *One after the other*: gradients travel when a phase's backward pass is done, as
the engines do it by default. *Overlapped*: they travel during it, the bound that no schedule of messages passes, in the longer step that
`engine.overlap_reduction` makes, which shares no forward. NCCL's trees, which replace rings where messages are many, are left out, so
512 GPUs are rather judged too low: there nearly all of the all-reduce is the time of its messages."""


def work(batch_size: int, output: str) -> None:
    """One process of a measurement; rank 0 writes what it found."""
    rank = int(os.environ["RANK"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = os.path.join(os.path.dirname(output), "run")
        settings = config.load(
            str(ROOT / "configs" / "cifar10.yaml"),
            [f"run.directory={folder}", f"data.cache_dir={scratch}", f"schedule.batch_size={batch_size}", *SETTINGS],
        )
        torch.set_num_threads(1)
        with distributed.join("auto") as group:
            trainer = Trainer(settings, group, lambda metrics, name: None, profile_steps=STEPS)
            trainer.run()
            profile = trainer.profile
            spans = {name: seconds / STEPS for name, seconds in profile.timed.seconds().items()}
            networks = trainer.state.encoder.network, trainer.state.decoder.network
            sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
            found = {
                "wall": profile.wall_sec, "cpu": group.mean(torch.tensor(profile.host_sec, device=group.device)).item(), "spans": {name or "other": value for name, value in spans.items()},
                "collectives": profile.communication_sec() / 2, "alone": sum(_all_reduce_sec(n, group) for n in sizes),
                "bytes": 4 * sum(sizes),
            }  # fmt: skip
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    distributed.end_process(0)


def _all_reduce_sec(numel: int, group: distributed.Group) -> float:
    """Of one all-reduce that all ranks begin together, the median of some."""
    if group.world_size == 1:
        return 0.0
    values, times = torch.ones(numel, device=group.device), []
    for _ in range(7):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if group.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure(ranks: int, batch_size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "found.json")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
            f"--nproc-per-node={ranks}", "-m", "benchmarks.scaling", "--work", str(batch_size), output,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(Path(output).read_text())


def measured(kind: str, ranks: list[int], rounds: int, places: int) -> list[str]:
    """The table of weak or strong scaling. `places` is how many processes the machine can really run at once."""
    largest = max(ranks)
    batches = {n: BATCH * n if kind == "weak" else BATCH * largest for n in ranks}
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in ranks}
    for number in range(rounds):
        for n in ranks:
            found[n].append(measure(n, batches[n]))
            print(f"{kind}, {n} ranks, round {number + 1}: {found[n][-1]['wall']:.2f} s a step", file=sys.stderr)
    lines = [
        "| ranks | batch | images/s | speedup | of what its processors allow | CPU ms an image | compute | communication | waiting | data | other |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    speeds = {n: batches[n] / statistics.median(one["wall"] for one in found[n]) for n in ranks}
    for n in ranks:
        one = sorted(found[n], key=lambda one: one["wall"])[len(found[n]) // 2]
        spans, wall = one["spans"], one["wall"]
        alone = min(one["alone"], one["collectives"])
        waiting = one["collectives"] - alone + spans.get("waiting for ranks", 0.0)
        compute = sum(spans.get(name, 0.0) for name in COMPUTE) - one["collectives"]
        data = sum(spans.get(name, 0.0) for name in DATA)
        parts = {"compute": compute, "communication": alone, "waiting": waiting, "data": data}
        parts["other"] = max(0.0, wall - sum(parts.values()))
        shares = " | ".join(f"{part / wall:.0%}" for part in parts.values())
        speedup = speeds[n] / speeds[ranks[0]]
        cpu = 1e3 * n * statistics.median(one["cpu"] for one in found[n]) / batches[n]
        lines.append(
            f"| {n} | {batches[n]} | {speeds[n]:.1f} | {speedup:.2f}x | {speedup / (min(n, places) / min(ranks[0], places)):.0%} | {cpu:.1f} | {shares} |"
        )
    return lines


def on_paper() -> list[str]:
    lines = [
        "| recipe | images a GPU | gradients | GPUs | compute | all-reduce | late | efficiency, one after the other | overlapped |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, images in RECIPES.items():
        for num_gpus in (8, 64, 512):
            overrides = [
                f"schedule.batch_size={images}",
                f"engine.micro_batch_size={images}",
                "engine.precision=bfloat16",
            ]
            made, to_overlap = (
                plan.make(
                    config.load(str(ROOT / "configs" / f"{name}.yaml"), [*overrides, *more]), num_gpus=1, gpu_name=GPU
                )
                for more in ([], ["engine.zero_stage=1", "engine.overlap_reduction=true"])
            )
            compute, overlapping = images / made["images_per_sec"], images / to_overlap["images_per_sec"]
            num_bytes = 4 * (made["model"]["encoder_parameters"] + made["model"]["decoder_parameters"])
            reduce, late = (
                paper_seconds(num_bytes, num_gpus),
                SPREAD * compute * (2 * torch.tensor(num_gpus).log().item()) ** 0.5,
            )
            after, overlapped = compute / (compute + reduce + late), compute / (max(overlapping, reduce) + late)
            cells = [
                f"{num_bytes / 1e6:,.0f} MB", str(num_gpus), f"{1e3 * compute:.1f} ms", f"{1e3 * reduce:.1f} ms", f"{1e3 * late:.1f} ms",
                f"{after:.0%}", f"{overlapped:.0%}",
            ]  # fmt: skip
            lines.append(f"| {name} | {images} | {' | '.join(cells)} |")
    return lines


def paper_seconds(num_bytes: int, num_gpus: int) -> float:
    """Ring all-reduces of so many bytes together: a node sends by NVLink, or by all its cards at once."""
    link = LINKS["NVLink"] if num_gpus <= NODE else min(LINKS["NVLink"], NODE * LINKS["InfiniBand"])
    return 2 * (num_gpus - 1) / num_gpus * num_bytes / (LINK_SHARE * link) + NUM_REDUCES * 2 * (num_gpus - 1) * HOP_SEC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, help="1 2 4, or as many as there are GPUs, when not given")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(int(options.work[0]), options.work[1])
        return
    gpus = torch.cuda.device_count()
    ranks = options.ranks or [n for n in (1, 2, 4) if not gpus or n <= gpus]
    places = gpus or os.cpu_count()
    name = f"{gpus} {torch.cuda.get_device_name(0)}" if gpus else machine()
    lines = [f"# Scaling: {time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}", ""]
    load = os.getloadavg()[0]
    lines += [
        f"`python -m benchmarks.scaling --rounds {options.rounds}`, medians. Measured with a small convolutional model at 32 pixels, one"
        f" thread a process, {'NCCL' if gpus else 'gloo over loopback'}; shares are those of rank 0's step. *Of what its processors"
        f" allow*: the speedup over the smaller of ranks and {places} {'GPUs' if gpus else 'cores'}. Where ranks are more than those,"
        " they take turns: that row shows what sharing costs, not how a larger machine scales. *Communication* is an all-reduce of the"
        " same bytes that all begin together; *waiting* what the step's collectives took beyond it, much of which is a rank that the"
        " machine let wait. *CPU ms an image*: of all ranks together, which others on the machine hardly change: how much more work it"
        f" is to do it in parts. When this began, other work kept a load of {load:.1f}: above that of the cores left free, images a second"
        " and waiting tell more of that work than of this. In strong scaling a rank's share of the batch shrinks.",
        "",
    ]
    for kind in ("weak", "strong"):
        title = f"every rank has {BATCH} images" if kind == "weak" else "all share one batch"
        lines += [f"## {kind.capitalize()} scaling: {title}", "", *measured(kind, ranks, options.rounds, places), ""]
    lines += ["## On paper: clusters", "", ASSUMPTIONS, "", *on_paper(), ""]
    print("\n".join(lines))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scaling.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
