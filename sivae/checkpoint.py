"""Checkpoints at any fsspec URL: save, publish, find, read.

A checkpoint is a folder `checkpoints/IMAGES` with safetensors files, `state.json`, and `manifest.json`, which holds size and
sha256 of every other file and is written last: a folder without it does not count. Tensors are whole and named by parameter,
so any number of ranks and any ZeRO stage can read them. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from sivae.errors import UserError
from sivae.storage import Folder

logger = logging.getLogger("sivae")
FORMAT = 1
BEST = "best.json"
_NAME = re.compile(r"\d{12}(\.\d+)?")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by file ("weights", "average", "optimizer", "target") and name; `state` is plain JSON."""

    name: str
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @property
    def images_seen(self) -> int:
        return self.state["images_seen"]


class Damaged(UserError):
    """A checkpoint's files are not what its manifest says."""


def save(run: Folder, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> str:
    """Write under a new name and publish it. Returns the name. A failed save leaves nothing behind."""
    name = f"{state['images_seen']:012d}"
    # One more than the highest there: some of those before it may have been pruned.
    taken = [_order(other) for other in run.names("checkpoints") if _NAME.fullmatch(other)]
    attempts = [attempt for images, attempt in taken if images == state["images_seen"]]
    if attempts:
        name = f"{name}.{max(attempts) + 1}"
    try:
        manifest: dict[str, Any] = {"format": FORMAT, "files": {}}
        for file, named in tensors.items():
            _put(run, name, f"{file}.safetensors", to_safetensors(named), manifest)
        _put(run, name, "state.json", [memoryview(json.dumps(state, indent=1).encode())], manifest)
        run.write(json.dumps(manifest, indent=1).encode(), "checkpoints", name, "manifest.json")
    except BaseException:
        # A full disk can refuse even the clean-up; the first error is the one to hear about.
        try:
            run.remove("checkpoints", name)
        except UserError:
            pass
        raise
    return name


def prune(run: Folder, keep: int) -> None:
    """Leave the newest `keep` checkpoints and the best one. Nobody may be saving."""
    published = list_names(run)
    kept = {*published[-keep:], (best(run) or {}).get("name")}
    # What is newer than all that is published was set aside as damaged; what is older and not published, a killed save left.
    for other in run.names("checkpoints"):
        if _NAME.fullmatch(other) and other not in kept and _order(other) < _order(published[-1]):
            try:
                # The manifest first: a checkpoint half deleted does not count.
                run.remove("checkpoints", other, "manifest.json")
                run.remove("checkpoints", other)
            except UserError as error:
                logger.warning("an old checkpoint stays: %s", error)


def list_names(run: Folder) -> list[str]:
    """Published checkpoints, oldest first."""
    names = [name for name in run.names("checkpoints") if _NAME.fullmatch(name)]
    return sorted((name for name in names if run.exists("checkpoints", name, "manifest.json")), key=_order)


def best(run: Folder) -> dict[str, Any] | None:
    """What `set_best` noted, as long as that checkpoint is there."""
    try:
        found = _read(run, BEST, json.loads) if run.exists("checkpoints", BEST) else None
        return found if found and run.exists("checkpoints", found["name"], "manifest.json") else None
    except (ValueError, KeyError, TypeError):
        return None


def set_best(run: Folder, name: str, judged: dict[str, Any]) -> None:
    """Note that `name` is the best checkpoint so far, and what was judged of it: `prune` keeps it."""
    run.write(json.dumps({"name": name} | judged).encode(), "checkpoints", BEST)


def read(run: Folder, name: str, files: tuple[str, ...] | None = None) -> Checkpoint:
    """Read a checkpoint, or only some of its tensor files, checking sizes and sha256. Raises Damaged naming the file."""
    try:
        manifest = _read(run, f"{name}/manifest.json", json.loads)
        listed = manifest["files"]
        wanted = [
            file
            for file in listed
            if file.endswith(".safetensors") and (files is None or file.removesuffix(".safetensors") in files)
        ]
        state = json.loads(_get(run, name, "state.json", listed))
        tensors = {file.removesuffix(".safetensors"): load_tensors(_get(run, name, file, listed)) for file in wanted}
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise Damaged(f"{run.url}/checkpoints/{name}: is damaged ({type(error).__name__}: {error})") from None
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{run.url}/checkpoints/{name}: has format {manifest.get('format')}; this version of sivae reads {FORMAT}"
        )
    return Checkpoint(name, state, tensors)


def read_newest(
    run: Folder, report: Callable[[str], None], files: tuple[str, ...] | None = None, set_aside: bool = False
) -> Checkpoint | None:
    """The newest whole checkpoint; a damaged one is reported and the one before it taken. None when there is none.

    `set_aside`: damaged ones newer than it no longer count afterwards, so that they take no place among those that are kept.
    Raises UserError when there are checkpoints and all are damaged.
    """
    names, damaged = list_names(run), []
    for name in reversed(names):
        try:
            found = read(run, name, files)
        except UserError as error:
            if not isinstance(error, Damaged) and run.exists("checkpoints", name, "state.json"):
                raise
            report(f"{error}; trying the checkpoint before it")
            damaged.append(name)
            continue
        for bad in damaged if set_aside else ():
            run.write(run.read("checkpoints", bad, "manifest.json"), "checkpoints", bad, "manifest.damaged.json")
            run.remove("checkpoints", bad, "manifest.json")
        return found
    if names:
        raise UserError(
            f"{run.url}: every checkpoint is damaged ({', '.join(names)}); restore one, or start in another run.directory"
        )
    return None


def to_safetensors(named: dict[str, Tensor]) -> list[memoryview]:
    """CPU tensors as the parts of a safetensors file (https://github.com/huggingface/safetensors#format): its header, then
    their own memory. `safetensors.torch.save` copies all of it twice, while Python's lock keeps every other thread waiting.
    """
    # By descending element size, so that every tensor begins at a multiple of its own.
    ordered = sorted(named.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, parts, start = {}, [], 0
    for name, tensor in ordered:
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        parts.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(struct.pack("<Q", len(text)) + text), *parts]


def _put(run: Folder, name: str, file: str, parts: list[memoryview], manifest: dict[str, Any]) -> None:
    run.write(parts, "checkpoints", name, file)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    manifest["files"][file] = {"bytes": sum(map(len, parts)), "sha256": digest.hexdigest()}


def _get(run: Folder, name: str, file: str, listed: dict[str, Any]) -> bytes:
    if not run.exists("checkpoints", name, file):
        raise ValueError(f"{file} is missing")
    num_bytes, sha256 = listed[file]["bytes"], listed[file]["sha256"]

    def compare(data: bytes) -> bytes:
        if len(data) != num_bytes or hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{file} does not match its checksum")
        return data

    return _read(run, f"{name}/{file}", compare, num_bytes)


def _read(run: Folder, place: str, parse: Callable[[bytes], Any], num_bytes: int = 0) -> Any:
    """parse(data) of a file, read again where it raises ValueError: a network can answer anything, and a checkpoint that is
    taken for damaged, or no longer for the best, is lost."""
    for left in reversed(range(run.attempts)):
        try:
            return parse(run.read("checkpoints", place, num_bytes=num_bytes))
        except ValueError:
            if not left:
                raise


def _order(name: str) -> tuple[int, int]:
    images, _, attempt = name.partition(".")
    return int(images), int(attempt or 0)
