"""Features of real image sets, kept between evaluations: sums for the Fréchet distance, or all vectors for the others.

A file is named by its protocol (the set's digest, how many of its images, the detector's sha256 and its resizing) and holds
that protocol. It is used only when both are those asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sivae.errors import UserError, differences
from sivae.latents import safetensors_metadata
from sivae.storage import Folder
from sivae.tracking import flatten


def default_folder(cache_dir: str | None = None) -> Folder:
    """cache_dir/statistics; None means $SIVAE_CACHE, else ~/.cache/sivae."""
    cache = os.path.expanduser(cache_dir or os.environ.get("SIVAE_CACHE") or "~/.cache/sivae")
    return Folder(os.path.join(cache, "statistics"))


def file_name(protocol: dict[str, Any]) -> str:
    key = hashlib.sha256(_text(protocol).encode()).hexdigest()[:16]
    return f"{protocol['detector']['name']}-{protocol['kind']}-{key}.safetensors"


def load(folder: Folder, protocol: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors kept for a protocol; None when there are none, or damaged ones.

    Raises UserError when the file of that name holds statistics of another protocol.
    """
    name = file_name(protocol)
    if not folder.exists(name):
        return None
    data = folder.read(name)
    try:
        header = safetensors_metadata(data)
        held, digest = json.loads(header["protocol"]), header["sha256"]
        tensors = load_tensors(data)
    except (ValueError, KeyError, TypeError, SafetensorError):
        return None
    if held != protocol:
        different = differences(flatten(held), flatten(protocol))
        raise UserError(f"{folder.url}/{name}: holds statistics of another protocol ({different}); delete the file")
    return tensors if _digest(tensors) == digest else None


def save(folder: Folder, protocol: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"protocol": _text(protocol), "sha256": _digest(tensors)}
    folder.write(save_tensors(tensors, metadata=metadata), file_name(protocol))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _text(protocol: dict[str, Any]) -> str:
    return json.dumps(protocol, sort_keys=True)
