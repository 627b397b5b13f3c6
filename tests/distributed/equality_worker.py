"""Started by torchrun from test_equality.py: compares engines with plain torch on the same global batches."""

import copy
import itertools

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from sivae import distributed, models, objectives
from sivae.engines import Engine, freeze
from sivae.graphs import PLAIN, BriefGraphs, SharedGraphs
from sivae.objectives import Draws
from sivae.step import FiniteGate, Pass, train_step

BATCH, STEPS, LATENT, CLIP = 8, 3, 4, 0.5
MODEL = dict(
    family="conv", num_channels=1, resolution=16, channels=[8, 16], latent_dim=LATENT, norm="group", group_size=4
)


def batches():
    # A seed without a leaky ReLU input at zero to rounding: there the slope, and with it percents of a gradient, is chance.
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        draws = Draws(*(torch.randn(BATCH, LATENT, generator=generator) for _ in Draws.names()))
        yield torch.rand(BATCH, 1, 16, 16, generator=generator), draws


def plain(objective):
    """One process, no DeepSpeed: the reference."""
    encoder, decoder = models.build(seed=3, **MODEL)
    adams = [torch.optim.Adam(network.parameters(), lr=2e-4) for network in (encoder, decoder)]
    for x, draws in batches():
        z = None
        for trained, frozen, adam in ((encoder, decoder, adams[0]), (decoder, encoder, adams[1])):
            freeze(trained, frozen)
            adam.zero_grad()
            if trained is encoder:
                phase = objective.encoder_phase(encoder, decoder, x, draws)
                z = phase.z
            else:
                phase = objective.decoder_phase(encoder, decoder, x, z, draws)
            phase.loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
            adam.step()
    return encoder.state_dict(), decoder.state_dict()


def engines(objective, group, stage, accumulation, overlap):
    gate = FiniteGate(group)
    encoder, decoder = (
        Engine(
            network, group, lr=2e-4, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, clip_grad_norm=CLIP, zero_stage=stage,
            precision="float32", offload_optimizer=False, micro_batch_size=1, accumulation=3, found_inf=gate.found_inf,
            overlap_reduction=overlap,
        )
        for network in models.build(seed=3, **MODEL)
    )  # fmt: skip
    for engine in (encoder, decoder):
        engine.set_accumulation(accumulation)
    for index, (x, draws) in enumerate(batches()):
        mine = torch.arange(BATCH)[group.rank :: group.world_size].tensor_split(accumulation)
        passes = [
            Pass(
                x[i], None, Draws(*(getattr(draws, name)[i] for name in Draws.names())),
                weight=len(i) * group.world_size * accumulation / BATCH,
            )
            for i in mine
        ]  # fmt: skip
        kind = SharedGraphs if accumulation == 1 else BriefGraphs
        train_step(
            encoder, decoder, None, objective, passes, gate, index, lr_encoder=2e-4, lr_decoder=2e-4, ema_decay=0.5,
            graphs=PLAIN if stage == 3 or overlap else kind(encoder.network, decoder.network),
        )  # fmt: skip
    # The state goes out whole and comes back in unchanged, whatever the stage.
    states = [engine.state_dict() for engine in (encoder, decoder)]
    moments = [engine.optimizer_state_dict() for engine in (encoder, decoder)]
    for engine, state, moment in zip((encoder, decoder), states, moments):
        engine.load_state_dict({name: value + 1 for name, value in state.items()})
        engine.load_state_dict(state)
        engine.load_optimizer_state_dict({name: value * 0 for name, value in moment.items()})
        engine.load_optimizer_state_dict(moment)
        again = engine.state_dict() | engine.optimizer_state_dict()
        assert all(torch.equal(again[name], value) for name, value in (state | moment).items())
        average = engine.average_state_dict()
        engine.load_average_state_dict({name: value + 1 for name, value in average.items()})
        engine.load_average_state_dict(average)
        assert all(torch.equal(engine.average_state_dict()[name], value) for name, value in average.items())
        engine.reset_optimizer()
        assert not any(value.any() for value in engine.optimizer_state_dict().values())
    return states


