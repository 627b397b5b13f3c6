"""Checkpoints of the published code, read without running anything that is in the file.

Sources of the layouts: the Soft-IntroVAE repository (image, bootstrap and 2D models: `{"epoch", "model": state_dict}`; style
models: `{"models": {entry: state_dict}}`, see `published_style`) and IntroVAE's, whose state dict has the same names as the
image models'. Which one it is, and every size, follows from names and shapes.
Left out on purpose: the 2D decoder's `loggamma`, a parameter that its forward never uses.
"""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sivae.errors import UserError
from sivae.models import inert_pickle, published_style

_CONV_NAMES = {
    "encoder": [(r"main\.0\.", "stem."), (r"main\.1\.", "stem_norm."), (r"fc\.", "head.")],
    "decoder": [(r"fc\.0\.", "stem."), (r"main\.predict\.", "head.")],
}
_BLOCK_NAMES = {"conv_expand": "project", "bn1": "norm1", "bn2": "norm2"}


@dataclass(frozen=True)
class Published:
    """Settings for `models.build`, and the state dicts of `encoder`, `decoder` and, of bootstrap models, `target_decoder`."""

    settings: dict[str, Any]
    networks: dict[str, dict[str, Tensor]]
    kind: str
    averaged: bool = False
    """Whether the weights are a running average; of the published models the style family alone keeps one."""


def read(path: str, residual: str | None = None) -> Published:
    """Read a published file. `residual="intro_vae"` says that an image model is IntroVAE's where its names do not tell.

    Raises UserError for a file that is truncated, pickled as a whole object, or of another architecture.
    """
    content = _load(path)
    entries = content.get("models", content) if isinstance(content, dict) else None
    if isinstance(entries, dict) and "generator" in entries:
        return convert_style(entries, path)
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path}: holds no state dict of a published image, bootstrap, style, 2D or IntroVAE model")
    return convert(state, path, residual)


def _load(path: str) -> Any:
    """The file's content. Style checkpoints hold statistics of their training as objects, which are left out."""
    try:
        with open(path, "rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02", b"\x80\x04"):
                raise UserError(f"{path}: is not a PyTorch file, such as a published .pth")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            content = _load_inert(path)
            if isinstance(content, dict) and isinstance(content.get("models"), dict):
                return content
            raise
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        remote = "; what is at a URL is to be fetched first" if "://" in path else ""
        raise UserError(f"{path}: there is no such file on this machine{remote}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a published .pth file") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds Python objects besides weights, whose reading could run code, or is damaged; where you trust the file,"
            ' open it in the code that made it and save {"model": model.state_dict()} with torch.save'
        ) from None
    except Exception as error:  # noqa: BLE001 (a damaged pickle makes the unpickler raise nearly anything)
        raise UserError(
            f"{path}: cannot be read as a PyTorch file ({' '.join(str(error).split())[:200]}); it may be truncated"
        ) from None


def _load_inert(path: str) -> Any:
    try:
        return inert_pickle.load(path)
    except Exception:  # noqa: BLE001 (as above; the first reader's error is the one to tell)
        return None


def convert_style(entries: dict[str, dict[str, Tensor]], where: str = "entries") -> Published:
    """Rename, rescale and size up the entries of a published style checkpoint. Raises UserError when they are not that."""
    try:
        settings, networks = published_style.convert(entries)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: is not a published style model ({type(error).__name__}: {error})") from None
    return Published(settings, networks, "style", averaged=bool(entries.get("generator_s")))


def convert(state: dict[str, Tensor], where: str = "state dict", residual: str | None = None) -> Published:
    """Rename and size up a published state dict. Raises UserError when it is not one."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    parts = {
        network: {
            name.removeprefix(f"{network}."): value for name, value in state.items() if name.startswith(f"{network}.")
        }
        for network in ("encoder", "decoder", "target_decoder")
    }
    parts = {network: part for network, part in parts.items() if part}
    try:
        if "main.input.weight" in parts["encoder"]:
            return _convert_mlp(parts)
        return _convert_conv(parts, residual)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{where}: is not a published image, bootstrap, 2D or IntroVAE model ({type(error).__name__}: {error})"
        ) from None


def _convert_mlp(parts: dict[str, dict[str, Tensor]]) -> Published:
    parts["decoder"].pop("loggamma", None)
    num_layers = sum(bool(re.fullmatch(r"main\.hidden_\d+\.weight", name)) for name in parts["encoder"])
    # The activations are modules too, so ours sit at every second place.
    order = {"input": 0, "output": 2 * (num_layers + 1)} | {f"hidden_{i}": 2 * i for i in range(1, num_layers + 1)}

    def rename(name: str) -> str:
        _, layer, leaf = name.split(".")
        return f"layers.{order[layer]}.{leaf}"

    networks = {network: {rename(name): value for name, value in part.items()} for network, part in parts.items()}
    first, last = parts["encoder"]["main.input.weight"], parts["encoder"]["main.output.weight"]
    settings = {
        "family": "mlp", "sample_shape": [first.shape[1]], "latent_dim": last.shape[0] // 2,
        "num_hidden": first.shape[0], "num_layers": num_layers,
    }  # fmt: skip
    return Published(settings, networks, "2D")


def _convert_conv(parts: dict[str, dict[str, Tensor]], residual: str | None) -> Published:
    networks = {network: _rename_conv(part, network.removeprefix("target_")) for network, part in parts.items()}
    encoder, decoder = networks["encoder"], networks["decoder"]
    num_levels = 1 + max(int(name.split(".")[1]) for name in encoder if name.startswith("blocks."))
    widths = [encoder["stem.weight"].shape[0]]
    widths += [encoder[f"blocks.{i}.conv1.weight"].shape[0] for i in range(num_levels - 1)]
    latent_dim = encoder["head.weight"].shape[0] // 2
    num_classes = decoder["stem.weight"].shape[1] - latent_dim
    size = math.isqrt((encoder["head.weight"].shape[1] - num_classes) // widths[-1])
    equal_projected = any(
        encoder[name].shape[0] == encoder[name].shape[1] for name in encoder if name.endswith("project.weight")
    )
    if residual is None:
        # Only IntroVAE's code projects between levels of equal width.
        residual = "intro_vae" if equal_projected else "soft_intro_vae"
    settings = {
        "family": "conv", "num_channels": encoder["stem.weight"].shape[1], "resolution": size * 2**num_levels,
        "channels": widths, "latent_dim": latent_dim, "num_classes": num_classes, "norm": "batch", "residual": residual,
    }  # fmt: skip
    kind = "bootstrap" if "target_decoder" in networks else "IntroVAE" if residual == "intro_vae" else "image"
    return Published(settings, networks, kind)


def _rename_conv(part: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """Blocks are numbered in the order of the file, which is the order of the network."""
    block_of: dict[str, int] = {}
    renamed = {}
    for name, value in part.items():
        match = re.match(r"main\.(res_in_\d+)\.(\w+)\.(.+)", name)
        if match:
            block, layer, leaf = match.groups()
            number = block_of.setdefault(block, len(block_of))
            renamed[f"blocks.{number}.{_BLOCK_NAMES.get(layer, layer)}.{leaf}"] = value
            continue
        for pattern, ours in _CONV_NAMES[network]:
            if re.match(pattern, name):
                renamed[re.sub(f"^{pattern}", ours, name)] = value
                break
        else:
            raise KeyError(f"unknown parameter {network}.{name}")
    return renamed
