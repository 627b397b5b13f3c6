"""Our computations equal the published ones: losses, terms, gradients, weights after the last step.

Every `mlp_*.npz` and `conv_*.npz` of the golden folder (tests/data/golden, or $SIVAE_GOLDEN_DIR) is imported as a published
state dict and stepped with the recorded batches and draws, through the pure objectives with torch's Adam and through two
real DeepSpeed engines at ZeRO 0 to 3.

    pytest tests/numerics/test_golden.py
"""

import copy
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sivae import distributed, models, objectives
from sivae.engines import Engine, freeze
from sivae.graphs import PLAIN, BriefGraphs, SharedGraphs
from sivae.models import published
from sivae.objectives import Draws
from sivae.step import FiniteGate, Pass, train_step

FOLDER = Path(os.environ.get("SIVAE_GOLDEN_DIR") or Path(__file__).parent.parent / "data" / "golden")
FILES = sorted(path for pattern in ("mlp_*.npz", "conv_*.npz") for path in FOLDER.glob(pattern))
# Float32 sums over thousands of values in another order: the recorded numbers themselves are only good to about 1e-6.
LOSS_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-5, 2e-5


class Golden:
    """One file: the imported networks, the objective its hyperparameters describe, its steps."""

    def __init__(self, path: Path):
        self.data = np.load(path)
        state = {
            name.removeprefix("init/"): torch.from_numpy(self.data[name])
            for name in self.data.files
            if name.startswith("init/")
        }
        self.found = published.convert(state)
        self.encoder, self.decoder = models.build(**self.found.settings)
        self.encoder.load_state_dict(self.found.networks["encoder"])
        self.decoder.load_state_dict(self.found.networks["decoder"])
        self.target = None
        if "target_decoder" in self.found.networks:
            self.target = models.build(**self.found.settings).decoder.requires_grad_(False)
            self.target.load_state_dict(self.found.networks["target_decoder"])
        hp = {name.removeprefix("hp/"): float(self.data[name]) for name in self.data.files if name.startswith("hp/")}
        self.hp = hp
        if "m_plus" in hp:
            self.objective = objectives.IntroVae(
                beta_rec=hp["weight_rec"], beta_kl=hp["weight_kl"], beta_neg=hp["weight_neg"], margin=hp["m_plus"]
            )
        else:
            kind = objectives.Bootstrap if self.target is not None else objectives.SoftIntroVae
            known = {field.name for field in dataclasses.fields(kind)}
            self.objective = kind(**{name: value for name, value in hp.items() if name in known})
        self.num_steps = len({name.split("/")[0] for name in self.data.files if name.startswith("step")})

    def step(self, index: int) -> tuple[torch.Tensor, Draws]:
        x = self.tensor(f"step{index}/x")
        # IntroVAE draws less than Soft-IntroVAE; what it does not use may be anything.
        unused = torch.zeros_like(self.tensor(f"step{index}/z_prior"))
        return x, Draws(*(self.tensor(f"step{index}/{name}", unused) for name in Draws.names()))

    def tensor(self, name: str, default: torch.Tensor | None = None) -> torch.Tensor:
        return torch.from_numpy(self.data[name]) if name in self.data.files else default

    def check_terms(self, index: int, terms: dict[str, torch.Tensor]) -> None:
        expected = {
            name.split("/")[1]: float(self.data[name])
            for name in self.data.files
            if name.startswith(f"step{index}/") and self.data[name].ndim == 0
        }
        assert {"loss_encoder", "loss_decoder", "rec", "kl_real"} <= set(expected)
        terms = {name: float(value) for name, value in terms.items()}
        if "m_plus" in self.hp:
            # Published, the reconstruction is no part of the decoder's loss: its gradient is left over from the encoder's.
            terms["loss_decoder"] -= self.hp["weight_rec"] * terms["rec_d"]
        for name, value in expected.items():
            assert terms[name] == pytest.approx(value, rel=LOSS_TOLERANCE), f"{name} of step {index}"

    def check_gradients(self, network: str, gradients: dict[str, torch.Tensor]) -> None:
        expected = self.renamed(f"step0/grad_{network}/", network)
        assert set(expected) == set(gradients)
        for name, gradient in gradients.items():
            # Relative to the largest of its tensor; below 0.1 the sums it comes from set the rounding.
            scale = expected[name].abs().max().clamp(min=0.1)
            error = (gradient - expected[name]).abs().max()
            assert error <= GRADIENT_TOLERANCE * scale, f"gradient of {network}.{name}"

    def check_weights(self, networks: dict[str, dict[str, torch.Tensor]]) -> None:
        if not any(name.startswith("final/") for name in self.data.files):
            return
        for network, state in networks.items():
            expected = self.renamed(f"final/{network}.", network)
            assert set(state) == set(expected)
            for name, value in expected.items():
                assert torch.allclose(
                    state[name].to(value.dtype), value, rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE
                ), f"{network}.{name}"

    def renamed(self, prefix: str, network: str) -> dict[str, torch.Tensor]:
        """Recorded tensors under our names, which the converter knows."""
        recorded = {name.removeprefix(prefix): self.tensor(name) for name in self.data.files if name.startswith(prefix)}
        if "main.input.weight" in recorded:
            return dict(zip(self.found.networks[network], recorded.values()))
        return published._rename_conv(recorded, network.removeprefix("target_"))


