"""A whole set of images as latents: made once, bounded in memory, by one process or a torchrun group, and read again in parts.

    part-00000-0d9cbdd0ae54.safetensors   4,096 samples in the set's order; the second number stands for what is encoded by what
    encoded.json                          what it is, and each part's sha256; written last, so that a folder with it is whole

Of each sample: its number in the split, its name in the shard, mu and logvar of q(z | x) (float32 [latent_dim]), and its
label where the set has labels. A .safetensors part has the names as a JSON list in its metadata; a .parquet part is a plain
table. A part appears whole or not at all, so an interrupted encoding goes on where it stopped, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sivae.data import ImageStream
from sivae.distributed import Group
from sivae.errors import UserError, shown
from sivae.inference import Model, weights_digest
from sivae.latents import safetensors_metadata
from sivae.progress import progress_bar
from sivae.storage import Folder

INDEX_FILE, FORMAT = "encoded.json", "sivae-encoded-1"
FILE_FORMATS = ("safetensors", "parquet")
PART_SAMPLES = 4096  # what memory holds, what a kill loses, and what ranks share out
AGAIN = f"delete it and {INDEX_FILE}, and run sivae encode again, which makes what is not there"
PART_NAME = r"part-\d{5,}-([0-9a-f]{12})\.(safetensors|parquet)"


@dataclass(frozen=True)
class Latents:
    """Samples of a set, in its order."""

    number: Tensor  # int64 [B]: the sample's in its split
    name: list[str]
    mu: Tensor  # float32 [B, latent_dim], as logvar
    logvar: Tensor
    label: Tensor | None  # int64 [B]; None where the set has none

    def __len__(self) -> int:
        return len(self.name)


def encode(model: Model, stream: ImageStream, samples: range, batch_size: int = 64) -> Iterator[Latents]:
    """The samples' latents on the CPU, a batch at a time; the next one is read and decoded meanwhile.

    Raises UserError when the model does not take the set's images, or encodes one to what is not finite.
    """
    require_fit(model, stream)
    parts = [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]
    with ThreadPoolExecutor(1, "sivae-read-ahead") as reader:
        waiting = [reader.submit(stream.sample, part) for part in parts[:1]]
        for index, part in enumerate(parts):
            batch = waiting.pop().result()
            waiting += [reader.submit(stream.sample, later) for later in parts[index + 1 : index + 2]]
            mu, logvar = (value.float().cpu() for value in model.encode(batch.images, batch.labels))
            finite = (mu.isfinite() & logvar.isfinite()).all(dim=1)
            if not finite.all():
                bad = stream.index.name(part[int(finite.int().argmin())])
                raise UserError(f"{stream.where}: the model encodes {bad} to a latent that is not finite")
            keys = [stream.index.key[number] for number in part]
            names = [stream.names.get(key, key) for key in keys]
            yield Latents(torch.tensor(part), names, mu, logvar, batch.labels)


def latents_of(model: Model, stream: ImageStream | None, encoded: EncodedSet | None = None) -> Iterator[Latents]:
    """The latents of a whole set, with a progress bar: as they were encoded before, or else encoded now, of `stream`.

    Raises UserError when `encoded` is not by this model, or not of this set.
    """
    if encoded is not None:
        encoded.check(model)
        if stream is not None:
            encoded.check_set(stream)
    found = encode(model, stream, range(len(stream))) if encoded is None else encoded.read()
    total = len(stream) if encoded is None else len(encoded)
    with progress_bar(total, "encoding" if encoded is None else "reading latents", " images") as bar:
        for latents in found:
            yield latents
            bar.update(len(latents))


def require_fit(model: Model, stream: ImageStream) -> None:
    """Raises UserError when a model conditional on classes cannot have the labels that it needs from this set."""
    if model.num_classes and stream.num_classes is None:
        raise UserError(
            f"{stream.where}: has no labels, and this model is conditional on {model.num_classes} classes; pack the set with --labels"
        )
    if model.num_classes and stream.num_classes > model.num_classes:
        raise UserError(f"{stream.where}: has {stream.num_classes} classes, and this model knows {model.num_classes}")


class EncodedSet:
    """What `encode_set` left in a folder. Raises UserError when there is none, or not a whole one."""

    def __init__(self, folder: Folder):
        self.folder, self.where = folder, shown(folder.url)
        index = _read_index(folder)
        if index is None:
            raise UserError(
                f"{self.where}: holds no whole encoded set (no {INDEX_FILE} in it); make it with sivae encode RUN URL DEST,"
                " which also goes on with one that was interrupted"
            )
        self.what: dict[str, Any] = index["what"]
        self.parts: list[dict[str, Any]] = index["parts"]
        self.latent_dim, self.num_classes = self.what["latent_dim"], self.what["num_classes"]
        self.split, self.set_digest = self.what["split"], self.what["set_digest"]

    def __len__(self) -> int:
        return self.what["count"]

    def read(self) -> Iterator[Latents]:
        """The parts in the set's order, one in memory at a time. Raises UserError at one that is not as it was written."""
        for part in self.parts:
            data = self.folder.read(part["name"])
            if hashlib.sha256(data).hexdigest() != part["sha256"]:
                raise UserError(f"{self.where}/{part['name']}: does not match its checksum; {AGAIN}")
            yield _parse(data, part["name"], self.what, self.where)

    def check(self, model: Model) -> None:
        """Raises UserError when it is not by this model."""
        if self.latent_dim != model.latent_dim:
            raise UserError(
                f"{self.where}: holds latents of {self.latent_dim} dimensions, and this model has {model.latent_dim}"
            )
        if self.what["weights_sha256"] != weights_digest(model):
            raise UserError(
                f"{self.where}: was encoded with other weights than this model's (another run, checkpoint, or --weights);"
                " encode the set again, into another folder"
            )

    def check_set(self, stream: ImageStream) -> None:
        """Raises UserError when these are not the latents of that set of images."""
        if self.set_digest != stream.digest:
            raise UserError(
                f"{self.where}: holds the latents of other images than {stream.where} has in its split {self.split}"
            )


