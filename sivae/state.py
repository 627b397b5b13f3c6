"""Everything that learns: the two engines, the target decoder, the gate; built from settings, saved to and restored from tensors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sivae import allocator, inference, models, objectives
from sivae.augment import Augmented
from sivae.config import Config
from sivae.distributed import Group
from sivae.engines import Engine
from sivae.errors import UserError
from sivae.graphs import PLAIN, BriefGraphs, Graphs, SharedGraphs
from sivae.models import recompute
from sivae.step import FiniteGate

Tensors = dict[str, dict[str, Tensor]]


class TrainingState:
    """All methods are collectives: every rank calls them."""

    def __init__(self, settings: Config, group: Group, accumulation: int):
        self.settings, self.group = settings, group
        if group.device.type == "cpu":
            allocator.keep_freed_memory()
        encoder, decoder = build_networks(settings, group.device.type)
        # Copied before DeepSpeed divides the decoder's parameters.
        bootstrap = settings.objective.name == "bootstrap"
        self.target = copy.deepcopy(decoder).to(group.device).requires_grad_(False) if bootstrap else None
        self.gate = FiniteGate(group)
        engine = {
            "zero_stage": settings.engine.zero_stage, "precision": settings.engine.precision,
            "offload_optimizer": settings.engine.offload_optimizer, "compile": settings.engine.compile,
            "overlap_reduction": settings.engine.overlap_reduction,
            "micro_batch_size": 1,  # DeepSpeed only counts with it
            "accumulation": accumulation, "found_inf": self.gate.found_inf,
        }  # fmt: skip
        self.encoder, self.decoder = (
            Engine(network, group, **optimizer.model_dump(exclude={"schedule"}), **engine)
            for network, optimizer in ((encoder, settings.encoder_optimizer), (decoder, settings.decoder_optimizer))
        )
        self.set_objectives()

    def set_objectives(self, beta_neg_factor: float = 1.0) -> None:
        """The objective and the plain VAE's, with `beta_neg` times a factor."""
        self.objective, self.vae = build_objectives(self.settings, beta_neg_factor)

    def graphs(self, passes: int) -> Graphs:
        """For steps of so many accumulation passes."""
        return build_graphs(self.settings, self.encoder.network, self.decoder.network, passes)

    def tensors(self) -> Tensors:
        """Whole CPU tensors by file and name, as a checkpoint keeps them; for rank 0 alone. Copies: training on leaves them alone."""
        tensors = {
            "weights": _joined(self.encoder.state_dict(main_only=True), self.decoder.state_dict(main_only=True)),
            "average": self.average(main_only=True),
            "optimizer": _joined(
                self.encoder.optimizer_state_dict(main_only=True), self.decoder.optimizer_state_dict(main_only=True)
            ),
        }
        if self.target is not None:
            tensors["target"] = {name: value.to("cpu", copy=True) for name, value in self.target.state_dict().items()}
        return tensors

    def average(self, main_only: bool = False) -> dict[str, Tensor]:
        """The running average of both networks, which samples are made with, on every rank's CPU."""
        return _joined(self.encoder.average_state_dict(main_only), self.decoder.average_state_dict(main_only))

    def restore(self, tensors: Tensors) -> None:
        for engine, prefix in ((self.encoder, "encoder"), (self.decoder, "decoder")):
            engine.load_state_dict(_part(tensors["weights"], prefix))
            engine.load_average_state_dict(_part(tensors["average"], prefix))
            engine.load_optimizer_state_dict(_part(tensors["optimizer"], prefix))
        if self.target is not None:
            # A run that was not a bootstrap run so far starts its target from its decoder.
            self.target.load_state_dict(tensors.get("target") or _part(tensors["weights"], "decoder"))
        self.gate.clear()

    def start_from_model(self) -> None:
        """From what `run.init_from` names, in place of random weights and averages."""
        tensors = self.group.broadcast_from_main(lambda: initial_tensors(self.settings))
        for engine, prefix in ((self.encoder, "encoder"), (self.decoder, "decoder")):
            engine.load_state_dict(_part(tensors, prefix))
            engine.load_average_state_dict(_part(tensors, prefix))
        if self.target is not None:
            self.target.load_state_dict(_part(tensors, "target") or _part(tensors, "decoder"))

    def refresh_target(self) -> None:
        """Copy the decoder into the target decoder, where there is one."""
        if self.target is not None:
            self.target.load_state_dict(self.decoder.state_dict())


def initial_tensors(settings: Config) -> dict[str, Tensor]:
    """Weights of the exported or imported model that `run.init_from` names, with its target decoder where bootstrap has use for one.
    Raises UserError where there is none, or another."""
    path, storage_options = settings.run.init_from, settings.run.storage_options
    model = inference.load(path, storage_options=storage_options)
    ours = settings.model.model_dump()
    if model.settings != ours:
        different = [key for key in sorted({*ours, *model.settings}) if ours.get(key) != model.settings.get(key)]
        raise UserError(f"run.init_from: {path} is another model; model.{', model.'.join(different)} differ")
    target = inference.read_target(path, storage_options) if settings.objective.name == "bootstrap" else {}
    return _joined(model.encoder.state_dict(), model.decoder.state_dict()) | {
        f"target.{name}": value for name, value in target.items()
    }


def build_networks(settings: Config, device_type: str) -> models.Networks:
    """With fresh weights, set up for training on a kind of device."""
    networks = models.build(seed=settings.run.seed, **settings.model.model_dump())
    engine = settings.engine
    last = engine.channels_last
    if last is None:
        last = device_type == "cpu" or engine.compile
    for network in networks:
        if engine.recompute_from_pixels is not None:
            recompute.mark(network, engine.recompute_from_pixels)
        if last and settings.model.family == "conv":
            network.memory_format = torch.channels_last
    return networks


def build_objectives(
    settings: Config, beta_neg_factor: float = 1.0
) -> tuple[objectives.Vae | Augmented, objectives.Vae | Augmented]:
    """The objective, with `beta_neg` times a factor, and the plain VAE's with which a run may begin."""
    fields = settings.objective.loss_fields()
    if beta_neg_factor != 1:
        fields["beta_neg"] *= beta_neg_factor
    objective = objectives.build(num_values=settings.model.num_values, **fields)
    vae = objectives.Vae(settings.objective.beta_rec, settings.objective.beta_kl, settings.objective.reconstruction)
    if not settings.objective.augment:
        return objective, vae
    low, high = models.VALUE_RANGES[settings.model.family]
    kinds, probability = tuple(settings.objective.augment), settings.objective.augment_probability
    return Augmented(objective, kinds, probability, high - low), Augmented(vae, kinds, probability, high - low)


def build_graphs(settings: Config, encoder: nn.Module, decoder: nn.Module, passes: int) -> Graphs:
    # At stage 3 parameters are not whole; and what is to overlap with a backward pass needs one.
    if settings.engine.zero_stage == 3 or settings.engine.overlap_reduction:
        return PLAIN
    return (SharedGraphs if settings.shares_forward(passes) else BriefGraphs)(encoder, decoder)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process: on the GPU what torch allocated, on the CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def _joined(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"encoder.{name}": value for name, value in encoder.items()} | {
        f"decoder.{name}": value for name, value in decoder.items()
    }
