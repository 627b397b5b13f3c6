"""`sivae plan`: what a run needs of GPUs, memory, storage and time, told before it starts.

Parameters and checkpoint are counted, FLOPs, traffic and activations traced (see `step_trace`). What DeepSpeed holds for
each ZeRO stage was measured on 1 and 2 ranks. Time is a roofline (Williams et al., 2009): an operation takes as long as its
FLOPs or its bytes do at the GPU's peak, whichever is longer, and of that peak a share is assumed. Every assumption is told.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch

from sivae.config import Config
from sivae.data import pyramid_level
from sivae.data.index import Index, NoIndex
from sivae.data.sources import DRAWN
from sivae.errors import UserError, shown
from sivae.state import build_networks
from sivae.step_trace import Trace, trace_step
from sivae.storage import Folder

GIB = 2**30
UTILIZATION = 0.5  # of the roofline
RESERVED = 0.1  # of a GPU's memory
LAUNCH_SEC = 10e-6  # for one operation, from Python through autograd
BYTES_PER_VALUE = 0.4  # of an encoded image; FFHQ at 1024 pixels as PNG has 1.27 MB
REACH_SEC = 10  # for one look at the index of data.url


@dataclass(frozen=True)
class Gpu:
    """Makers' figures: memory as torch sees it, about; dense peaks, without sparsity; TF32's is float32's where there is none."""

    memory_gib: float
    bytes_per_sec: float
    float32_flops: float
    tf32_flops: float
    bfloat16_flops: float | None

    def peak_flops(self, precision: str) -> float:
        """Of products in a precision as engine.precision names it."""
        return {"float32": self.float32_flops, "tf32": self.tf32_flops, "bfloat16": self.bfloat16_flops}[precision]


GPUS = {
    "v100-16gb": Gpu(15.8, 0.90e12, 15.7e12, 15.7e12, None),
    "v100-32gb": Gpu(31.7, 0.90e12, 15.7e12, 15.7e12, None),
    "a100-40gb": Gpu(39.4, 1.56e12, 19.5e12, 156e12, 312e12),
    "a100-80gb": Gpu(79.2, 2.04e12, 19.5e12, 156e12, 312e12),
    "h100": Gpu(79.1, 3.35e12, 67e12, 494e12, 989e12),
    "h200": Gpu(139.8, 4.80e12, 67e12, 494e12, 989e12),
    "b200": Gpu(178.3, 8.00e12, 80e12, 1120e12, 2250e12),
    "l4": Gpu(22.0, 0.30e12, 30e12, 60e12, 121e12),
    "l40s": Gpu(44.4, 0.86e12, 91.6e12, 183e12, 362e12),
    "rtx3090": Gpu(23.6, 0.94e12, 35.6e12, 35.6e12, 71e12),
    "rtx4090": Gpu(23.5, 1.01e12, 82.6e12, 82.6e12, 165e12),
}


@dataclass(frozen=True)
class Part:
    """A part of the run at one cost: `num_images` images, in passes of at most `micro_batch_size` on each GPU."""

    settings: Config
    resolution: int
    num_images: int
    batch_size: int
    micro_batch_size: int
    num_passes: int

    def trace(self, settings: Config | None = None) -> Trace:
        return trace_step(settings or self.settings, self.micro_batch_size, self.num_passes, self.resolution)