def test_there_are_golden_files():
    assert FILES, f"no mlp_*.npz or conv_*.npz in {FOLDER}"


@pytest.mark.parametrize("kind", [None, BriefGraphs, SharedGraphs])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_objectives(path, kind):
    golden = Golden(path)
    networks = {"encoder": golden.encoder, "decoder": golden.decoder}
    if golden.target is not None:
        networks["target_decoder"] = golden.target
    adams = {name: torch.optim.Adam(networks[name].parameters(), lr=2e-4) for name in ("encoder", "decoder")}
    objective, encoder, decoder = golden.objective, golden.encoder, golden.decoder
    graphs = kind(encoder, decoder) if kind else PLAIN

    def step(index):
        x, draws = golden.step(index)
        freeze(trained=encoder, frozen=decoder)
        adams["encoder"].zero_grad()
        options = {"target_decoder": golden.target, "graphs": graphs}
        first = objective.encoder_phase(encoder, decoder, x, draws, **options)
        first.loss.backward()
        adams["encoder"].step()
        assert (first.images is not None) == (kind is SharedGraphs)
        graphs.begin_decoder_phase()
        freeze(trained=decoder, frozen=encoder)
        adams["decoder"].zero_grad()
        second = objective.decoder_phase(encoder, decoder, x, first.z, draws, images=first.images, **options)
        second.loss.backward()
        adams["decoder"].step()
        return first.terms | second.terms

    def check(index, terms):
        golden.check_terms(index, terms)
        if index == 0:
            for name in ("encoder", "decoder"):
                golden.check_gradients(name, {key: value.grad for key, value in networks[name].named_parameters()})
        if index == golden.num_steps - 1:
            golden.check_weights({name: network.state_dict() for name, network in networks.items()})

    def save():
        return copy.deepcopy([part.state_dict() for part in (*networks.values(), *adams.values())])

    def restore(states):
        for part, state in zip((*networks.values(), *adams.values()), copy.deepcopy(states)):
            part.load_state_dict(state)

    run_steps(golden.num_steps, step, check, save, restore)