def encode_set(
    model: Model, stream: ImageStream, folder: Folder, group: Group, *, split: str, file_format: str = "safetensors",
    batch_size: int = 64,
) -> EncodedSet:  # fmt: skip
    """Encode a whole set into a folder. Every rank of the group calls it; rank r takes every W-th of the parts that are left.

    split: what the stream was opened with. Memory holds one part. Run again, it goes on; where the set is whole, it does
    nothing. Raises UserError before anything is written when the folder holds latents of something else.
    """
    if file_format not in FILE_FORMATS:
        raise UserError(f"format: {file_format!r} is none of {', '.join(FILE_FORMATS)}")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not a number of images")
    if file_format == "parquet":
        _pyarrow()
    require_fit(model, stream)
    what = {
        "weights_sha256": weights_digest(model), "set_digest": stream.digest, "split": split, "count": len(stream),
        "num_classes": stream.num_classes, "latent_dim": model.latent_dim, "part_samples": PART_SAMPLES,
        "file_format": file_format,
    }  # fmt: skip
    tag = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    spans = [range(first, min(first + PART_SAMPLES, len(stream))) for first in range(0, len(stream), PART_SAMPLES)]
    names = [f"part-{number:05d}-{tag}.{file_format}" for number in range(len(spans))]

    present = group.on_main(lambda: _present(folder, what, tag))
    if present is not None:
        todo = [number for number, name in enumerate(names) if name not in present]
        group.together(lambda: _write_parts(model, stream, folder, group, what, todo, spans, names, batch_size))
        group.on_main(lambda: _finish(folder, what, spans, names))
    return EncodedSet(folder)


def _write_parts(model, stream, folder, group, what, todo, spans, names, batch_size) -> None:
    mine = todo[group.rank :: group.world_size]
    total = sum(len(spans[number]) for number in mine)
    rank = f" (rank 0 of {group.world_size})" if group.world_size > 1 else ""
    with progress_bar(total, f"encoding{rank}", " images", enabled=group.is_main) as bar:
        for number in mine:
            batches = []
            for batch in encode(model, stream, spans[number], batch_size):
                batches.append(batch)
                bar.update(len(batch))
            folder.write(_file(_joined(batches), what), names[number])


def _present(folder: Folder, what: dict[str, Any], tag: str) -> set[str] | None:
    """Names of the parts that are there already; None when all is. Raises UserError when something else is, or no file can be."""
    index = _read_index(folder)
    if index is not None and index["what"] != what:
        raise UserError(
            f"{shown(folder.url)}: holds an encoded set already, by other weights, of other images or in another format; give"
            " another folder"
        )
    found = {match[0]: match[1] for match in (re.fullmatch(PART_NAME, name) for name in folder.names()) if match}
    if any(other != tag for other in found.values()):
        raise UserError(
            f"{shown(folder.url)}: holds parts of another encoding, by other weights, of other images or in another format,"
            " that was interrupted; delete them, or give another folder"
        )
    if index is not None and all(part["name"] in found for part in index["parts"]):
        return None
    folder.try_writing()
    return set(found)


