"""The style family equals the published one: encode and decode at every level, blended or not, with fused scaling too; and
three training steps, with the equalized-learning-rate Adam, through pure torch and two DeepSpeed engines at ZeRO 0 to 3.

    pytest tests/numerics/test_golden_style.py
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from sivae import distributed, models, objectives
from sivae.engines import Engine, freeze
from sivae.graphs import PLAIN, BriefGraphs
from sivae.models import published_style
from sivae.models.style import average_styles
from sivae.objectives import Draws
from sivae.step import FiniteGate, Pass, train_step
from tests.numerics.test_golden import FOLDER, LOSS_TOLERANCE, WEIGHT_TOLERANCE, run_steps

FILES = sorted(FOLDER.glob("style_*.npz"))
STEPS = FOLDER / "style_soft_intro_vae.npz"
# Encodings and images are of size one, and float32.
IMAGE_TOLERANCE = 1e-5
# Of a tensor's largest gradient: float32 sums over images and pixels in another order. Where an instance norm takes most of a
# bias away, the sum cancels to a millionth of the network's largest gradient, and its rounding is that of what was summed.
GRADIENT_TOLERANCE, CANCELLED = 1e-5, 1e-5
# The decoder starts from a constant that is the same at each pixel, and divides it by its standard deviation: what comes out
# of the first step is rounding, 10,000-fold, and of the next ones still 700-fold. A shift of the first bias by 1e-7, which
# changes nothing but rounding, moves weights by 3e-3 in the three steps; so the file's own decoder weights are good to this,
# a fiftieth of how far they go, where the first step rounds alike.
DECODER_TOLERANCE = 1e-4
UNSEEN = "decoder.blocks.0.bias1"  # the instance norm after it removes it, so that its gradient is rounding alone
BETAS, EPS = (0.0, 0.99), 1e-8
ENTRIES = {
    "encoder": {"encoder": "discriminator", "mapping_tl": "mapping_tl"},
    "decoder": {"decoder": "generator", "mapping_fl": "mapping_fl"},
}


class Golden:
    def __init__(self, path, start, noise):
        self.data = np.load(path)
        self.settings, states = published_style.convert(self.entries(start))
        # In train mode nothing but this setting says what stands in for noise.
        self.encoder, self.decoder = models.build(**self.settings, noise=noise)
        self.encoder.load_state_dict(states["encoder"])
        self.decoder.load_state_dict(states["decoder"])
        self.factors = {
            "encoder": published_style.factors(self.encoder), "decoder": published_style.factors(self.decoder),
        }  # fmt: skip
        self.hp = {key.removeprefix("hp/"): float(self.data[key]) for key in self.data.files if key.startswith("hp/")}

    def entries(self, prefix):
        entries = {}
        for key in self.data.files:
            if key.startswith(f"{prefix}/"):
                _, entry, name = key.split("/")
                entries.setdefault(entry, {})[name] = self.tensor(key)
        return entries

    def tensor(self, key):
        return torch.from_numpy(self.data[key])

    @property
    def objective(self):
        names = {field.name for field in dataclasses.fields(objectives.SoftIntroVae)}
        return objectives.SoftIntroVae(**{name: value for name, value in self.hp.items() if name in names})

    def step(self, index):
        names = [*Draws.names(), "z_prior_d", "eps_real_d"]
        return self.tensor(f"step{index}/x"), Draws(**{name: self.tensor(f"step{index}/{name}") for name in names})

    def check_terms(self, index, terms):
        # The published model keeps one `rec`, which the decoder phase overwrites.
        for ours in ("loss_encoder", "loss_decoder", "rec_d", "kl_real"):
            name = "rec" if ours == "rec_d" else ours
            expected = float(self.data[f"step{index}/{name}"])
            assert float(terms[ours]) == pytest.approx(expected, rel=LOSS_TOLERANCE), f"{name} of step {index}"

    def check_gradients(self, network, gradients):
        expected = {}
        for prefix, entry in ENTRIES[network].items():
            start = f"step0/grad_{network}/{prefix}."
            state = {key.removeprefix(start): self.tensor(key) for key in self.data.files if key.startswith(start)}
            expected |= published_style.rename({entry: state})
        assert len(expected) > 20
        least = CANCELLED * max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in gradients.items():
            if name not in expected:  # noise weights, and levels beside those in use
                assert not gradient.any(), name
                continue
            error = (gradient - expected.pop(name)).abs().max()
            if f"{network}.{name}" == UNSEEN:
                assert gradient.abs().max() < 1e-7
                continue
            assert error <= GRADIENT_TOLERANCE * gradient.abs().max().clamp(min=least), f"gradient of {network}.{name}"
        assert not expected

    def check_weights(self, networks):
        _, expected = published_style.convert(self.entries("final"))
        for network, state in networks.items():
            assert set(state) == set(expected[network])
            # As the published weights: the learning-rate factor neither hides nor enlarges an error.
            errors = {
                name: (self.factors[network].get(name, 1.0) * (state[name] - value)).abs()
                for name, value in expected[network].items()
                if f"{network}.{name}" != UNSEEN
            }
            tolerance = WEIGHT_TOLERANCE if network == "encoder" else DECODER_TOLERANCE
            for name, error in errors.items():
                assert error.max() <= tolerance, f"{network}.{name}"
            assert torch.cat([e.flatten() for e in errors.values()]).quantile(0.99) <= WEIGHT_TOLERANCE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_encode_and_decode(path):
    golden = Golden(path, "init", noise="mean")
    groups = sorted({key.split("/")[0] for key in golden.data.files if key.startswith("lod")})
    assert len(groups) >= 4 and any(not group.endswith("blend1") for group in groups)
    for group in groups:
        level, blend = group.removeprefix("lod").split("_blend")
        stage = {"level": int(level), "blend": float(blend)}
        with torch.no_grad():
            mu, logvar = golden.encoder(golden.tensor(f"{group}/x"), **stage)
            images = golden.decoder(golden.tensor(f"{group}/mu"), **stage)
            styles = golden.decoder.styles(golden.tensor(f"{group}/mu"))
        found = {"mu": mu, "logvar": logvar, "decoded_no_noise": images, "styles": styles}
        for name, value in found.items():
            if name != "styles" or f"{group}/styles" in golden.data.files:
                error = (value - golden.tensor(f"{group}/{name}")).abs().max()
                assert error <= IMAGE_TOLERANCE, f"{name} of {group}"


class PublishedAdam:
    """The published optimizer written out, for parameters whose learning-rate factor is in the forward."""

    def __init__(self, network, lr):
        self.parameters, self.lr, self.steps = list(network.parameters()), lr, 0
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self):
        self.steps += 1
        size = self.lr * (1 - BETAS[1] ** self.steps) ** 0.5
        for parameter, square in zip(self.parameters, self.squares):
            if parameter.grad is not None:
                square.mul_(BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - BETAS[1])
                parameter -= size * parameter.grad / (square.sqrt() + EPS)


@pytest.mark.parametrize("kind", [None, BriefGraphs])
def test_objectives(kind):
    golden = Golden(STEPS, "train_init", noise="none")
    networks = {"encoder": golden.encoder, "decoder": golden.decoder}
    encoder, decoder, objective = golden.encoder, golden.decoder, golden.objective
    adams = {name: PublishedAdam(network, golden.hp["lr"]) for name, network in networks.items()}
    graphs = kind(encoder, decoder) if kind else PLAIN

    def step(index):
        x, draws = golden.step(index)
        freeze(trained=encoder, frozen=decoder)
        encoder.zero_grad()
        with average_styles(decoder, [1.0], lambda value: value):
            first = objective.encoder_phase(encoder, decoder, x, draws, graphs=graphs)
        first.loss.backward()
        adams["encoder"].step()
        freeze(trained=decoder, frozen=encoder)
        decoder.zero_grad()
        with average_styles(decoder, [1.0], lambda value: value):
            second = objective.decoder_phase(encoder, decoder, x, first.z, draws, graphs=graphs)
        second.loss.backward()
        adams["decoder"].step()
        return first.terms | second.terms

    def check(index, terms):
        golden.check_terms(index, terms)
        if index == 0:
            for name, network in networks.items():
                grads = {key: value.grad for key, value in network.named_parameters() if value.grad is not None}
                golden.check_gradients(name, grads)
        if index == 2:
            golden.check_weights({name: network.state_dict() for name, network in networks.items()})

    def save():
        states = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
        return states, {name: (adam.steps, [s.clone() for s in adam.squares]) for name, adam in adams.items()}

    def restore(saved):
        for name, network in networks.items():
            network.load_state_dict(saved[0][name])
            adams[name].steps, adams[name].squares = saved[1][name][0], [s.clone() for s in saved[1][name][1]]

    run_steps(3, step, check, save, restore)


def make_engines(golden, group, gate, stage, accumulation=1):
    return {
        name: Engine(
            network, group, lr=golden.hp["lr"], betas=list(BETAS), eps=EPS, eps_hat=True, weight_decay=0.0,
            clip_grad_norm=None, zero_stage=stage, precision="float32", offload_optimizer=False,
            micro_batch_size=4 // accumulation, accumulation=accumulation, found_inf=gate.found_inf,
        )
        for name, network in (("encoder", golden.encoder), ("decoder", golden.decoder))
    }  # fmt: skip


@pytest.mark.parametrize("stage, kind", [(0, None), (0, BriefGraphs), (1, BriefGraphs), (2, BriefGraphs), (3, None)])
def test_engines(stage, kind):
    golden = Golden(STEPS, "train_init", noise="none")
    lr, graphs = golden.hp["lr"], kind(golden.encoder, golden.decoder) if kind else PLAIN
    with distributed.join("cpu") as group:
        gate = FiniteGate(group)
        engines = make_engines(golden, group, gate, stage)

        def step(index):
            x, draws = golden.step(index)
            return train_step(
                *engines.values(), None, golden.objective, [Pass(x, None, draws)], gate, index,
                lr_encoder=lr, lr_decoder=lr, ema_decay=0.0, graphs=graphs,
            )  # fmt: skip

        def check(index, terms):
            golden.check_terms(index, terms)
            if index == 0:
                for name, engine in engines.items():
                    # Without a first decay rate Adam's first moment is the gradient, whole at every stage.
                    moments = engine.optimizer_state_dict()
                    start = "exp_avg."
                    grads = {key.removeprefix(start): value for key, value in moments.items() if key.startswith(start)}
                    golden.check_gradients(name, grads)
            if index == 2:
                golden.check_weights({name: engine.state_dict() for name, engine in engines.items()})
                # An average that keeps nothing of the past is the weights themselves, the average style included.
                average, plain = engines["decoder"].average_state_dict(), engines["decoder"].state_dict()
                assert plain["average_style"].abs().max() > 1e-2
                assert all(torch.equal(average[name], value) for name, value in plain.items())

        def save():
            return [(engine.state_dict(), engine.optimizer_state_dict()) for engine in engines.values()]

        def restore(saved):
            for engine, (weights, optimizer) in zip(engines.values(), saved):
                engine.load_state_dict(weights)
                engine.load_optimizer_state_dict(optimizer)

        run_steps(3, step, check, save, restore)
        assert gate.read() is None


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_engines_step_as_the_published_optimizer(stage):
    """From a constant that differs over the pixels, so that nothing is enlarged: every weight, to rounding."""

    def start():
        golden = Golden(STEPS, "train_init", noise="none")
        torch.nn.init.normal_(golden.decoder.constant, generator=torch.Generator().manual_seed(0))
        return golden

    golden = start()
    networks = {"encoder": golden.encoder, "decoder": golden.decoder}
    adams = [PublishedAdam(network, golden.hp["lr"]) for network in networks.values()]
    for index in range(3):
        x, draws = golden.step(index)
        freeze(golden.encoder, golden.decoder)
        golden.encoder.zero_grad()
        with average_styles(golden.decoder, [1.0], lambda value: value):
            phase = golden.objective.encoder_phase(golden.encoder, golden.decoder, x, draws)
        phase.loss.backward()
        adams[0].step()
        freeze(golden.decoder, golden.encoder)
        golden.decoder.zero_grad()
        with average_styles(golden.decoder, [1.0], lambda value: value):
            golden.objective.decoder_phase(golden.encoder, golden.decoder, x, phase.z, draws).loss.backward()
        adams[1].step()
    ours = start()
    with distributed.join("cpu") as group:
        gate = FiniteGate(group)
        engines = make_engines(ours, group, gate, stage, accumulation=2)
        for index in range(3):
            x, draws = ours.step(index)
            passes = [
                Pass(
                    x[half],
                    None,
                    Draws(**{name: value[half] for name, value in vars(draws).items() if value is not None}),
                )
                for half in (slice(0, 2), slice(2, 4))
            ]
            lr = ours.hp["lr"]
            train_step(
                *engines.values(),
                None,
                ours.objective,
                passes,
                gate,
                index,
                lr_encoder=lr,
                lr_decoder=lr,
                ema_decay=0.0,
            )
            if index == 1:  # the count of steps, which epsilon goes by, is part of the state
                for engine in engines.values():
                    state = engine.optimizer_state_dict()
                    engine.num_steps = 0
                    engine.load_optimizer_state_dict(state)
        for name, engine in engines.items():
            for key, value in engine.state_dict().items():
                factor = golden.factors[name].get(key, 1.0)
                error = (factor * (value - networks[name].state_dict()[key])).abs().max()
                # Where a gradient is not far above epsilon, its rounding is a share of a step of 1.5e-3.
                assert error <= 1e-5, f"{name}.{key}"