@pytest.mark.parametrize("stage, kind", [(0, SharedGraphs), (1, BriefGraphs), (2, SharedGraphs), (3, None)])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_engines(path, stage, kind):
    golden = Golden(path)
    with distributed.join("cpu") as group:
        gate = FiniteGate(group)
        engines = {
            name: Engine(
                network, group, lr=2e-4, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, clip_grad_norm=None, zero_stage=stage,
                precision="float32", offload_optimizer=False, micro_batch_size=len(golden.step(0)[0]), accumulation=1,
                found_inf=gate.found_inf,
            )
            for name, network in (("encoder", golden.encoder), ("decoder", golden.decoder))
        }  # fmt: skip

        def step(index):
            x, draws = golden.step(index)
            return train_step(
                *engines.values(), golden.target, golden.objective, [Pass(x, None, draws)], gate, index,
                lr_encoder=2e-4, lr_decoder=2e-4, ema_decay=0.0,
                graphs=kind(golden.encoder, golden.decoder) if kind else PLAIN,
            )  # fmt: skip

        def check(index, terms):
            golden.check_terms(index, terms)
            if index == 0:
                for name, engine in engines.items():
                    # Adam's first moment after one step is a tenth of the gradient, whole at every stage.
                    moments = engine.optimizer_state_dict()
                    found = {
                        key.removeprefix("exp_avg."): 10 * value
                        for key, value in moments.items()
                        if key.startswith("exp_avg.")
                    }
                    golden.check_gradients(name, found)
                    norm = torch.linalg.vector_norm(torch.stack([value.norm() for value in found.values()]))
                    assert float(engine.grad_norm) == pytest.approx(float(norm), rel=GRADIENT_TOLERANCE)
            if index == golden.num_steps - 1:
                states = {name: engine.state_dict() for name, engine in engines.items()}
                # An average that keeps nothing of the past is the weights themselves, buffers included.
                for name, engine in engines.items():
                    assert all(
                        torch.equal(value, states[name][key]) for key, value in engine.average_state_dict().items()
                    )
                if golden.target is not None:
                    states["target_decoder"] = golden.target.state_dict()
                golden.check_weights(states)

        def save():
            target = golden.target and copy.deepcopy(golden.target.state_dict())
            return [(engine.state_dict(), engine.optimizer_state_dict()) for engine in engines.values()], target

        def restore(saved):
            states, target = saved
            for engine, (weights, optimizer) in zip(engines.values(), states):
                engine.load_state_dict(weights)
                engine.load_optimizer_state_dict(optimizer)
            if target is not None:
                golden.target.load_state_dict(target)

        run_steps(golden.num_steps, step, check, save, restore)
        assert gate.read() is None


def run_steps(num_steps, step, check, save, restore):
    """All steps, each checked. Where one differs, it may do so by the side of a single kink, in it or before it, and by nothing else.

    A (leaky) ReLU whose input is zero to rounding has the slope that rounding gives it, and one such unit changes a gradient
    by percents. In conv_bootstrap.npz the recorded last step has one (input 1.5e-6, 2% of the encoder's gradient).
    """
    before, near = [], []

    def excused(last):
        for first in range(last, -1, -1):
            for flip in near[first]:
                restore(before[first])
                try:
                    for index in range(first, last + 1):
                        before[index] = save()
                        with Kinks(flip if index == first else (-1, 0)):
                            terms = step(index)
                        check(index, terms)
                    return True
                except AssertionError:
                    continue
        return False

    for index in range(num_steps):
        before.append(save())
        with Kinks() as kinks:
            terms = step(index)
        near.append(kinks.near)
        try:
            check(index, terms)
        except AssertionError:
            if not excused(index):
                raise


class Kinks(TorchFunctionMode):
    """Lists the units of all (leaky) ReLUs whose input is within rounding of zero, or gives one of them its other slope."""

    def __init__(self, flip: tuple[int, int] | None = None):
        super().__init__()
        self.flip, self.calls, self.near = flip, 0, []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function not in (F.relu, F.leaky_relu):
            return function(*arguments, **(keywords or {}))
        x, call = arguments[0], self.calls
        self.calls += 1
        if self.flip is None:
            # Inputs are sums of up to some hundred values of size one: rounding is a few 1e-6.
            self.near += [(call, int(unit)) for unit in (x.detach().abs().flatten() < 5e-6).nonzero()]
        if self.flip is None or self.flip[0] != call:
            return function(*arguments, **(keywords or {}))
        slope = keywords["negative_slope"] if function is F.leaky_relu else 0.0
        positive = (x > 0).flatten()
        positive[self.flip[1]] = ~positive[self.flip[1]]
        return torch.where(positive.view_as(x), x, slope * x)


def test_a_kink_excuses_nothing_else():
    """A wrong loss is not excused by any kink: the check that `run_steps` relies on can fail."""
    golden = Golden(FILES[0])
    broken = dataclasses.replace(golden.objective, beta_kl=golden.objective.beta_kl * 1.001)

    def step(index):
        x, draws = golden.step(index)
        first = broken.encoder_phase(golden.encoder, golden.decoder, x, draws, target_decoder=golden.target)
        return (
            first.terms
            | broken.decoder_phase(
                golden.encoder, golden.decoder, x, first.z, draws, target_decoder=golden.target
            ).terms
        )

    with pytest.raises(AssertionError):
        run_steps(1, step, golden.check_terms, save=lambda: None, restore=lambda state: None)
