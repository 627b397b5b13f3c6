"""One contender of benchmarks/step.py in a process of its own: builds its training step once, then does what it is asked.

Requests come as lines of JSON on stdin, answers go as lines of JSON to stdout. Between requests it computes nothing, and on a
GPU it gives its spare memory back, so that contenders can take turns on one machine.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import published, published_style
from benchmarks.memory import live_and_peak_bytes
from sivae import allocator, config, distributed, images, models, randomness, toy2d
from sivae.config import Config
from sivae.distributed import Group
from sivae.graphs import Graphs
from sivae.models import published as published_files
from sivae.objectives import Draws, Phase
from sivae.stacked_step import StackedModels
from sivae.state import TrainingState, build_graphs, build_networks, build_objectives
from sivae.step import FiniteGate, Pass, train_step

LR = 2e-4
OUT_OF_MEMORY = 77  # what such a process ends with


@dataclass
class Ours:
    """The training step of `sivae train`: images to floats, draws, both phases through the engines, gate, averages."""

    state: Any
    settings: Config
    batch_size: int
    device: torch.device
    images_seen: int = 0

    def __post_init__(self):
        model = self.settings.model
        shape = (self.batch_size, model.num_channels, model.resolution, model.resolution)
        if model.family == "mlp":
            shape = (self.batch_size, *model.sample_shape)
        self.pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        if self.device.type == "cuda":
            self.pixels = self.pixels.pin_memory()

    def draws(self) -> Draws:
        model, objective = self.settings.model, self.settings.objective
        numbers = range(self.images_seen, self.images_seen + self.batch_size)
        if model.family != "style":
            return randomness.step_draws(0, numbers, model.latent_dim, self.device)
        randomness.seed_noise(0, self.images_seen, 0)
        num_layers = models.style.num_layers(model.resolution)
        return randomness.style_draws(
            0, numbers, model.latent_dim, self.device, mixing=objective.style_mixing, num_layers=num_layers
        )

    def __call__(self) -> dict[str, Tensor]:
        low, high = models.VALUE_RANGES[self.settings.model.family]
        x = images.to_float(self.pixels.to(self.device, non_blocking=True), low, high)
        terms = train_step(
            self.state.encoder, self.state.decoder, None, self.state.objective, [Pass(x, None, self.draws())], self.state.gate,
            self.images_seen, lr_encoder=LR, lr_decoder=LR, ema_decay=0.999, graphs=self.state.graphs(1),
        )  # fmt: skip
        self.images_seen += self.batch_size
        if self.device.type == "cpu" and self.state.gate.read() is not None:  # as the trainer does there
            raise RuntimeError("the step was not finite")
        return terms

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.state.encoder.network, self.state.decoder.network


class PlainEngine:
    """`engines.Engine` without DeepSpeed: the same autocast, fused Adam, gate, norm and average. Measures what DeepSpeed adds."""

    def __init__(self, network: nn.Module, group: Group, precision: str, found_inf: Tensor):
        self.network, self.group, self.precision = network.to(group.device), group, precision
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.0, fused=True)
        self.optimizer.found_inf = found_inf
        self.average = [parameter.detach().clone() for parameter in network.parameters()]
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"

    def phase(self, run: Callable[[], Phase]) -> Phase:
        with torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            result = run()
        result.loss.backward()
        return result

    def gradient_norm(self) -> Tensor:
        self.grad_norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.network.parameters() if p.grad is not None]
        )
        return self.grad_norm

    def step(self, lr: float) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        torch._foreach_lerp_(self.average, [parameter.data for parameter in self.network.parameters()], 1 - decay)


class PlainState:
    """What `Ours` takes from a TrainingState, over plain engines."""

    def __init__(self, settings: Config, group: Group):
        self.settings, self.gate = settings, FiniteGate(group)
        if group.device.type == "cpu":  # as a TrainingState does
            allocator.keep_freed_memory()
        self.objective, _ = build_objectives(settings)
        self.encoder, self.decoder = (
            PlainEngine(network, group, settings.engine.precision, self.gate.found_inf)
            for network in build_networks(settings, group.device.type)
        )

    def graphs(self, passes: int) -> Graphs:
        return build_graphs(self.settings, self.encoder.network, self.decoder.network, passes)


class OfPoints:
    """The step of `sivae toy2d` for one model: `sivae.stacked_step`, without DeepSpeed."""

    networks = ()

    def __init__(self, settings: Config, batch_size: int, device: torch.device):
        self.batch_size, self.device, self.images_seen = batch_size, device, 0
        self.latent_dim = settings.model.latent_dim
        dtype = torch.bfloat16 if settings.engine.precision == "bfloat16" else torch.float32
        self.stack = StackedModels([models.build(**settings.model.model_dump())], LR, dtype, device)
        self.objective, _ = build_objectives(settings)
        self.batch = torch.rand(1, batch_size, settings.model.num_values)

    def __call__(self) -> dict[str, Tensor]:
        draws = toy2d.normals(
            [randomness.generator(0, self.images_seen)], self.batch_size, self.latent_dim, self.device
        )
        self.images_seen += self.batch_size
        return self.stack.step(self.objective, self.batch.to(self.device, non_blocking=True), draws)


@dataclass
class Theirs:
    """The published step on batches as its loader hands them out: floats on the host."""

    step: published.PublishedStep | published_style.PublishedStyleStep
    batch: Tensor
    device: torch.device

    def __call__(self) -> dict[str, Tensor]:
        return self.step(self.batch.to(self.device))

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.step.encoder, self.step.decoder


def published_step(
    settings: Config, device: torch.device
) -> published.PublishedStep | published_style.PublishedStyleStep:
    """For the networks and betas of settings, at the published gamma_r."""
    model, objective = settings.model, settings.objective
    betas = (objective.scale or 1 / model.num_values, objective.beta_rec, objective.beta_kl, objective.beta_neg)
    if model.family == "style":
        widths = models.style.widths(model.resolution, model.base_channels, model.max_channels)
        return published_style.PublishedStyleStep(
            model.num_channels, widths, model.latent_dim, model.num_mapping_layers, *betas, device=device, lr=LR,
            style_mixing=objective.style_mixing,
        )  # fmt: skip
    if model.family == "conv":
        shape = (model.num_channels, model.resolution, model.channels, model.latent_dim)
        networks = published.ConvEncoder(*shape), published.ConvDecoder(*shape)
    else:
        shape = (model.num_values, model.latent_dim, model.num_hidden, model.num_layers)
        networks = published.PointEncoder(*shape), published.PointDecoder(*shape)
    return published.PublishedStep(
        *(network.to(device) for network in networks), model.latent_dim, *betas, lr=LR, observes_mean=model.family == "mlp"
    )  # fmt: skip


def build(kind: str, settings: Config, batch_size: int, group: Group) -> Ours | OfPoints | Theirs:
    torch.manual_seed(0)
    if kind == "points":
        return OfPoints(settings, batch_size, group.device)
    if kind == "published":
        shape = settings.model.sample_shape if settings.model.family == "mlp" else None
        shape = shape or (settings.model.num_channels, settings.model.resolution, settings.model.resolution)
        batch = torch.rand(batch_size, *shape)
        batch = batch.flatten(1) if settings.model.family == "mlp" else batch
        return Theirs(published_step(settings, group.device), batch, group.device)
    state = PlainState(settings, group) if kind == "plain" else TrainingState(settings, group, accumulation=1)
    return Ours(state, settings, batch_size, group.device)


# What is asked


def seconds(step: Callable[[], Any], num_steps: int, device: torch.device) -> float:
    """Of one step, over `num_steps`: of the clock on a GPU, of the processor's time on a CPU, which others may be using too."""
    now = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        step()  # its memory was given back to the device after the last question
    _wait(device)
    start = now()
    for _ in range(num_steps):
        step()
    _wait(device)
    return (now() - start) / num_steps


