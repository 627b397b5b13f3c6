"""Proves what each augmentation does to known images, that gradient passes through all of them, that the encoder alone sees
them, by draws of its own in each call, and that losses compare images as they were before.

    python -m pytest tests/unit/test_augment.py
"""

from dataclasses import replace

import pytest
import torch

from sivae import models, objectives
from sivae.augment import KINDS, NUM_CALLS, NUM_UNIFORMS, Augmented, augment, color, cutout, translate
from sivae.objectives import Draws

SIZE = 16


def images(count=4, seed=0, channels=3):
    return torch.rand(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def uniforms(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_nothing_happens_where_chance_says_no():
    x, uniform = images(), uniforms(4, NUM_UNIFORMS)
    uniform[:, :3], uniform[:, 6:8] = 0.6, 0.9
    assert torch.equal(augment(x, uniform, KINDS, 0.5, 1.0), x)
    assert torch.equal(augment(x, uniform, (), 1.0, 1.0), x)
    for index, kind in enumerate(KINDS):
        only = uniform.clone()
        only[1, index] = 0.4
        changed = augment(x, only, KINDS, 0.5, 1.0)
        assert torch.equal(changed[[0, 2, 3]], x[[0, 2, 3]]) and not torch.equal(changed[1], x[1]), kind
        others = tuple(other for other in KINDS if other != kind)
        assert torch.equal(augment(x, only, others, 0.5, 1.0), x)


@pytest.mark.parametrize("kind, own", zip(KINDS, ([0, 3, 4, 5], [1, 6, 7], [2, 8, 9])))
def test_a_kind_happens_as_often_as_it_should_by_numbers_of_its_own(kind, own):
    x, uniform, other = images(400, channels=2), uniforms(400, NUM_UNIFORMS), uniforms(400, NUM_UNIFORMS, seed=2)
    found = augment(x, uniform, (kind,), 0.2, 1.0)
    # Of 400 images 80 within three deviations of 8; of translations one in 25 goes nowhere.
    assert 53 <= int((found != x).flatten(1).any(1).sum()) <= 104
    other[:, own] = uniform[:, own]
    assert torch.equal(augment(x, other, (kind,), 0.2, 1.0), found)


@pytest.mark.parametrize("down, right", [(-2, 0), (2, 1), (0, -1), (0, 0), (1, 2)])
def test_translation_shifts_by_up_to_an_eighth_and_fills_with_zeros(down, right):
    x = images(1) + 1
    # Two margins of 2 pixels: the window starts 0 to 4 pixels into the padded image, 2 being no shift.
    uniform = torch.tensor([[(2 - down + 0.5) / 5, (2 - right + 0.5) / 5]])
    expected = torch.zeros_like(x)
    for row in range(SIZE):
        for column in range(SIZE):
            if 0 <= row - down < SIZE and 0 <= column - right < SIZE:
                expected[..., row, column] = x[..., row - down, column - right]
    assert torch.equal(translate(x, uniform), expected)


def test_translation_and_cutout_reach_their_bounds_and_no_further():
    edges = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])
    x = images(2) + 1
    for image, original, sign in zip(translate(x, edges), x, (1, -1)):
        rolled = torch.roll(original, (2 * sign, 2 * sign), (1, 2))
        assert torch.equal(image[:, 2:-2, 2:-2], rolled[:, 2:-2, 2:-2])
    cut = cutout(x, edges)
    assert (cut[0] == 0).all(0).nonzero().tolist() == [[row, column] for row in range(4) for column in range(4)]
    assert (cut[1] == 0).all(0).nonzero().tolist() == [
        [row, column] for row in range(12, 16) for column in range(12, 16)
    ]


def test_cutout_takes_half_of_each_side():
    x = images(1) + 1
    cut = cutout(x, torch.tensor([[0.5, 0.4]]))  # the centre at row 8, column 6
    hole = (cut == 0).all(1)[0].nonzero()
    assert hole.amin(0).tolist() == [4, 2] and hole.amax(0).tolist() == [11, 9] and len(hole) == 64
    kept = cut != 0
    assert torch.equal(cut[kept], x[kept])