def gate_stops_all_ranks(group):
    """A term that is NaN on the last rank alone holds back every rank's step, and its name is known on every rank."""
    gate = FiniteGate(group)
    encoder, decoder = (
        Engine(
            network, group, lr=2e-4, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, clip_grad_norm=None, zero_stage=stage,
            precision="float32", offload_optimizer=False, micro_batch_size=BATCH // group.world_size, accumulation=1,
            found_inf=gate.found_inf,
        )
        for network, stage in zip(models.build(seed=3, **MODEL), (0, 2))
    )  # fmt: skip
    before = copy.deepcopy([encoder.state_dict(), decoder.state_dict()])
    objective = objectives.build("soft_intro_vae", num_values=256)
    for index, (x, draws) in enumerate(batches()):
        mine = slice(group.rank, None, group.world_size)
        x = x[mine] * (float("nan") if index == 0 and group.rank == group.world_size - 1 else 1.0)
        item = Pass(x, None, Draws(*(getattr(draws, name)[mine] for name in Draws.names())))
        train_step(
            encoder, decoder, None, objective, [item], gate, 100 + index, lr_encoder=1.0, lr_decoder=1.0, ema_decay=0.5
        )
    bad = gate.read()
    assert bad is not None and bad.images_seen == 100 and "rec" in bad.terms and "kl_real" in bad.terms, bad
    for old, new in zip(before, (encoder.state_dict(), decoder.state_dict())):
        assert all(torch.equal(old[name], new[name]) for name in old)


def reduction_begins_before_the_last_gradient(group, stage, overlap):
    gate = FiniteGate(group)
    encoder, decoder = (
        Engine(
            network, group, lr=2e-4, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, clip_grad_norm=None, zero_stage=stage,
            precision="float32", offload_optimizer=False, micro_batch_size=1, accumulation=1, found_inf=gate.found_inf,
            overlap_reduction=overlap,
        )
        for network in models.build(seed=3, **MODEL)
    )  # fmt: skip
    freeze(encoder.network, decoder.network)

    def mark(gradient):
        with record_function("last gradient"):
            pass

    next(encoder.network.parameters()).register_hook(mark)
    x, draws = next(batches())
    objective = objectives.build("soft_intro_vae", num_values=256)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        encoder.phase(lambda: objective.encoder_phase(encoder.network, decoder.network, x, draws))
    starts = [(event.name, event.time_range.start) for event in found.events()]
    reduces = [start for name, start in starts if name.startswith("c10d::") and "reduce" in name]
    (last,) = [start for name, start in starts if name == "last gradient"]
    assert reduces
    return min(reduces) < last


def main():
    torch.set_num_threads(1)
    with distributed.join("cpu") as group:
        objective = objectives.build("soft_intro_vae", num_values=256, gamma_r=1e-2)
        reference = plain(objective)
        worst = 0.0
        overlaps = itertools.product((1, 2, 3), (1, 2), (True,))
        for stage, accumulation, overlap in [*itertools.product((0, 1, 2, 3), (1, 2), (False,)), *overlaps]:
            states = engines(objective, group, stage, accumulation, overlap)
            error = max(
                (state[name] - value).abs().max().item()
                for state, expected in zip(states, reference)
                for name, value in expected.items()
            )
            worst = max(worst, error)
            if group.is_main:
                print(
                    f"ranks {group.world_size} stage {stage} accumulation {accumulation} overlap {overlap}: {error:.1e}",
                    flush=True,
                )
        gate_stops_all_ranks(group)
        if group.world_size > 1:
            for stage in (1, 2, 3):
                assert reduction_begins_before_the_last_gradient(group, stage, overlap=True), stage
                assert not reduction_begins_before_the_last_gradient(group, stage, overlap=False), stage
        assert worst <= 1e-6, worst
        dist.barrier()
    if group.is_main:
        print("equal")


if __name__ == "__main__":
    main()
    distributed.end_process(0)