def memory(step: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Bytes of tensors that lie there between steps, and how far a step goes beyond them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        return {"held": held, "beyond": torch.cuda.max_memory_allocated(device) - held}
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter):
            storage = found.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    # Twice: of what is freed a profile knows the size only where one has seen it made, as the gradients of the step before.
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
            step()
    return {"held": sum(storages.values()), "beyond": live_and_peak_bytes(allocations)[1]}


def counts(contender: Ours | OfPoints | Theirs) -> dict[str, Any]:
    """FLOPs of a step, and its passes by network and kind; of other layers than convolutions only the FLOPs."""
    with _Counts(contender.networks) as counted:
        contender()
    return {"flops": counted.flops, "passes": dict(counted.passes)}


class _Counts(TorchDispatchMode):
    """FLOPs; and how often a convolution in the midst of each network is computed, differentiated by its input and by its weights.

    torch's own counter of FLOPs also follows modules, which it cannot while gradients are taken inside of a step.
    """

    def __init__(self, networks: tuple[nn.Module, nn.Module]):
        super().__init__()
        self.passes: Counter[str] = Counter()
        self.flops, self.names = 0, {}
        for name, network in zip(("encoder", "decoder"), networks):
            convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
            if convolutions:
                self.names[convolutions[len(convolutions) // 2].weight.data_ptr()] = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet is torch.ops.aten.convolution:
            self._count(args[1], "forward")
        elif packet is torch.ops.aten.convolution_backward:
            by_input, by_weight, _ = args[10]
            self._count(args[2], "by_input", by_input)
            self._count(args[2], "by_weight", by_weight)
        result = func(*args, **(kwargs or {}))
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result

    def _count(self, weight: Tensor, kind: str, happens: bool = True) -> None:
        if happens and weight.data_ptr() in self.names:
            self.passes[f"{self.names[weight.data_ptr()]} {kind}"] += 1


def peaks(device: torch.device) -> dict[str, float]:
    """FLOPs a second of one large matrix product and of one 3x3 convolution, the better of both memory layouts."""
    size, batch = (8192, 64) if device.type == "cuda" else (1536, 8)
    found = {}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False), ("tf32", torch.float32, True), ("bfloat16", torch.bfloat16, False),
    ):  # fmt: skip
        if tf32 and device.type == "cpu":
            continue
        with _tf32(tf32):
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            found[f"matrix {name}"] = _rate(lambda: a @ b, 2 * size**3, device)
            x = torch.randn(batch, 256, 64, 64, device=device, dtype=dtype)
            weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
            flops = 2 * x.numel() * 256 * 9
            found[f"convolution {name}"] = max(
                _rate(
                    lambda x=x.to(memory_format=layout), w=weight.to(memory_format=layout): torch.conv2d(x, w, padding=1),
                    flops, device,
                )
                for layout in (torch.contiguous_format, torch.channels_last)
            )  # fmt: skip
    return found


