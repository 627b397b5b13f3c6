"""Proves that the draws of image n are a function of (seed, purpose, n) alone, whatever batch, rank or earlier call asked for
them; that different seeds, purposes, attempts and images are independent; and that they are standard normal.

    python -m pytest tests/unit/test_randomness.py
"""

import math

import numpy as np
import pytest
import torch

from sivae import randomness
from sivae.augment import NUM_CALLS, NUM_UNIFORMS
from sivae.objectives import Draws
from sivae.randomness import augment_draws, fixed_latents, generator, normal, seed_noise, step_draws, style_draws

CPU = torch.device("cpu")


@pytest.mark.parametrize("dim", [1, 2, 3, 16, 127])
def test_an_image_has_its_draws_whoever_asks(dim):
    whole = normal(3, 1, range(40), dim)
    assert whole.shape == (40, dim) and whole.dtype == torch.float32
    for numbers in (range(7, 8), range(5, 40), range(1, 40, 3), range(0, 40, 8), range(39, -1, -1)):
        assert torch.equal(normal(3, 1, numbers, dim), whole[list(numbers)]), numbers


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_ranks_and_passes_divide_the_same_draws(ranks, parts):
    """As the trainer slices: rank r takes every `ranks`-th image, passes are consecutive parts of that."""
    start, batch = 120, 24
    whole = step_draws(5, range(start, start + batch), 4, CPU)
    for rank in range(ranks):
        mine = range(start + rank, start + batch, ranks)
        size = len(mine) // parts
        for first in range(0, len(mine), size):
            numbers = mine[first : first + size]
            ours = step_draws(5, numbers, 4, CPU)
            for name in Draws.names():
                rows = [number - start for number in numbers]
                assert torch.equal(getattr(ours, name), getattr(whole, name)[rows])


def test_earlier_calls_and_global_generators_do_not_matter():
    expected = normal(0, 0, range(3), 5)
    torch.manual_seed(7), np.random.seed(7)
    normal(1, 2, range(100), 3)
    assert torch.equal(normal(0, 0, range(3), 5), expected)
    torch.manual_seed(7)
    before = torch.rand(1)
    torch.manual_seed(7)
    normal(0, 0, range(3), 5)
    assert torch.equal(torch.rand(1), before)


def test_the_draws_stay_what_they_are():
    """A run resumed by a later version must draw the same; Philox and SeedSequence promise a stable stream."""
    found = normal(0, 0, range(2), 2)
    words = np.random.Philox(key=np.random.SeedSequence([0, 0]).generate_state(2, np.uint64)).random_raw(8)
    u = [(int(word >> np.uint64(11)) + 0.5) / 2**53 for word in words]
    for image in range(2):
        for k in range(2):
            radius, angle = u[4 * image + k], u[4 * image + 2 + k]
            expected = math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)
            assert float(found[image, k]) == pytest.approx(expected, rel=1e-6)  # rounded to float32


def test_far_image_numbers_work():
    far = 10**12  # more images than any run sees
    assert torch.equal(normal(0, 0, range(far, far + 3), 200)[2], normal(0, 0, range(far + 2, far + 3), 200)[0])


def test_no_images_no_draws():
    for numbers in (range(0), range(5, 5), range(5, 5, 2)):
        assert normal(0, 0, numbers, 4).shape == (0, 4)


COUNT, DIM = 4000, 16
# Correlation of n independent pairs has standard deviation 1 / sqrt(n); 5 of them is one false alarm in 1.7 million.
BOUND = 5 / math.sqrt(COUNT * DIM)


def correlation(a, b):
    return abs(float(np.corrcoef(a.flatten().double(), b.flatten().double())[0, 1]))


def test_draws_of_a_step_are_independent_of_each_other():
    draws = step_draws(1, range(COUNT), DIM, CPU)
    names = Draws.names()
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert correlation(getattr(draws, first), getattr(draws, second)) < BOUND, (first, second)


def test_seeds_attempts_and_neighbouring_images_are_independent():
    base = step_draws(1, range(COUNT), DIM, CPU)
    others = {
        "seed": step_draws(2, range(COUNT), DIM, CPU),
        "attempt": step_draws(1, range(COUNT), DIM, CPU, attempt=1),
        "next image": step_draws(1, range(1, COUNT + 1), DIM, CPU),
    }
    for what, other in others.items():
        for name in Draws.names():
            for second in Draws.names():
                assert correlation(getattr(base, name), getattr(other, second)) < BOUND, (what, name, second)
    pictures = fixed_latents(1, COUNT, DIM)
    assert all(correlation(pictures, getattr(base, name)) < BOUND for name in Draws.names())


def test_no_attempt_repeats_the_draws_of_another():
    seen = [
        tuple(getattr(step_draws(0, range(1), 2, CPU, attempt=attempt), name)[0].tolist())
        for attempt in range(20)
        for name in Draws.names()
    ]
    assert len(set(seen)) == len(seen)


def test_the_dimensions_of_a_latent_are_uncorrelated():
    z = normal(4, 0, range(20_000), DIM).double()
    off = torch.corrcoef(z.T) - torch.eye(DIM)
    # 120 pairs of 20,000 values each: 5.5 standard deviations of 1 / sqrt(20,000).
    assert off.abs().max() < 5.5 / math.sqrt(20_000)


