"""Random draws as a function of (seed, image number), whatever the batch, the ranks and the restarts.

Image number n is the n-th real image that the run sees; its draws come from the Philox counter (Salmon et al., SC 2011)
at n. So a rank makes only its own slice, a resumed run draws what an uninterrupted one would have drawn, and
another number of ranks or accumulation passes draws the same. The exception is the style decoder's per-pixel noise, which
is too much to draw so: it comes from torch's generators, seeded for each step and rank.
"""

import numpy as np
import torch
from torch import Tensor

from sivae.augment import NUM_CALLS, NUM_UNIFORMS
from sivae.objectives import Draws

_WORDS = 4  # 64-bit words in one Philox block
_PICTURES = 2**32  # the purpose of latents outside training; attempts count from 0
_SCORES = _PICTURES + 1  # the purpose of draws that score images
_MIXING, _NOISE, _AUGMENT = 2**33, 2**34, 2**35  # purposes beside an attempt's normals; the attempt is added
_POINTS, _JUDGING = 2**36, 2**36 + 1  # purposes of small models, which have a generator for each step


def normal(seed: int, purpose: int, numbers: range, dim: int) -> Tensor:
    """Standard normals [len(numbers), dim] float32 for these image numbers; independent between purposes and seeds."""
    # Box and Muller, one normal from two uniforms: every normal sits at a fixed place of the stream.
    uniform = _uniform(seed, purpose, numbers, 2 * dim)
    radius, angle = np.sqrt(-2 * np.log(uniform[:, :dim])), 2 * np.pi * uniform[:, dim:]
    return torch.from_numpy((radius * np.cos(angle)).astype(np.float32))


def _onto(device: torch.device, draws: Tensor) -> Tensor:
    """Without a wait: from memory that is not page-locked a copy to a GPU ends only when the GPU has done all before it."""
    return draws.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draws.to(device)


def step_draws(seed: int, numbers: range, latent_dim: int, device: torch.device, attempt: int = 0) -> Draws:
    """The draws of a training step for these image numbers. `attempt` counts rollbacks: each draws anew."""
    count = len(Draws.names())
    draws = _onto(device, normal(seed, attempt, numbers, count * latent_dim))
    return Draws(*draws.unflatten(1, (count, latent_dim)).unbind(1))


def style_draws(
    seed: int, numbers: range, latent_dim: int, device: torch.device, attempt: int = 0, mixing: float = 0.0, num_layers: int = 2
) -> Draws:  # fmt: skip
    """The draws of a training step of the style family: each phase has its own, as published.

    With probability `mixing` an image's prior draw mixes two: `z_prior` and `z_prior_d` are then [B, num_layers, latent_dim],
    whose first 1 to `num_layers` layers hold the one and the others another. Published the whole batch mixes or does not, at
    one layer; here each image by itself, so that ranks change nothing.
    """
    names = [*Draws.names(), "z_prior_d", "eps_real_d"]
    others = ["z_prior", "z_prior_d"] if mixing else []
    count = len(names) + len(others)
    draws = _onto(device, normal(seed, attempt, numbers, count * latent_dim))
    named = dict(zip([*names, *others], draws.unflatten(1, (count, latent_dim))[:, : len(names)].unbind(1)))
    chances = _uniform(seed, _MIXING + attempt, numbers, 2 * len(others)) if others else None
    for index, name in enumerate(others):
        mixes, where = chances[:, 2 * index], chances[:, 2 * index + 1]
        first = np.where(mixes < mixing, 1 + np.floor(where * num_layers), num_layers)
        keeps = np.arange(num_layers)[None] < first[:, None]
        keeps = _onto(device, torch.from_numpy(keeps))[..., None]
        other = draws.unflatten(1, (count, latent_dim))[:, len(names) + index]
        named[name] = torch.where(keeps, named[name][:, None], other[:, None])
    return Draws(**named)


def augment_draws(seed: int, numbers: range, device: torch.device, attempt: int = 0) -> Tensor:
    """Uniforms in [0, 1) [B, NUM_CALLS, NUM_UNIFORMS] for what `augment` does to these images in one step."""
    uniform = _uniform(seed, _AUGMENT + attempt, numbers, NUM_CALLS * NUM_UNIFORMS).astype(np.float32)
    # float32 rounds what is nearly 1 up to it.
    uniform = torch.from_numpy(uniform).clamp(max=1 - 2**-24)
    return _onto(device, uniform.unflatten(1, (NUM_CALLS, NUM_UNIFORMS)))


def seed_noise(seed: int, images_seen: int, rank: int, attempt: int = 0) -> None:
    """Seed torch's generators of all devices for one step of one rank, for draws that need not be those of image numbers."""
    entropy = np.random.SeedSequence([seed, _NOISE + attempt, images_seen, rank])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def generator(seed: int, images_seen: int, judging: bool = False) -> torch.Generator:
    """torch's own on the CPU, for all draws of one step of a small model that nobody divides, or for judging it."""
    entropy = np.random.SeedSequence([seed, _JUDGING if judging else _POINTS, images_seen])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def fixed_latents(seed: int, count: int, latent_dim: int, first: int = 0) -> Tensor:
    """Latents [count, latent_dim] that stay the same for all pictures and samples of a seed; from number `first` on."""
    return normal(seed, _PICTURES, range(first, first + count), latent_dim)


def score_draws(seed: int, numbers: range, latent_dim: int, num_samples: int) -> Tensor:
    """Draws [len(numbers), num_samples, latent_dim] for the scores of these image numbers."""
    return normal(seed, _SCORES, numbers, num_samples * latent_dim).unflatten(1, (num_samples, latent_dim))


def _uniform(seed: int, purpose: int, numbers: range, count: int) -> np.ndarray:
    """Uniform float64 in (0, 1) [len(numbers), count] for these image numbers."""
    # An image takes whole blocks, so that every image number has a counter of its own.
    blocks = -(-count // _WORDS)
    runs = [numbers] if numbers.step == 1 or not numbers else [range(number, number + 1) for number in numbers]
    words = np.concatenate([_words(seed, purpose, run.start * blocks, len(run) * blocks) for run in runs])
    words = words.reshape(len(numbers), blocks * _WORDS)[:, :count]
    return ((words >> np.uint64(11)) + 0.5) * 2.0**-53


def _words(seed: int, purpose: int, block: int, count: int) -> np.ndarray:
    """`count` Philox blocks from counter `block` on, as uint64 words."""
    key = np.random.SeedSequence([seed, purpose]).generate_state(2, np.uint64)
    generator = np.random.Philox(key=key)
    return generator.advance(block).random_raw(count * _WORDS)