def _finish(folder: Folder, what: dict[str, Any], spans: list[range], names: list[str]) -> None:
    """Read every part back, whichever rank or earlier run wrote it, and publish the whole."""
    parts = []
    with progress_bar(len(names), "reading back", " parts") as bar:
        for span, name in zip(spans, names):
            data = folder.read(name)
            latents = _parse(data, name, what, shown(folder.url))
            if latents.number.tolist() != list(span):
                raise UserError(f"{shown(folder.url)}/{name}: does not hold the samples that it should; {AGAIN}")
            parts.append({"name": name, "count": len(latents), "sha256": hashlib.sha256(data).hexdigest()})
            bar.update()
    folder.write(json.dumps({"format": FORMAT, "what": what, "parts": parts}, indent=1).encode(), INDEX_FILE)


def _read_index(folder: Folder) -> dict[str, Any] | None:
    """None when there is none."""
    if not folder.exists(INDEX_FILE):
        return None
    where = f"{shown(folder.url)}/{INDEX_FILE}"
    try:
        index = json.loads(folder.read(INDEX_FILE))
        if index["format"] != FORMAT:
            raise ValueError(f"it is of the format {index['format']!r}")
        what, parts = index["what"], index["parts"]
        whole = sum(part["count"] for part in parts) == what["count"]
        plain = all(re.fullmatch(PART_NAME, part["name"]) and len(part["sha256"]) == 64 for part in parts)
        known = what["file_format"] in FILE_FORMATS and isinstance(what["weights_sha256"], str)
        typed = all(type(what[name]) is int for name in ("latent_dim", "part_samples"))
        if not (whole and plain and known and typed and {"split", "set_digest", "num_classes"} <= set(what)):
            raise ValueError("its parts do not make the whole")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: is no index of an encoded set that this version reads ({type(error).__name__}: {error}); encode the"
            " set again, into another folder"
        ) from None
    return index


def _joined(batches: list[Latents]) -> Latents:
    def join(field: str) -> Tensor:
        return torch.cat([getattr(batch, field) for batch in batches])

    label = None if batches[0].label is None else join("label")
    names = [name for batch in batches for name in batch.name]
    return Latents(join("number"), names, join("mu"), join("logvar"), label)


# Files


def _file(latents: Latents, what: dict[str, Any]) -> bytes:
    tensors = {"number": latents.number, "mu": latents.mu, "logvar": latents.logvar}
    if latents.label is not None:
        tensors["label"] = latents.label
    if what["file_format"] == "safetensors":
        return save_tensors(tensors, metadata={"name": json.dumps(latents.name)})
    pyarrow, parquet = _pyarrow()
    columns = {"number": latents.number.numpy(), "name": latents.name}
    if latents.label is not None:
        columns["label"] = latents.label.numpy()
    for name in ("mu", "logvar"):
        values = pyarrow.array(tensors[name].flatten().numpy())
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(values, what["latent_dim"])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _parse(data: bytes, name: str, what: dict[str, Any], where: str) -> Latents:
    try:
        if what["file_format"] == "safetensors":
            columns, names = load_tensors(data), json.loads(safetensors_metadata(data)["name"])
        else:
            pyarrow, parquet = _pyarrow()
            table = parquet.read_table(pyarrow.BufferReader(data))
            names = table["name"].to_pylist()
            columns = {
                column: torch.from_numpy(_values(table[column]).copy())
                for column in table.column_names
                if column != "name"
            }
            for column in ("mu", "logvar"):
                columns[column] = columns[column].view(len(names), what["latent_dim"])
        latents = Latents(columns["number"], names, columns["mu"], columns["logvar"], columns.get("label"))
        shapes = (len(names), what["latent_dim"])
        if latents.mu.shape != shapes or latents.logvar.shape != shapes or latents.number.shape != shapes[:1]:
            raise ValueError("its columns differ in length")
        if (latents.label is None) != (what["num_classes"] is None):
            raise ValueError("it has labels where the set has none, or none where it has")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        # pyarrow's own errors are kinds of ValueError and OSError.
        raise UserError(f"{where}/{name}: is damaged ({type(error).__name__}: {error}); {AGAIN}") from None
    return latents


def _values(column) -> Any:
    """A column of a table, or all values of a column of lists, as one array."""
    column = column.combine_chunks()
    return (column.flatten() if hasattr(column, "flatten") and column.type.num_fields else column).to_numpy()


def _pyarrow():
    """pyarrow and its parquet module. Raises UserError where they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "the format parquet needs pyarrow, which is not installed; pip install 'sivae[parquet]', or take safetensors"
        ) from None
    return pyarrow, parquet