def parts(settings: Config, num_gpus: int) -> list[Part]:
    """The run from its beginning, a part for each level that it reaches. Raises ConfigError where GPUs would have no images."""
    found, left = [], settings.schedule.total_images
    for level, num_passes in zip(settings.levels(), settings.passes(num_gpus)):
        num_images = min(left, level.images or left)
        share = -(-level.batch_size // num_gpus)
        if num_images:
            found.append(
                Part(settings, level.resolution, num_images, level.batch_size, -(-share // num_passes), num_passes)
            )
        left -= num_images
    return found


def make(settings: Config, *, num_gpus: int, gpu_name: str, utilization: float | None = None) -> dict[str, Any]:
    """The plan as plain numbers and texts: bytes, seconds, FLOPs. Raises UserError or ConfigError for what cannot be planned."""
    gpu = find_gpu(gpu_name)
    if num_gpus < 1:
        raise UserError(f"--gpus: {num_gpus} is not a number of GPUs")
    utilization = UTILIZATION if utilization is None else utilization
    if not 0 < utilization <= 1:
        raise UserError(f"--utilization: {utilization} is not above 0 and up to 1")
    precision = settings.engine.precision
    if precision == "bfloat16" and gpu.bfloat16_flops is None:
        raise UserError(f"--gpu: {gpu_name} has no bfloat16; plan with engine.precision=float32, or for another GPU")
    run = parts(settings, num_gpus)
    counted = _count_parameters(settings)
    assumptions = [
        f"kernels reach {utilization:.0%} of the roofline of a {gpu_name} (--utilization), not measured there",
        f"an operation takes {LAUNCH_SEC * 1e6:.0f} microseconds to launch; what GPUs take to exchange gradients is left out",
        f"{RESERVED:.0%} of the memory stays for the CUDA context, NCCL, cuDNN and fragmentation",
    ]
    traces = [part.trace() for part in run]
    gpu_sec = storage_bytes_per_sec = 0.0
    for part, trace in zip(run, traces):
        sec_per_image = _seconds(trace, gpu, precision, utilization, sum(counted.values())) / trace.num_images
        gpu_sec += part.num_images * sec_per_image
        sample_bytes, assumed = mean_sample_bytes(settings, part.resolution)
        storage_bytes_per_sec = max(storage_bytes_per_sec, num_gpus / sec_per_image * sample_bytes)
    assumptions += [assumed] if assumed else []
    if getattr(settings.objective, "vae_images", 0):
        assumptions.append("the images of objective.vae_images cost what the others do; they cost less")

    last, trace = run[-1], traces[-1]
    heaviest = max(range(len(run)), key=lambda index: traces[index].activation_bytes)
    peak = gpu.peak_flops(precision)
    usable_bytes = gpu.memory_gib * GIB * (1 - RESERVED)
    memory = _memory(run[heaviest], traces[heaviest], counted, num_gpus, usable_bytes)
    plan = {
        "model": {"family": settings.model.family, "resolution": last.resolution} | counted,
        "gpus": num_gpus, "gpu": gpu_name, "gpu_memory_bytes": int(gpu.memory_gib * GIB), "precision": precision,
        "batch_size": last.batch_size, "micro_batch_size": last.micro_batch_size,
        "passes": last.num_passes, "flops_per_image": trace.flops / trace.num_images,
        "traffic_bytes_per_image": trace.moved_bytes / trace.num_images, "images_per_sec": num_gpus / sec_per_image,
        "share_of_peak_flops": trace.flops / trace.num_images / sec_per_image / peak,
        "storage_bytes_per_sec": storage_bytes_per_sec, "sample_bytes": sample_bytes, "total_images": sum(part.num_images for part in run),
        "gpu_hours": gpu_sec / 3600, "hours": gpu_sec / 3600 / num_gpus, "checkpoint_bytes": _checkpoint_bytes(settings),
        "memory": memory,
    }  # fmt: skip
    return plan | {"verdict": _verdict(memory, run[heaviest], usable_bytes), "assumptions": assumptions}


def find_gpu(name: str) -> Gpu:
    if name in GPUS:
        return GPUS[name]
    close = difflib.get_close_matches(name, GPUS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"--gpu: {name!r} is not known; {hint}known are {', '.join(GPUS)}")


def mean_sample_bytes(settings: Config, resolution: int) -> tuple[float, str | None]:
    """Mean size of an encoded image of data.url, and what was assumed where its index cannot be read.

    `resolution`: of the level, where data.url is a pyramid.
    """
    data, model = settings.data, settings.model
    try:
        if data.url in DRAWN:
            raise UserError(f"{data.url} is packed on first use")
        reading = {"timeout_sec": min(REACH_SEC, data.timeout_sec), "retries": 0}
        try:
            index = Index.load(Folder(data.url, data.storage_options, **reading))
        except NoIndex:
            level = pyramid_level(data.url, resolution, storage_options=data.storage_options, **reading)
            index = Index.load(Folder(level, data.storage_options, **reading))
        return float(index.split(data.split).size.mean()), None
    except UserError as error:
        reason = str(error) if data.url in DRAWN else f"the index of data.url={shown(data.url)} cannot be read"
        return (
            BYTES_PER_VALUE * model.num_channels * resolution**2,
            f"images have {BYTES_PER_VALUE} bytes a value, as FFHQ's PNG; {reason}",
        )


def state_bytes(num_encoder: int, num_decoder: int, stage: int, num_gpus: int) -> dict[str, float]:
    """What DeepSpeed and the engines hold on one GPU for networks of so many parameters, all of it float32.

    `gradients` are those of one network, as phases follow each other, with the buffer that they are reduced in.
    """
    total, larger = 4 * (num_encoder + num_decoder), 4 * max(num_encoder, num_decoder)
    if stage == 0:
        gradients = larger * (2 if num_gpus > 1 else 1)
        return {"weights": total, "optimizer": 2 * total, "average": total, "gradients": gradients}
    # From stage 1 on the optimizer has a copy of the weights.
    optimizer = 3 * total / num_gpus
    if stage < 3:
        gradients = larger * (2 + 1 / num_gpus)
        return {"weights": total, "optimizer": optimizer, "average": total, "gradients": gradients}
    # Weights are gathered for a phase. Of the buffers of gradients some stay, for both networks.
    shard = total / num_gpus
    return {
        "weights": total + shard, "optimizer": optimizer, "average": shard, "gradients": 2 * total + 2 * larger
    }  # fmt: skip


def _memory(
    part: Part, trace: Trace, counted: dict[str, int], num_gpus: int, usable_bytes: float
) -> list[dict[str, Any]]:
    """A row for each ZeRO stage without and with activation checkpointing."""
    settings = part.settings
    own, model = settings.engine.recompute_from_pixels, settings.model
    possible = model.family != "mlp" and getattr(model, "norm", None) != "batch"
    choices = [None, own or 1] if possible else [None]
    # A step's images lie on the GPU as bytes and as float32.
    images = part.micro_batch_size * part.num_passes * model.num_channels * part.resolution**2 * 5
    rows = []
    for recompute in choices:
        engine = settings.engine.model_copy(update={"recompute_from_pixels": recompute})
        chosen = settings.model_copy(update={"engine": engine})
        found = trace if recompute == own else part.trace(chosen)
        for stage in range(4):
            if stage == 0 and (settings.engine.offload_optimizer or settings.engine.overlap_reduction):
                continue
            state = state_bytes(counted["encoder_parameters"], counted["decoder_parameters"], stage, num_gpus)
            if settings.engine.offload_optimizer:
                state["optimizer"] = 0
            if settings.objective.name == "bootstrap":
                state["weights"] += 4 * counted["decoder_parameters"]
            row = state | {"activations": found.activation_bytes + images}
            total = sum(row.values())
            fits = total <= usable_bytes
            rows.append({"stage": stage, "recompute_from_pixels": recompute} | row | {"total": total, "fits": fits})
    return rows


def _verdict(rows: list[dict[str, Any]], part: Part, usable_bytes: float) -> str:
    """Whether the run fits as it is configured, and if not, what would make it fit."""
    stage, recompute = part.settings.engine.zero_stage, part.settings.engine.recompute_from_pixels
    own = next(row for row in rows if (row["stage"], row["recompute_from_pixels"]) == (stage, recompute))
    if own["fits"]:
        return f"fits as configured (stage {stage}{', recompute' if recompute else ''})"
    changes = []
    fitting = [row for row in rows if row["fits"]]
    if fitting:
        # The least change first: the stage as it is, then the lowest.
        best = min(
            fitting, key=lambda row: (row["stage"] != stage, row["recompute_from_pixels"] is not None, row["stage"])
        )
        words = [f"engine.zero_stage={best['stage']}"] if best["stage"] != stage else []
        if best["recompute_from_pixels"] != recompute:
            words.append(f"engine.recompute_from_pixels={best['recompute_from_pixels'] or 'null'}")
        changes.append(" ".join(words))
    share = part.micro_batch_size * part.num_passes
    room = (usable_bytes - own["total"] + own["activations"]) / own["activations"] * part.micro_batch_size
    smaller = [size for size in range(1, part.micro_batch_size) if share % size == 0 and size <= room]
    if smaller:
        changes.append(
            f"{'micro_batch_size' if part.settings.schedule.levels else 'engine.micro_batch_size'}={smaller[-1]}"
        )
    where = f"does not fit at stage {stage}{' with recompute' if recompute else ''}"
    return (
        f"{where}; fits with {', or with '.join(changes)}" if changes else f"{where}, nor otherwise; take larger GPUs"
    )


def _seconds(trace: Trace, gpu: Gpu, precision: str, utilization: float, num_parameters: int) -> float:
    """Of one step on one GPU."""
    device = 0.0
    for operation in trace.operations:
        # Of a step in bfloat16, what autocast leaves alone is in float32.
        in_float32 = precision == "bfloat16" and operation.dtype != torch.bfloat16
        peak = gpu.peak_flops("float32" if in_float32 else precision)
        device += max(operation.flops / peak, operation.num_bytes / gpu.bytes_per_sec)
    # Adam and the average read and write ten values for each parameter.
    device += 10 * 4 * num_parameters / gpu.bytes_per_sec
    return max(device / utilization, trace.num_operations * LAUNCH_SEC)


def _count_parameters(settings: Config) -> dict[str, int]:
    with torch.device("meta"):
        networks = build_networks(settings, "cuda")
    return {
        f"{name}_parameters": sum(parameter.numel() for parameter in getattr(networks, name).parameters())
        for name in ("encoder", "decoder")
    }


def _checkpoint_bytes(settings: Config) -> int:
    """Weights and buffers, their average, Adam's two moments; of bootstrap the target decoder."""
    with torch.device("meta"):
        networks = build_networks(settings, "cuda")
    state = [tensor.numel() * tensor.element_size() for net in networks for tensor in net.state_dict().values()]
    moments = sum(2 * 4 * parameter.numel() for net in networks for parameter in net.parameters())
    target = sum(tensor.numel() * tensor.element_size() for tensor in networks.decoder.state_dict().values())
    return 2 * sum(state) + moments + (target if settings.objective.name == "bootstrap" else 0)


def render(plan: dict[str, Any]) -> str:
    """The plan as a table for people."""
    model, memory = plan["model"], plan["gpu_memory_bytes"] / GIB
    encoder, decoder = model["encoder_parameters"], model["decoder_parameters"]
    lines = [
        f"model        {model['family']} family, {model['resolution']} pixels; {encoder + decoder:,} parameters"
        f" (encoder {encoder:,}, decoder {decoder:,})",
        f"machine      {plan['gpus']} x {plan['gpu']} of {memory:.0f} GiB, {plan['precision']}; {plan['batch_size']} images a step ="
        f" {plan['gpus']} GPU{'s' * (plan['gpus'] > 1)} x {plan['passes']} pass{'es' * (plan['passes'] > 1)} x {plan['micro_batch_size']}",
        f"step         {plan['flops_per_image'] / 1e12:.3g} TFLOP and {plan['traffic_bytes_per_image'] / 1e9:.3g} GB of memory traffic an image",
        f"speed        {plan['images_per_sec']:,.3g} images/s, {plan['share_of_peak_flops']:.1%} of peak FLOP/s",
        f"run          {plan['total_images']:,} images in {plan['hours']:,.3g} hours, {plan['gpu_hours']:,.3g} GPU hours",
        f"storage      {plan['storage_bytes_per_sec'] / 1e6:,.3g} MB/s at {plan['sample_bytes'] / 1e3:,.4g} kB an image",
        f"checkpoint   {plan['checkpoint_bytes'] / 1e9:.3g} GB",
        "",
        f"GiB on each GPU{'weights':>16}{'optimizer':>11}{'average':>9}{'gradients':>11}{'activations':>13}{'total':>8}",
    ]
    for row in plan["memory"]:
        name = f"ZeRO {row['stage']}" + (", recompute" if row["recompute_from_pixels"] else "")
        values = [row[key] / GIB for key in ("weights", "optimizer", "average", "gradients", "activations", "total")]
        cells = "".join(f"{value:>{width}.2f}" for value, width in zip(values, (13, 11, 9, 11, 13, 8)))
        lines.append(f"{name:<18}{cells}{'' if row['fits'] else '  does not fit'}")
    lines += ["", plan["verdict"], "", "assumed:", *(f"- {line}" for line in plan["assumptions"])]
    return "\n".join(lines)
