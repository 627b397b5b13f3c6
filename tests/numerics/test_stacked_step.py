"""Many models stepped at once are the models stepped one at a time: by the pure objectives with torch's Adam, and by the
numbers of the published code.

    pytest tests/numerics/test_stacked_step.py
"""

import dataclasses

import pytest
import torch

from sivae import models, objectives, randomness
from sivae.data.toy2d import DENSITIES
from sivae.engines import freeze
from sivae.models import published
from sivae.models.stack import MlpStack
from sivae.objectives import Draws
from sivae.stacked_step import StackedModels
from sivae.toy2d import step_draws
from tests.numerics.test_golden import FOLDER, LOSS_TOLERANCE, WEIGHT_TOLERANCE, Golden

MARGIN = 0.018
FIELDS = dict(sample_shape=[2], latent_dim=2, num_hidden=32, num_layers=3)
OBJECTIVES = {
    "vae": objectives.Vae(0.2, 0.3),
    # Between the KLs that occur here, so that the hinge is open for some models and closed for others.
    "intro_vae": objectives.IntroVae(0.2, 0.3, beta_neg=0.7, margin=MARGIN),
    "soft_intro_vae": objectives.SoftIntroVae(0.2, 0.3, beta_neg=0.9, scale=0.5),
}
LR, STEPS, SIZE = 2e-3, 5, 64


def networks(count, num_layers=3):
    return [models.build("mlp", seed=seed, **FIELDS | {"num_layers": num_layers}) for seed in range(count)]


def draws_of(count, step, size=SIZE):
    """x [S, B, 2] and the draws of a step, unlike for each model."""
    generator = torch.Generator().manual_seed(step)
    x = DENSITIES["rings"].sample(count * size, generator).view(count, size, 2)
    return x, Draws(*torch.randn(6, count, size, 2, generator=generator).unbind(0))


def one_at_a_time(objective, encoder, decoder, batches):
    adams = [torch.optim.Adam(network.parameters(), lr=LR) for network in (encoder, decoder)]
    for x, draws in batches:
        freeze(trained=encoder, frozen=decoder)
        adams[0].zero_grad()
        first = objective.encoder_phase(encoder, decoder, x, draws)
        first.loss.backward()
        adams[0].step()
        freeze(trained=decoder, frozen=encoder)
        adams[1].zero_grad()
        second = objective.decoder_phase(encoder, decoder, x, first.z, draws)
        second.loss.backward()
        adams[1].step()
        yield first.terms | second.terms


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("num_layers", [0, 3])
def test_a_stack_equals_one_at_a_time(name, num_layers):
    objective, count = OBJECTIVES[name], 3
    stack = StackedModels(networks(count, num_layers), LR)
    batches = [draws_of(count, step) for step in range(STEPS)]
    stacked = [stack.step(objective, *batch) for batch in batches]
    after = networks(count, num_layers)
    stack.encoder.write_to([pair.encoder for pair in after])
    stack.decoder.write_to([pair.decoder for pair in after])
    hinges = set()
    for index, (encoder, decoder) in enumerate(networks(count, num_layers)):
        own = [
            (x[index], dataclasses.replace(draws, **{key: getattr(draws, key)[index] for key in Draws.names()}))
            for x, draws in batches
        ]
        for step, terms in enumerate(one_at_a_time(objective, encoder, decoder, own)):
            assert set(terms) == set(stacked[step])
            for key, value in terms.items():
                # Sums over 64 points and 32 units in another order, after up to four steps of Adam: a few 1e-7 of the terms.
                torch.testing.assert_close(stacked[step][key][index], value, rtol=1e-5, atol=1e-6, msg=key)
            hinges.add(bool(terms.get("kl_fake", torch.tensor(0.0)) < MARGIN))
        for ours, theirs in zip((encoder, decoder), after[index]):
            for key, value in ours.state_dict().items():
                torch.testing.assert_close(theirs.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)
    if name == "intro_vae" and num_layers == 3:
        assert hinges == {True, False}  # both sides of the hinge were compared


