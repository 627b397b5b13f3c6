"""Random draws as a function of (seed, image number), whatever the batch, the ranks and the restarts.

Image number n is the n-th real image that the run sees; its draws come from the Philox counter (Salmon et al., SC 2011)
at n. So a rank makes only its own slice, a resumed run draws what an uninterrupted one would have drawn, and
another number of ranks or accumulation passes draws the same.
"""

import numpy as np
import torch
from torch import Tensor

from sivae.objectives import Draws

_WORDS = 4  # 64-bit words in one Philox block
_PICTURES = 2**32  # the purpose of latents outside training; attempts count from 0


def normal(seed: int, purpose: int, numbers: range, dim: int) -> Tensor:
    """Standard normals [len(numbers), dim] float32 for these image numbers; independent between purposes and seeds."""
    # An image takes whole blocks, so that every image number has a counter of its own.
    blocks = -(-2 * dim // _WORDS)
    runs = [numbers] if numbers.step == 1 or not numbers else [range(number, number + 1) for number in numbers]
    words = np.concatenate([_words(seed, purpose, run.start * blocks, len(run) * blocks) for run in runs])
    words = words.reshape(len(numbers), blocks * _WORDS)
    uniform = ((words[:, : 2 * dim] >> np.uint64(11)) + 0.5) * 2.0**-53
    # Box and Muller, one normal from two uniforms: every normal sits at a fixed place of the stream.
    radius, angle = np.sqrt(-2 * np.log(uniform[:, :dim])), 2 * np.pi * uniform[:, dim:]
    return torch.from_numpy((radius * np.cos(angle)).astype(np.float32))


def step_draws(seed: int, numbers: range, latent_dim: int, device: torch.device, attempt: int = 0) -> Draws:
    """The draws of a training step for these image numbers. `attempt` counts rollbacks: each draws anew."""
    count = len(Draws.names())
    draws = normal(seed, attempt, numbers, count * latent_dim).to(device, non_blocking=True)
    return Draws(*draws.unflatten(1, (count, latent_dim)).unbind(1))


def fixed_latents(seed: int, count: int, latent_dim: int) -> Tensor:
    """Latents [count, latent_dim] that stay the same for all pictures and samples of a seed."""
    return normal(seed, _PICTURES, range(count), latent_dim)


def _words(seed: int, purpose: int, block: int, count: int) -> np.ndarray:
    """`count` Philox blocks from counter `block` on, as uint64 words."""
    key = np.random.SeedSequence([seed, purpose]).generate_state(2, np.uint64)
    generator = np.random.Philox(key=key)
    return generator.advance(block).random_raw(count * _WORDS)