def _rate(work: Callable[[], Tensor], flops: float, device: torch.device) -> float:
    once = min(seconds(work, 1, device) for _ in range(3))
    return flops / min(seconds(work, max(1, int(0.1 / once)), device) for _ in range(3))


@contextlib.contextmanager
def _tf32(enabled: bool):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def same_losses(settings: Config, batch_size: int, group: Group) -> dict[str, tuple[float, float]]:
    """First step of both from the same weights, batch and draws: by term, the published value and ours."""
    torch.manual_seed(1)  # not the seed that our networks start from
    step = published_step(settings, group.device)
    state = {
        f"{name}.{key}": value.clone()
        for name, network in (("encoder", step.encoder), ("decoder", step.decoder))
        for key, value in network.state_dict().items()
    }
    ours = TrainingState(settings, group, accumulation=1)
    for name, weights in published_files.convert(state).networks.items():
        getattr(ours, name).load_state_dict(weights)
    contender = Ours(ours, settings, batch_size, group.device)
    draws = contender.draws()
    queue = [getattr(draws, name) for name in Draws.names()]  # which is the published order
    step.randn = lambda like: queue.pop(0)
    x = images.to_float(contender.pixels.to(group.device))
    theirs, found = step(x.flatten(1) if settings.model.family == "mlp" else x), contender()
    return {name: (value.item(), found[name].item()) for name, value in theirs.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """argv: a JSON of kind, config, overrides, batch_size, device, threads."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    with distributed.join(asked["device"]) as group:

        def answer(found: Any) -> None:
            answers.write(json.dumps(found) + "\n")
            answers.flush()

        if asked["kind"] == "peaks":
            contender = None
        else:
            settings = config.load(asked["config"], asked["overrides"])
            if asked["kind"] == "same losses":
                answer(same_losses(settings, asked["batch_size"], group))
                return
            contender = build(asked["kind"], settings, asked["batch_size"], group)
        answer("ready")
        for line in sys.stdin:
            request = json.loads(line)
            if request == "peaks":
                answer(peaks(group.device))
            elif request == "counts":
                answer(counts(contender))
            elif request == "memory":
                answer(memory(contender, group.device))
            else:
                answer(seconds(contender, request, group.device))
            if group.device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        print(error, file=sys.stderr)
        distributed.end_process(OUT_OF_MEMORY)
    distributed.end_process(0)
