"""What a training step costs, without computing it: the real step runs on fake tensors, which have shapes but no values.

Counted are FLOPs (matrix products and convolutions, a multiplication and an addition each), bytes that operations read and
write, and the live bytes of activations at their highest. The step is `sivae.step.train_step` with the configured objective,
so the number of passes is that of the code, and so is what backward keeps.

Not counted: work space inside an operation (cuDNN, oneDNN), fragmentation, and what the CUDA context takes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from sivae import models
from sivae.augment import NUM_CALLS, NUM_UNIFORMS
from sivae.config import Config
from sivae.distributed import Group
from sivae.objectives import Draws, Phase
from sivae.state import build_graphs, build_networks, build_objectives
from sivae.step import FiniteGate, Pass, train_step

# What autocast on a GPU computes in float32 and on a CPU does not, of what the networks and losses call.
_FLOAT32_ON_GPUS = {
    "group_norm", "layer_norm", "exp", "rsqrt", "log", "pow", "square", "prod", "sum", "norm", "interpolate",
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One kind of call: FLOPs and bytes of all its calls together; `dtype` is that of its result."""

    flops: int
    num_bytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Trace:
    """A step of one rank over `num_images` images."""

    num_images: int
    operations: tuple[Operation, ...]
    num_operations: int
    """Calls, that is kernels to launch."""
    activation_bytes: int
    """Highest sum of live tensors beside parameters, their gradients, and the images of the step."""

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)

    @property
    def moved_bytes(self) -> int:
        return sum(operation.num_bytes for operation in self.operations)


def trace_step(
    settings: Config, micro_batch_size: int, num_passes: int = 1, resolution: int | None = None, device_type: str = "cuda"
) -> Trace:  # fmt: skip
    """Trace a step of `num_passes` accumulation passes of `micro_batch_size` images.

    `resolution`: that of a level of schedule.levels, of a run that grows. `device_type`: whose rules of autocast hold. Takes
    seconds and no memory, whatever the size.
    """
    resolution = resolution or settings.model.resolution
    stage = {"level": models.style.level_of(resolution), "blend": 1.0} if settings.schedule.levels else {}
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        encoder, decoder = build_networks(settings, device_type)
        bootstrap = settings.objective.name == "bootstrap"
        target = models.build(**settings.model.model_dump()).decoder.requires_grad_(False) if bootstrap else None
        gate = FiniteGate(Group(0, 1, torch.device("cpu"), None))
        objective, _ = build_objectives(settings)
        passes = [example_pass(settings, micro_batch_size, resolution) for _ in range(num_passes)]
        watch = _Watch()
        networks = [network for network in (encoder, decoder, target) if network is not None]
        watch.ignore(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
        watch.ignore(tree_leaves([(item.x, item.labels) for item in passes]))
        for network in networks:
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda parameter: watch.ignore([parameter.grad]))
        bfloat16 = settings.engine.precision == "bfloat16"
        rules = _GpuAutocast if device_type == "cuda" and bfloat16 else nullcontext
        for block in (block for network in networks for block in getattr(network, "blocks", ())):
            # Blocks are also called by backward, which runs outside of the phase.
            block.forward = _within(rules, block.forward)
        engines = [_TracedEngine(network, bfloat16, rules) for network in (encoder, decoder)]
        with watch:
            train_step(
                *engines, target, objective, passes, gate, 0, lr_encoder=1.0, lr_decoder=1.0, ema_decay=0.5, stage=stage,
                graphs=build_graphs(settings, encoder, decoder, num_passes),
            )  # fmt: skip
        return Trace(micro_batch_size * num_passes, watch.operations(), watch.num_operations(), watch.peak_bytes)


def example_pass(settings: Config, count: int, resolution: int | None = None) -> Pass:
    """Noise for images, and draws, of the shapes of a training pass; of a run that grows at a level's `resolution`."""
    model, objective = settings.model, settings.objective
    resolution = resolution or model.resolution
    draws: dict[str, Tensor] = {name: torch.randn(count, model.latent_dim) for name in Draws.names()}
    if model.family == "style":
        draws |= {name: torch.randn(count, model.latent_dim) for name in ("z_prior_d", "eps_real_d")}
        if objective.name != "vae" and objective.style_mixing:
            num_layers = models.style.num_layers(resolution)
            draws |= {name: torch.randn(count, num_layers, model.latent_dim) for name in ("z_prior", "z_prior_d")}
    if objective.augment:
        draws["augment"] = torch.rand(count, NUM_CALLS, NUM_UNIFORMS)
    labels = torch.zeros(count, dtype=torch.int64) if model.num_classes else None
    return Pass(torch.rand(count, model.num_channels, resolution, resolution), labels, Draws(**draws))


class _TracedEngine:
    """Stands in for `engines.Engine` in `train_step`: phases run, nothing is optimised."""

    def __init__(self, network: nn.Module, autocast: bool, rules: Callable[[], AbstractContextManager]):
        self.network, self.autocast, self.rules = network, autocast, rules
        self.grad_norm = torch.zeros(())

    def phase(self, run: Callable[[], Phase]) -> Phase:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast), self.rules():
            result = run()
        result.loss.backward()
        return result

    def gradient_norm(self) -> Tensor:
        return self.grad_norm

    def step(self, lr: float) -> None:
        pass

    def update_average(self, decay: float) -> None:
        self.network.zero_grad()


class _Watch(TorchDispatchMode):
    """Sees every operation under autograd: counts, and follows each storage from its making to its end."""

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._refs: dict[int, weakref.ref] = {}
        self._ignored: dict[int, Any] = {}
        self._calls: Counter[tuple[Any, int, int, torch.dtype]] = Counter()

    def ignore(self, tensors: Iterable[Tensor | None]) -> None:
        """Do not count these, from now on."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if self._refs.pop(storage._cdata, None) is not None:
                    self.live_bytes -= storage.nbytes()
                self._ignored[storage._cdata] = storage  # held, so that nothing else gets its place

    def operations(self) -> tuple[Operation, ...]:
        return tuple(
            Operation(flops * calls, num_bytes * calls, dtype)
            for (_, flops, num_bytes, dtype), calls in self._calls.items()
        )

    def num_operations(self) -> int:
        return sum(self._calls.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [self._follow(tensor) for tensor in made]
        if made and (any(fresh) or func._schema.is_mutable):
            taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*taken, *made))
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
            self._calls[func, flops, num_bytes, made[0].dtype] += 1
        return result

    def _follow(self, tensor: Tensor) -> bool:
        """Whether this storage was not there before."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._refs or key in self._ignored:
            return False

        def end(ref: weakref.ref) -> None:
            if self._refs.get(key) is ref:
                del self._refs[key]
                self.live_bytes -= num_bytes

        self._refs[key] = weakref.ref(storage, end)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return True


class _GpuAutocast(TorchFunctionMode):
    """Adds to the CPU's autocast what a GPU's computes in float32, so that a trace without a GPU keeps what one would keep."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in _FLOAT32_ON_GPUS:
            args = tree_map(lambda leaf: leaf.float() if _is_bfloat16(leaf) else leaf, args)
        return func(*args, **(kwargs or {}))


def _within(context: Callable[[], AbstractContextManager], function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return call


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