def test_a_stack_equals_the_published_code():
    golden, count = Golden(FOLDER / "mlp_soft_intro_vae.npz"), 2
    # The recorded 1e-8 is the same to rounding; see the README of the numbers.
    objective = dataclasses.replace(golden.objective, gamma_r=0.0)
    stack = StackedModels([(golden.encoder, golden.decoder)] * count, 2e-4)
    for index in range(golden.num_steps):
        x, draws = golden.step(index)
        wide = {key: getattr(draws, key).expand(count, -1, -1) for key in Draws.names()}
        terms = stack.step(objective, x.expand(count, -1, -1), Draws(**wide))
        for key in ("loss_encoder", "loss_decoder"):
            expected = torch.full((count,), float(golden.data[f"step{index}/{key}"]))
            torch.testing.assert_close(terms[key], expected, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)
    after = models.build(**golden.found.settings)
    for which in range(count):
        stack.encoder.write_to([after.encoder] * (which + 1))
        stack.decoder.write_to([after.decoder] * (which + 1))
        expected = {
            name.removeprefix("final/"): torch.from_numpy(golden.data[name])
            for name in golden.data.files
            if name.startswith("final/")
        }
        for name, state in published.convert(expected).networks.items():
            for key, value in state.items():
                found = getattr(after, name).state_dict()[key]
                torch.testing.assert_close(found, value, rtol=0, atol=WEIGHT_TOLERANCE, msg=f"{name}.{key}")


def test_bfloat16_is_close_and_weights_stay_float32():
    plain, rounded = (StackedModels(networks(2), LR, dtype) for dtype in (torch.float32, torch.bfloat16))
    for step in range(STEPS):
        batch = draws_of(2, step)
        exact, near = (stack.step(OBJECTIVES["soft_intro_vae"], *batch) for stack in (plain, rounded))
        for key, value in exact.items():
            assert near[key].dtype == torch.float32
            # bfloat16 has 8 bits: a unit is good to 0.4%, and errors of units add up with random signs.
            torch.testing.assert_close(near[key], value, rtol=2e-2, atol=2e-3, msg=key)
    assert not torch.equal(plain.encoder.parameter, rounded.encoder.parameter)
    assert rounded.encoder.parameter.dtype == torch.float32


def test_coordinates_pass_bfloat16_networks_unrounded():
    """The first and the last layer are float32: a network that takes 1 off, passes the rest on and adds 1 again loses nothing."""
    x = (1 + torch.arange(8.0) * 2**-12)[None, :, None].expand(1, 8, 2)
    assert len(x.bfloat16().unique()) == 1  # to bfloat16 they are all the same number
    _, decoder = models.build("mlp", **FIELDS)
    layers = [layer for layer in decoder.layers if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.eye(*layer.weight.shape))
            layer.bias.zero_()
        layers[0].bias[:2] -= 1
        layers[-1].bias += 1
    out, _ = MlpStack([decoder], torch.bfloat16).forward(x)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_a_stack_goes_on_to_the_bit(dtype):
    batches = [draws_of(2, step) for step in range(4)]
    whole, first, second = (StackedModels(networks(2), LR, dtype) for _ in range(3))
    for batch in batches:
        whole.step(OBJECTIVES["soft_intro_vae"], *batch)
    for batch in batches[:2]:
        first.step(OBJECTIVES["soft_intro_vae"], *batch)
    saved = first.tensors()
    assert second.fits(saved) and not StackedModels(networks(3), LR).fits(saved)
    second.load(saved)
    before = {key: value.clone() for key, value in saved.items()}
    for batch in batches[2:]:
        second.step(OBJECTIVES["soft_intro_vae"], *batch)
    assert all(torch.equal(value, saved[key]) for key, value in before.items())  # what was loaded is not stepped on
    assert all(torch.equal(value, second.tensors()[key]) for key, value in whole.tensors().items())


def test_draws_belong_to_a_seed_and_a_step():
    density = DENSITIES["8gaussians"]
    x, draws = step_draws(density, [3, 5], 1024, 16, 2)
    alone, own = step_draws(density, [5], 1024, 16, 2)
    assert torch.equal(x[1], alone[0]) and torch.equal(draws.eps_fake[1], own.eps_fake[0])
    later, _ = step_draws(density, [5], 1040, 16, 2)
    assert not torch.equal(alone, later)
    state = randomness.generator(5, 1024).get_state()
    assert not torch.equal(state, randomness.generator(5, 1024, judging=True).get_state())
