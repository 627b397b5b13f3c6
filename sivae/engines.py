"""Two DeepSpeed engines, one per network; the only module that imports deepspeed.

A phase of the training step is one call of an engine: the engine wraps a module whose `forward` takes the whole phase
as a function, so DeepSpeed sees one forward and one backward however often the phase uses the network. The other
network is called as a plain module and frozen meanwhile. tests/distributed/test_equality.py holds this to plain torch
for ZeRO 0 to 3, with accumulation and clipping; several engine calls before a backward, or an unfrozen partner,
are silently wrong there.

State goes in and out as whole float32 tensors by parameter name, whatever the stage and the number of ranks.
That is what makes a checkpoint independent of both, and it needs no DeepSpeed file format, which is pickled.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sivae import cpu_adam
from sivae.distributed import Group
from sivae.errors import UserError
from sivae.objectives import Phase
from sivae.profiling import span

MOMENTS = ("exp_avg", "exp_avg_sq")
REDUCE_BUCKET = 500_000_000  # elements at most, DeepSpeed's default
OVERLAPPING_BUCKETS = 8  # of a network at most, about, where reduction overlaps with the backward pass


class _PhaseModule(nn.Module):
    """Runs a phase as its forward; in autocast for bfloat16."""

    def __init__(self, network: nn.Module, autocast: bool, device_type: str):
        super().__init__()
        self.network, self.autocast, self.device_type = network, autocast, device_type

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            return run()


class Engine:
    """A network with its optimizer under DeepSpeed, and the running average of its weights.

    `found_inf` is a device flag shared by both engines: once it is 1, optimizer steps change nothing. A non-finite loss
    thereby spoils no weight before the host, which looks only between log steps, has seen it. With offloaded optimizers,
    whose Adam does not know the flag, DeepSpeed itself leaves out a step with a non-finite gradient.
    """

    def __init__(
        self, network: nn.Module, group: Group, *, lr: float, betas: list[float], eps: float, weight_decay: float,
        clip_grad_norm: float | None, zero_stage: int, precision: str, offload_optimizer: bool,
        micro_batch_size: int, accumulation: int, found_inf: Tensor, eps_hat: bool = False, compile: bool = False,
        overlap_reduction: bool = False,
    ):  # fmt: skip
        deepspeed = _import_deepspeed(group.device)
        self.group, self.zero_stage, self.network = group, zero_stage, network.to(group.device)
        if compile:
            # A graph that is kept for the decoder phase is differentiated twice, so its backward may not reuse its memory.
            from torch._functorch import config as functorch

            functorch.donated_buffer = False
            self.network.compile(dynamic=False)
        # For the process: both engines have the same.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        wrapped = _PhaseModule(self.network, precision == "bfloat16", group.device.type)
        self.offload = offload_optimizer
        self.eps, self.eps_hat, self.beta2, self.num_steps = eps, eps_hat, betas[1], 0
        if offload_optimizer:
            adam = group.together(lambda: cpu_adam.load(deepspeed, tells=group.is_main))
            optimizer = adam(wrapped.parameters(), lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        else:
            # Without weight decay AdamW is Adam. Fused: the only implementation that honours `found_inf`.
            optimizer = torch.optim.AdamW(
                wrapped.parameters(), lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=True
            )
            optimizer.found_inf = found_inf
        # The buffer that gradients are reduced in is allocated whole: by default 2 GB for each network, however small.
        sizes = [parameter.numel() for parameter in wrapped.parameters()]
        bucket = min(REDUCE_BUCKET, sum(sizes))
        if overlap_reduction:  # a layer that is larger than a bucket would travel by itself, when nothing else does
            bucket = max(*sizes, bucket // OVERLAPPING_BUCKETS)
        zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": bucket}
        if overlap_reduction:
            zero["overlap_comm"] = True
        if offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": group.device.type == "cuda"}
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_grad_norm or 0.0 if zero_stage else 0.0,
            "zero_optimization": zero,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a phase
            "zero_allow_untested_optimizer": True,
        }
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}
        self.engine, _, _, _ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=settings)
        self._init_optimizer()
        self.average = [tensor.clone() for tensor in self._live()]
        self.average_buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        self.grad_norm = torch.zeros((), device=group.device)
        # At stage 0 DeepSpeed's clipping would wait for the device, and reduce a norm that all ranks have.
        self.clip_grad_norm = None if zero_stage else clip_grad_norm

    # One phase

    def phase(self, run: Callable[[], Phase]) -> Phase:
        """Forward and backward of one phase. The caller has frozen the other network (see `freeze`)."""
        result: list[Phase] = []

        def forward() -> Tensor:
            result.append(run())
            return result[0].loss

        loss = self.engine(forward)
        self.engine.backward(loss)
        return result[0]

    def step(self, lr: float) -> None:
        """Optimizer step at learning rate `lr` when the accumulated passes are complete, else only the bookkeeping."""
        last = self.engine.is_gradient_accumulation_boundary()
        self.num_steps += last
        for parameters in self._adam().param_groups:
            parameters["lr"] = lr
            if self.eps_hat and last:
                # torch adds epsilon to the corrected second moment's root.
                parameters["eps"] = self.eps / math.sqrt(1 - self.beta2**self.num_steps)
        if last and self.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), self.clip_grad_norm, self.gradient_norm())
        self.engine.step()
        if last and self.zero_stage:
            norm = self.engine.get_global_grad_norm()
            self.grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.group.device)

    def set_accumulation(self, passes: int) -> None:
        """Passes that make a step, from the next one on. Called between steps."""
        engine = self.engine
        engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * passes * self.group.world_size)
        engine.micro_steps = 0  # where DeepSpeed counts the passes of a step from
        if self.zero_stage:
            engine.optimizer.gradient_accumulation_steps = passes

    @torch.no_grad()
    def reset_optimizer(self) -> None:
        """Adam's state as before the first step."""
        self.num_steps = 0
        for values in self._adam().state.values():
            for moment in MOMENTS:
                values[moment].zero_()
            values["step"] = values["step"].zero_() if isinstance(values["step"], Tensor) else 0

    @torch.no_grad()
    def reset_moments(self, layers: Iterable[nn.Module]) -> None:
        """Adam's moments of layers that are used no more. Under ZeRO their gradient is zero, and what is left of the moments would
        move them on; at stage 0 they have none."""
        wanted = {parameter for layer in layers for parameter in layer.parameters()}
        with self._thawed() as ds:
            for name, parameter in self.network.named_parameters():
                for moment in MOMENTS if parameter in wanted else ():
                    self._set_moment(ds, parameter, moment, torch.zeros(self.shapes[name], device=self.group.device))

    def gradient_norm(self) -> Tensor | None:
        """Norm of the whole gradient before the step, where it is whole: at stage 0. Under ZeRO `step` leaves it in `grad_norm`."""
        if self.zero_stage:
            return None
        self.grad_norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.network.parameters() if p.grad is not None]
        )
        return self.grad_norm

    # The running average

    @span("averages")
    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weights, buffers included. Under ZeRO 3 each rank averages its shard."""
        torch._foreach_lerp_(self.average, self._live(), 1 - decay)
        for name, buffer in self.network.named_buffers():
            if buffer.is_floating_point():
                self.average_buffers[name].lerp_(buffer, 1 - decay)
            else:
                self.average_buffers[name].copy_(buffer)

    # State as whole tensors. Every method below is a collective: all ranks call it. With `main_only` the tensors are
    # copied to the CPU of rank 0 alone.

    def state_dict(self, main_only: bool = False) -> dict[str, Tensor]:
        """Weights and buffers by name, on the CPU. Floating buffers are averaged over the ranks, in place too."""
        return self._gather(self._live(), main_only) | self._buffers(dict(self.network.named_buffers()), main_only)

    def average_state_dict(self, main_only: bool = False) -> dict[str, Tensor]:
        """The running average of weights and buffers by name, on the CPU."""
        return self._gather(self.average, main_only) | self._buffers(self.average_buffers, main_only)

    def optimizer_state_dict(self, main_only: bool = False) -> dict[str, Tensor]:
        """`MOMENT.PARAMETER` -> float32 tensor on the CPU, and `step`."""
        state = {}
        with self._thawed() as ds:
            for moment in MOMENTS:
                # ZeRO 1 and 2 make whole ones on the device, so not all at once.
                tensors = (self._get_moment(ds, parameter, moment) for parameter in self.network.parameters())
                state |= {f"{moment}.{name}": tensor for name, tensor in self._gather(tensors, main_only).items()}
        # Not Adam's own count: a level of detail that is not in use yet has taken no step.
        return state | {"step": torch.tensor(float(self.num_steps))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Whole weights and buffers into the engine, its master copy included. Strict."""
        _check_names(state, [*self.shapes, *(name for name, _ in self.network.named_buffers())])
        with self._thawed() as ds:
            for name, parameter in self.network.named_parameters():
                value = state[name].to(self.group.device, torch.float32)
                if self.zero_stage == 3:
                    shard = self._shard(value, parameter)
                    parameter.ds_tensor.copy_(shard)
                    ds.safe_set_local_fp32_param(parameter, shard)
                else:
                    parameter.copy_(value)
                    if self.zero_stage:
                        ds.safe_set_full_fp32_param(parameter, value)
        for name, buffer in self.network.named_buffers():
            buffer.copy_(state[name])

    @torch.no_grad()
    def load_average_state_dict(self, state: dict[str, Tensor]) -> None:
        _check_names(state, [*self.shapes, *self.average_buffers])
        for average, (name, parameter) in zip(self.average, self.network.named_parameters()):
            value = state[name].to(self.group.device, torch.float32)
            average.copy_(self._shard(value, parameter) if self.zero_stage == 3 else value)
        for name, buffer in self.average_buffers.items():
            buffer.copy_(state[name])

    @torch.no_grad()
    def load_optimizer_state_dict(self, state: dict[str, Tensor]) -> None:
        _check_names(state, ["step", *(f"{moment}.{name}" for moment in MOMENTS for name in self.shapes)])
        adam, self.num_steps = self._adam(), int(state["step"])
        for values in adam.state.values():
            if isinstance(values["step"], Tensor):
                values["step"].fill_(float(state["step"]))
            else:
                values["step"] = int(state["step"])
        with self._thawed() as ds:
            for moment in MOMENTS:
                for name, parameter in self.network.named_parameters():
                    self._set_moment(ds, parameter, moment, state[f"{moment}.{name}"].to(self.group.device))

    # Helpers

    def _adam(self) -> torch.optim.Optimizer:
        """The torch optimizer under DeepSpeed's wrapper."""
        return self.engine.optimizer.optimizer if self.zero_stage else self.engine.optimizer

    @contextmanager
    def _thawed(self) -> Iterator[Any]:
        """DeepSpeed's state accessors. Under ZeRO 3 they silently skip a frozen parameter and keep gathered copies in use."""
        import deepspeed.utils

        before = [parameter.requires_grad for parameter in self.network.parameters()]
        self.network.requires_grad_(True)
        if self.zero_stage == 3:
            self.engine.optimizer.empty_partition_cache()  # the engine's own also collects garbage: seconds in a large process
        yield deepspeed.utils
        for parameter, requires_grad in zip(self.network.parameters(), before):
            parameter.requires_grad_(requires_grad)

    def _get_moment(self, ds: Any, parameter: nn.Parameter, moment: str) -> Tensor:
        """All of it, or this rank's flat shard under ZeRO 3."""
        if self.zero_stage == 0:
            return self._adam().state[parameter][moment]
        get = ds.safe_get_local_optimizer_state if self.zero_stage == 3 else ds.safe_get_full_optimizer_state
        return get(parameter, moment)

    def _set_moment(self, ds: Any, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        if self.zero_stage == 0:
            self._adam().state[parameter][moment].copy_(value)
        elif self.zero_stage == 3:
            ds.safe_set_local_optimizer_state(parameter, self._shard(value, parameter), moment)
        else:
            ds.safe_set_full_optimizer_state(parameter, value, moment)

    def _init_optimizer(self) -> None:
        """Adam's state as before the first step, present from the start, so that a checkpoint can be loaded into it."""
        adam = self._adam()
        if self.zero_stage == 3:
            tensors = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            tensors = [tensor for parameters in adam.param_groups for tensor in parameters["params"]]
        adam.state.clear()
        for tensor in tensors:
            step = 0 if self.offload else torch.zeros((), dtype=torch.float32, device=tensor.device)
            adam.state[tensor] = {"step": step} | {moment: torch.zeros_like(tensor.data) for moment in MOMENTS}
        if self.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _live(self) -> list[Tensor]:
        """What this rank holds of each parameter: all of it, or its flat shard under ZeRO 3."""
        return [p.ds_tensor.data if self.zero_stage == 3 else p.data for p in self.network.parameters()]

    def _buffers(self, buffers: dict[str, Tensor], main_only: bool) -> dict[str, Tensor]:
        """CPU copies of buffers, the floating ones averaged over the ranks first."""
        for buffer in buffers.values():
            if buffer.is_floating_point():
                self.group.mean(buffer)
        wanted = self.group.is_main or not main_only
        return {name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers.items() if wanted}

    def _gather(self, tensors: Iterable[Tensor], main_only: bool) -> dict[str, Tensor]:
        """Whole CPU copies by parameter name of what `_live` would list."""
        whole = {}
        # From a GPU one after the other, and the host waits once. Pinned memory is kept by torch for the next time.
        pinned = self.group.device.type == "cuda"
        for (name, shape), tensor in zip(self.shapes.items(), tensors):
            if self.zero_stage == 3:
                tensor = tensor.to(self.group.device)
                flat = tensor.new_empty(tensor.numel() * self.group.world_size)
                dist.all_gather_into_tensor(flat, tensor.contiguous())
                tensor = flat[: torch.Size(shape).numel()].view(shape)
            if self.group.is_main or not main_only:
                copy = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=pinned)
                whole[name] = copy.copy_(tensor.detach(), non_blocking=pinned)
        if pinned:
            torch.cuda.current_stream().synchronize()
        return whole

    def _shard(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This rank's flat part of a whole tensor, padded with zeros at the end as DeepSpeed does."""
        size = parameter.ds_tensor.numel()
        flat = value.new_zeros(size * self.group.world_size)
        flat[: value.numel()] = value.flatten()
        return flat[self.group.rank * size : (self.group.rank + 1) * size]


def freeze(trained: nn.Module, frozen: nn.Module, stage: dict[str, Any] | None = None) -> None:
    """Only `trained` collects gradients. Through `frozen` they pass. `stage`: what the networks are called with.

    Layers of levels that the stage does not use are frozen too: for a parameter that a backward pass leaves out,
    DeepSpeed's ZeRO 3 would take the gradient of the step before again.
    """
    trained.requires_grad_(True)
    frozen.requires_grad_(False)
    for layers in trained.idle(**stage) if stage else ():
        layers.requires_grad_(False)


def _check_names(state: dict[str, Tensor], expected: list[str]) -> None:
    if set(state) != set(expected):
        missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        raise KeyError(f"state does not fit the network: missing {missing[:3]}, unknown {unknown[:3]}")


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, without compiling anything. On import it probes compilers and prints; that goes to the debug log."""
    level = logging.DEBUG if os.environ.get("SIVAE_DEBUG") else logging.ERROR
    os.environ["DS_ACCELERATOR"] = device.type  # it may still name the one that DeepSpeed was installed for
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # DeepSpeed calls collectives by names that newer torch renames.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(level)
    if (before := deepspeed.get_accelerator().device_name()) != device.type:
        raise UserError(
            f"run.device: this process trained on {before} before, where DeepSpeed stays; start another process for {device.type}",
            shared=True,
        )
    if device.type == "cpu":
        # The shared-memory all-reduce for CPUs is compiled on first use; a killed build leaves a lock that hangs later runs.
        # Where there are GPUs this list, which nobody reads there, would print a warning for each kernel that needs nvcc.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
    return deepspeed
