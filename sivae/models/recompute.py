"""Activation checkpointing (Chen et al., arXiv 1604.06174): a block keeps only its inputs, and its backward pass computes the rest
again. One more forward pass of the block for the memory of what lies inside it; the gradients are the same to the bit."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def mark(network: nn.Module, from_pixels: int) -> int:
    """Let the blocks that work at images of `from_pixels` and above be computed again. Returns how many those are.

    The network lists the sizes of its `blocks` in `block_pixels`. Random draws inside a block are made again alike.
    """
    marked = [block for block, pixels in zip(network.blocks, network.block_pixels) if pixels >= from_pixels]
    for block in marked:
        block.recomputed = True
    return len(marked)


def call(block: nn.Module, *inputs: Any) -> Any:
    """`block(*inputs)`, checkpointed where the block is marked."""
    if getattr(block, "recomputed", False) and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
