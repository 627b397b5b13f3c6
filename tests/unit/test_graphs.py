"""Proves that keeping graphs briefly, and sharing them between the phases, changes gradients and terms by rounding alone; that
it saves the memory and the passes it says; and that BatchNorm's averages come out as published.

    python -m pytest tests/unit/test_graphs.py
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import live_and_peak_bytes
from sivae import models, objectives
from sivae.augment import NUM_CALLS, NUM_UNIFORMS, Augmented
from sivae.engines import freeze
from sivae.graphs import PLAIN, BriefGraphs, SharedGraphs
from sivae.objectives import Draws
from sivae.step import Pass, train_step

LATENT, BATCH = 4, 3
CONV = {"num_channels": 1, "resolution": 16, "channels": [4, 8], "latent_dim": LATENT, "group_size": 4}
FIELDS = {
    "vae": {},
    "intro_vae": {"margin": 3.0},
    "soft_intro_vae": {"beta_neg": 2.0},
    "soft_intro_vae with gamma_r": {"beta_neg": 2.0, "gamma_r": 0.5},
    "bootstrap": {"beta_neg": 2.0, "gamma_r": 0.5},
}


def build(**fields):
    encoder, decoder = models.build("conv", **CONV | fields)
    target = copy.deepcopy(models.build("conv", seed=5, **CONV | fields).decoder).requires_grad_(False)
    return encoder.double(), decoder.double(), target.double()


def sample(seed=0, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    draws = Draws(*(torch.randn(batch, LATENT, generator=generator, dtype=torch.float64) for _ in Draws.names()))
    x = torch.rand(batch, 1, 16, 16, generator=generator, dtype=torch.float64)
    augment = torch.rand(batch, NUM_CALLS, NUM_UNIFORMS, generator=generator, dtype=torch.float64)
    return x, replace(draws, augment=augment)


def run(objective, networks, graphs, x, draws, labels=None):
    """Terms, gradients of each network in its phase, and what is left behind in the buffers. No optimizer steps in between."""
    encoder, decoder, target = networks
    for network in (encoder, decoder):
        network.zero_grad()
    options = {"labels": labels, "target_decoder": target, "graphs": graphs}
    freeze(trained=encoder, frozen=decoder)
    first = objective.encoder_phase(encoder, decoder, x, draws, **options)
    first.loss.backward()
    assert all(parameter.grad is None for parameter in decoder.parameters())
    graphs.begin_decoder_phase()
    freeze(trained=decoder, frozen=encoder)
    ours = [None if parameter.grad is None else parameter.grad.clone() for parameter in encoder.parameters()]
    second = objective.decoder_phase(encoder, decoder, x, first.z, draws, images=first.images, **options)
    second.loss.backward()
    for parameter, before in zip(encoder.parameters(), ours):
        assert parameter.grad is before is None or torch.equal(parameter.grad, before)
    gradients = ours + [parameter.grad for parameter in decoder.parameters()]
    buffers = [buffer.clone() for network in (encoder, decoder) for buffer in network.buffers()]
    return first.terms | second.terms, gradients, buffers


@pytest.mark.parametrize("kind", [BriefGraphs, SharedGraphs])
@pytest.mark.parametrize("model", [{"norm": "group"}, {"norm": "batch"}, {"norm": "none", "num_classes": 3}])
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("augmented", [False, True])
def test_gradients_terms_and_averages_are_those_of_the_reference(name, model, kind, augmented):
    objective = objectives.build(name.split()[0], num_values=256, **FIELDS[name])
    if augmented:
        objective = Augmented(objective, ("color", "translation", "cutout"), 0.5, 1.0)
    labels = torch.arange(BATCH) if "num_classes" in model else None
    found = []
    for graphs in (None, kind):
        networks = build(**model)
        chosen = graphs(*networks[:2]) if graphs else PLAIN
        for step in range(2):
            found.append(run(objective, networks, chosen, *sample(step), labels))
    for reference, other in zip(found[:2], found[2:]):
        assert set(reference[0]) == set(other[0])
        for term, value in reference[0].items():
            assert torch.allclose(other[0][term], value, rtol=1e-10), term
        assert len(reference[1]) == len(other[1]) > 10
        for expected, gradient in zip(reference[1] + reference[2], other[1] + other[2]):
            assert torch.allclose(gradient, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("kind", [BriefGraphs, SharedGraphs])
def test_under_autocast_gradients_differ_by_its_rounding(kind):
    objective = objectives.build("soft_intro_vae", num_values=256, beta_neg=2.0)
    x, draws = sample(batch=8)
    x = x.float()
    draws = Draws(*(getattr(draws, name).float() for name in Draws.names()))
    found = []
    for graphs in (None, kind):
        networks = [network.float() for network in build()]
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(objective, networks, graphs(*networks[:2]) if graphs else PLAIN, x, draws)[1])
    for expected, gradient in zip(*found):
        assert (gradient - expected).norm() <= 0.02 * expected.norm()


class CountedDecoder(torch.nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.calls = decoder, 0

    def forward(self, z, labels=None):
        self.calls += 1
        return self.decoder(z, labels)


@pytest.mark.parametrize("name, calls", [("vae", (2, 1)), ("intro_vae", (4, 2)), ("soft_intro_vae", (6, 4))])
def test_shared_graphs_save_the_passes_of_the_decoder_phase(name, calls):
    objective = objectives.build(name, num_values=256)
    for kind, expected in zip((BriefGraphs, SharedGraphs), calls):
        encoder, decoder, target = build()
        decoder = CountedDecoder(decoder)
        run(objective, (encoder, decoder, target), kind(encoder, decoder), *sample())
        assert decoder.calls == expected


def test_brief_graphs_hold_one_term_at_a_time():
    """Wide images of few weights, so that activations are what there is."""
    objective = objectives.build("soft_intro_vae", num_values=256, beta_neg=2.0)
    peaks = {}
    for kind in (None, BriefGraphs, SharedGraphs):
        encoder, decoder, target = (network.float() for network in build())
        x, draws = sample(batch=64)
        x, draws = x.float(), Draws(*(getattr(draws, name).float() for name in Draws.names()))
        engines = [BareEngine(encoder), BareEngine(decoder)]
        for _ in range(2):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
                train_step(
                    *engines, target, objective, [Pass(x, None, draws)], OpenGate(), 0, lr_encoder=0.1, lr_decoder=0.1,
                    ema_decay=0.5, graphs=kind(encoder, decoder) if kind else PLAIN,
                )  # fmt: skip
        peaks[kind] = live_and_peak_bytes(allocations)[1]
    assert peaks[BriefGraphs] < 0.75 * peaks[None]
    assert peaks[BriefGraphs] < peaks[SharedGraphs] < 0.95 * peaks[None]


class BareEngine:
    """Stands in for an engine: phases run, nothing is optimised."""

    def __init__(self, network):
        self.network, self.grad_norm = network, torch.zeros(())

    def phase(self, compute):
        phase = compute()
        phase.loss.backward()
        return phase

    def gradient_norm(self):
        return self.grad_norm

    def step(self, lr):
        pass

    def update_average(self, decay):
        self.network.zero_grad()


class OpenGate:
    group = type("Group", (), {"mean": None})

    def watch(self, terms):
        pass

    def agree(self, images_seen):
        pass
