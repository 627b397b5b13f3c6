"""Style checkpoints of the published code as our networks: names, sizes, and weights divided by their learning-rate factors.

Sources of the layout: the Soft-IntroVAE repository's style models, after ALAE: entries `discriminator` (the encoder),
`generator` (the decoder), `mapping_tl`, `mapping_fl` and `dlatent_avg` of state dicts; averaged weights in entries `..._s`.
The published code never averages `dlatent_avg`, so there is one. Left out on purpose: the blur kernels, which are constants.
ALAE's own files have the same layout, but only those whose encoder gives mu and logvar are the same networks.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from sivae import models
from sivae.models import style

ENTRIES = ("discriminator", "generator", "mapping_fl", "mapping_tl", "dlatent_avg")
_NAMES = {
    "discriminator": [
        (r"from_rgb\.(\d+)\.from_rgb\.(weight|bias)", r"from_rgb.\1.\2"),
        (r"encode_block\.(\d+)\.(conv|style)_([12])\.(weight|bias)", r"blocks.\1.\2\3.\4"),
        (r"encode_block\.(\d+)\.bias_([12])", r"blocks.\1.bias\2"),
    ],
    "generator": [
        (r"const", "constant"),
        (r"to_rgb\.(\d+)\.to_rgb\.(weight|bias)", r"to_rgb.\1.\2"),
        (r"decode_block\.(\d+)\.(conv|style)_([12])\.(weight|bias)", r"blocks.\1.\2\3.\4"),
        (r"decode_block\.(\d+)\.bias_([12])", r"blocks.\1.bias\2"),
        (r"decode_block\.(\d+)\.noise_weight_([12])", r"blocks.\1.noise\2"),
    ],
    "mapping_tl": [(r"map_blocks\.(\d+)\.fc\.(weight|bias)", r"mapping.layers.\1.\2")],
    "mapping_fl": [(r"map_blocks\.(\d+)\.fc\.(weight|bias)", r"mapping.layers.\1.\2")],
    "dlatent_avg": [(r"buff", "average_style")],
}
_NETWORKS = {
    "discriminator": "encoder", "mapping_tl": "encoder",
    "generator": "decoder", "mapping_fl": "decoder", "dlatent_avg": "decoder",
}  # fmt: skip


def convert(entries: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Settings for `models.build`, and the state dicts of `encoder` and `decoder`, from the published entries.

    Averaged entries are preferred. Raises KeyError or ValueError when the entries are not those of a style model.
    """
    # A worker that was not the first saved None for the averages, which it does not keep.
    chosen = {entry: entries.get(f"{entry}_s") or entries.get(entry) for entry in ENTRIES}
    for entry, state in chosen.items():
        if not state:
            raise KeyError(f"entry {entry} is missing")
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"entry {entry} is no state dict")
    settings = _size_up(chosen)
    networks = {
        name: rename({entry: chosen[entry] for entry in ENTRIES if _NETWORKS[entry] == name})
        for name in ("encoder", "decoder")
    }
    with torch.device("meta"):
        built = models.build(**settings)
    for name, network in zip(("encoder", "decoder"), built):
        expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in networks[name].items()}
        wrong = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
        if wrong:
            key = wrong[0]
            raise ValueError(
                f"{name}.{key} has shape {found.get(key)} where the other shapes ask for {expected.get(key)}"
            )
        for key, factor in factors(network).items():
            networks[name][key] = networks[name][key] / factor
    return settings, networks


def rename(entries: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Published names and shapes as ours, the values untouched. Raises KeyError for a name that the networks do not have."""
    renamed = {}
    for entry, state in entries.items():
        for name, value in state.items():
            if name.endswith(".blur.weight"):
                continue
            name = re.sub(r"^block_(\d+)\.", lambda match: f"map_blocks.{int(match[1]) - 1}.", name)  # ALAE's mappings
            for pattern, ours in _NAMES[entry]:
                if re.fullmatch(pattern, name):
                    renamed[re.sub(pattern, ours, name)] = _reshape(entry, name, value)
                    break
            else:
                raise KeyError(f"unknown parameter {entry}.{name}")
    return renamed


def _reshape(entry: str, name: str, value: Tensor) -> Tensor:
    if entry == "dlatent_avg":
        return value[0]  # one row for each layer, all the same
    if name == "const":
        return value[0]
    return value.flatten() if re.search(r"\.(bias|noise_weight)_[12]$", name) else value


def factors(network: torch.nn.Module) -> dict[str, float]:
    """By parameter name: what the published weight is divided by to be ours."""
    return {
        f"{name}.{leaf}": factor
        for name, module in network.named_modules()
        if isinstance(module, (style.ScaledLinear, style.ScaledConv))
        for leaf, factor in module.factors.items()
    }


def _size_up(entries: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """The settings that the shapes tell."""
    encoder, decoder = entries["discriminator"], entries["generator"]
    num_levels = sum(bool(re.fullmatch(r"to_rgb\.\d+\.to_rgb\.weight", name)) for name in decoder)
    if not 1 <= num_levels <= 9:
        raise ValueError(f"the generator has {num_levels} levels of detail")
    latent_dim = entries["dlatent_avg"]["buff"].shape[1]
    given = list(entries["mapping_tl"].values())[-1].shape[0]
    if given != 2 * latent_dim:
        raise ValueError(f"its encoder gives {given} values, not mu and logvar of {latent_dim} each")
    first = encoder["from_rgb.0.from_rgb.weight"]
    widths = [first.shape[0], *(encoder[f"encode_block.{i}.bias_2"].shape[1] for i in range(num_levels))]
    return {
        "family": "style", "num_channels": first.shape[1], "resolution": 2 << num_levels, "base_channels": widths[0],
        "max_channels": max(widths), "latent_dim": latent_dim,
        "num_mapping_layers": len(entries["mapping_fl"]) // 2, "num_mapping_layers_to_latent": len(entries["mapping_tl"]) // 2,
    }  # fmt: skip