def test_draws_are_standard_normal():
    z = np.sort(normal(4, 0, range(20_000), 10).double().flatten().numpy())
    n = len(z)
    # Standard errors: 1 of the mean, sqrt(2) of the variance, sqrt(6) of the skewness, sqrt(24) of the kurtosis, over sqrt(n).
    moments = {"mean": (z.mean(), 1), "variance": (z.var() - 1, 2), "skewness": ((z**3).mean(), 15),
               "kurtosis": ((z**4).mean() - 3, 96)}  # fmt: skip
    for name, (value, variance) in moments.items():
        assert abs(value) < 5 * math.sqrt(variance / n), name
    # Kolmogorov and Smirnov's distance to the normal: 2.5 / sqrt(n) is passed once in 130,000.
    cdf = 0.5 * (1 + torch.erf(torch.from_numpy(z) / math.sqrt(2)).numpy())
    steps = np.arange(n + 1) / n
    assert max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()) < 2.5 / math.sqrt(n)
    # The tails are there: of 200,000 values the largest is near 4.5.
    assert 4 < z[-1] < 6.5 and -6.5 < z[0] < -4


def test_fixed_latents_do_not_depend_on_the_count():
    assert torch.equal(fixed_latents(3, 5, 7), fixed_latents(3, 50, 7)[:5])
    assert not torch.equal(fixed_latents(3, 5, 7), fixed_latents(4, 5, 7))


# The style family


def style(numbers=range(400), mixing=0.9, num_layers=6, attempt=0, seed=5):
    return style_draws(seed, numbers, 4, CPU, attempt, mixing=mixing, num_layers=num_layers)


def test_the_style_family_draws_afresh_in_the_decoder_phase():
    draws = {name: value for name, value in vars(style(mixing=0.0)).items() if value is not None}
    assert len(draws) == 8 and all(value.shape == (400, 4) for value in draws.values())
    flat = torch.stack([value.flatten() for value in draws.values()])
    # 1600 pairs: the deviation of a correlation is 0.025.
    assert (torch.corrcoef(flat) - torch.eye(8)).abs().max() < 0.12
    assert abs(float(flat.mean())) < 0.05 and float(flat.std()) == pytest.approx(1, rel=0.05)


def test_mixing_is_drawn_for_each_image_and_phase():
    draws = style()
    plain = normal(5, 0, range(400), 10 * 4).unflatten(1, (10, 4))  # eight draws, and the two to mix in
    assert torch.equal(draws.z_prior[:, 0], plain[:, 0])
    for z in (draws.z_prior, draws.z_prior_d):
        assert z.shape == (400, 6, 4)
        keeps = (z == z[:, :1]).all(2)  # layers that follow the first latent
        first = keeps.sum(1)
        assert torch.equal(keeps, torch.arange(6) < first[:, None])  # they come first, and at least one does
        # Nine tenths mix, from a layer drawn evenly of 1 to 6, 6 being no mix to be seen: 1 - 0.9 + 0.9 / 6 stay whole.
        assert float((first == 6).float().mean()) == pytest.approx(0.25, abs=0.07)
        for layer in range(1, 6):
            assert float((first == layer).float().mean()) == pytest.approx(0.15, abs=0.06)
    assert not torch.equal(draws.z_prior[:, 0], draws.z_prior_d[:, 0])
    whole = style(mixing=1e-9)
    assert all((z == z[:, :1]).all() for z in (whole.z_prior, whole.z_prior_d))


def test_an_image_has_its_style_draws_whoever_asks():
    whole = vars(style(range(40)))
    for numbers in (range(7, 8), range(1, 40, 3), range(0, 40, 8)):
        ours = vars(style(numbers))
        assert all(torch.equal(ours[name], whole[name][list(numbers)]) for name in whole if name != "augment")
    other = style(range(40), attempt=1).z_prior
    assert not torch.equal(other, whole["z_prior"])
    mixed, again = ((z == z[:, :1]).all(2) for z in (whole["z_prior"], other))
    assert not torch.equal(mixed, again), "nor where it mixes"


def test_noise_is_a_function_of_seed_step_rank_and_attempt():
    def drawn(*key):
        seed_noise(*key)
        return torch.randn(3)

    first = drawn(1, 2, 3, 4)
    assert torch.equal(drawn(1, 2, 3, 4), first)
    assert not any(torch.equal(drawn(*key), first) for key in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)))
    keys = [(1, 2), (0, 2), (1, 0), (1, 2, True)]
    of_a_step = [tuple(torch.randn(3, generator=generator(*key)).tolist()) for key in keys]
    assert len(set(of_a_step)) == len(keys), "of small models: of the seed, of the step, and of judging"


def test_augmentation_has_uniforms_of_its_own_for_each_image():
    whole = augment_draws(5, range(400), CPU)
    assert whole.shape == (400, NUM_CALLS, NUM_UNIFORMS) and whole.min() >= 0 and whole.max() < 1
    assert float(whole.mean()) == pytest.approx(0.5, abs=0.01) and float(whole.std()) == pytest.approx(
        12**-0.5, abs=0.01
    )
    assert torch.equal(augment_draws(5, range(3, 40, 4), CPU), whole[3:40:4])
    assert not torch.equal(augment_draws(5, range(400), CPU, attempt=1), whole)


def test_no_uniform_is_rounded_up_to_1(monkeypatch):
    """It would be an index past the end. One of 30 million is so near to 1 that float32 rounds it so."""
    nearest = np.full((1, NUM_CALLS * NUM_UNIFORMS), 1 - 2.0**-53)
    monkeypatch.setattr(randomness, "_uniform", lambda *key: nearest)
    assert augment_draws(5, range(1), CPU).max() < 1
