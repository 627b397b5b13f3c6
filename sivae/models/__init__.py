"""The model families. A family is one file, one settings class in `sivae.config.model`, a line in both tables here, one YAML,
one parity test."""

from typing import NamedTuple

import torch
from torch import nn

from sivae.models.conv import ConvDecoder, ConvEncoder
from sivae.models.mlp import MlpDecoder, MlpEncoder
from sivae.models.style import StyleDecoder, StyleEncoder
from sivae.models.translation import TranslationDecoder, TranslationEncoder

FAMILIES = {
    "mlp": (MlpEncoder, MlpDecoder),
    "conv": (ConvEncoder, ConvDecoder),
    "style": (StyleEncoder, StyleDecoder),
    "translation": (TranslationEncoder, TranslationDecoder),
}

# Values of an image inside a family's networks; outside they are uint8.
VALUE_RANGES = {"mlp": (0.0, 1.0), "conv": (0.0, 1.0), "style": (-1.0, 1.0), "translation": (0.0, 1.0)}


class Networks(NamedTuple):
    encoder: nn.Module
    decoder: nn.Module


def build(family: str, seed: int = 0, **fields) -> Networks:
    """Encoder and decoder of a family. The weights are a function of `seed` alone: the caller's generators are untouched."""
    encoder, decoder = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' too
        return Networks(encoder(**fields), decoder(**fields))