def test_colour_by_hand():
    x = images(2).double()
    neutral = torch.tensor([[0.5, 0.5, 0.5]], dtype=torch.float64).expand(2, -1)
    assert torch.allclose(color(x, neutral, 2.0), x)
    brighter = color(x, torch.tensor([[1.0, 0.5, 0.5]], dtype=torch.float64).expand(2, -1), 2.0)
    assert torch.allclose(brighter, x + 0.5)
    grey = color(x, torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).expand(2, -1), 2.0)
    assert torch.allclose(grey, x.mean(1, keepdim=True).expand_as(x))
    flat = color(x, torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).expand(2, -1), 2.0)
    mean = x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(flat, mean + 0.5 * (x - mean))


def test_gradient_passes():
    x = images(2, channels=2).double()[..., :8, :8].requires_grad_()
    uniform = uniforms(2, NUM_UNIFORMS).double()
    assert torch.autograd.gradcheck(lambda x: augment(x, uniform, KINDS, 1.0, 2.0), x)


class Setup:
    def __init__(self, fresh=False):
        fields = {"num_channels": 1, "resolution": SIZE, "channels": [4, 8], "latent_dim": 3, "group_size": 4}
        self.encoder, self.decoder = models.build("conv", **fields)
        self.x = images(4, channels=1)
        normals = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(8)]
        self.draws = Draws(*(normals if fresh else normals[:6]))
        self.draws = replace(self.draws, augment=uniforms(4, NUM_CALLS, NUM_UNIFORMS))
        self.seen = []

    def watched(self, x, labels=None):
        self.seen.append(x.detach())
        return self.encoder(x, labels)

    def run(self, objective):
        first = objective.encoder_phase(self.watched, self.decoder, self.x, self.draws)
        second = objective.decoder_phase(self.watched, self.decoder, self.x, first.z, self.draws)
        return first, second


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["vae", "intro_vae", "soft_intro_vae"])
def test_every_input_of_the_encoder_is_augmented_by_draws_of_its_own(name, fresh):
    setup = Setup(fresh)
    objective = objectives.build(name, num_values=SIZE**2)
    setup.run(objective)
    plain, setup.seen = setup.seen, []
    setup.run(Augmented(objective, KINDS, 1.0, 1.0))
    augmented = setup.seen
    assert len(augmented) == len(plain) == {"vae": 1, "intro_vae": 5, "soft_intro_vae": 5 + fresh}[name]
    # Real images come first, by the first draws; the sampled ones of the encoder phase do not depend on the encoder.
    uniform = setup.draws.augment
    assert torch.equal(augmented[0], augment(plain[0], uniform[:, 0], KINDS, 1.0, 1.0))
    if name != "vae":
        assert torch.equal(augmented[2], augment(plain[2], uniform[:, 2], KINDS, 1.0, 1.0))
    if name == "soft_intro_vae" and fresh:
        assert torch.equal(augmented[3], augment(plain[3], uniform[:, 3], KINDS, 1.0, 1.0))


def test_losses_compare_images_as_they_were_and_share_one_encoding():
    """Against the loss written out, with an encoder that augments by itself."""
    setup = Setup()
    objective = objectives.build("soft_intro_vae", num_values=SIZE**2, gamma_r=0.5)
    kinds, uniform = ("translation", "cutout"), setup.draws.augment
    first, second = setup.run(Augmented(objective, kinds, 0.5, 1.0))
    calls = iter(uniform.unbind(1))

    def by_itself(x, labels=None):
        return setup.encoder(augment(x, next(calls), kinds, 0.5, 1.0), labels)

    expected = objective.encoder_phase(by_itself, setup.decoder, setup.x, setup.draws)
    for name, term in expected.terms.items():
        assert torch.equal(first.terms[name], term), name
    mu, logvar = setup.encoder(augment(setup.x, uniform[:, 0], kinds, 0.5, 1.0))
    z = objectives.reparameterize(mu, logvar, setup.draws.eps_real)
    assert torch.equal(first.z, z.detach())
    rec = objectives.reconstruction_error(setup.x, setup.decoder(z), "mse").mean()  # x, not what the encoder saw
    assert torch.equal(first.terms["rec"], rec.detach())
    calls = iter(uniform[:, 3:].unbind(1))
    expected = objective.decoder_phase(by_itself, setup.decoder, setup.x, first.z, setup.draws)
    assert all(torch.equal(second.terms[name], term) for name, term in expected.terms.items())
    second.loss.backward()  # through the augmentation into the decoder
    assert all(parameter.grad.abs().max() > 0 for parameter in setup.decoder.parameters())
