"""Judge a model: figures of its samples and reconstructions beside real images, on one rank or several.

Work is divided into batches that are the same whatever the number of ranks, rank r taking every W-th, and sums are kept in
float64: so several ranks give what one gives. Every figure goes with its `Protocol`, without which it says little.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sivae import __version__, real_statistics
from sivae.data import Batch, ImageStream
from sivae.distributed import Group
from sivae.errors import UserError, shown
from sivae.images import to_float
from sivae.inference import Model, check_truncation, weights_digest
from sivae.metrics import catalogue, features, kid, precision_recall, reconstruction
from sivae.metrics.catalogue import Figure
from sivae.metrics.frechet import MomentSums, frechet_distance
from sivae.progress import progress_bar
from sivae.storage import Folder

FOLDER = "evaluations"
PUBLISHED_IMAGES, PUBLISHED_BATCH = 50_000, 32


@dataclass(frozen=True)
class Protocol:
    """How a model is judged, but for the detectors' files and the real images, which `Evaluation` adds."""

    metrics: tuple[str, ...]
    num_fakes: int = 50_000
    num_reals: int | None = None
    """The first so many of the split; None takes all."""
    seed: int = 0
    truncation: float = 1.0
    truncation_layers: int | None = None
    mode: Literal["eval", "train"] = "eval"
    """Of BatchNorm: its running averages, or the statistics of each batch of `batch_size` images."""
    batch_size: int = 64
    rounding: Literal["nearest", "down"] = "nearest"
    """How samples and reconstructions become uint8."""
    name: str | None = None

    @classmethod
    def published(cls, metrics: tuple[str, ...], model: dict[str, Any], num_images: int) -> Protocol:
        """As the paper's figures were made: averaged weights, no truncation, 50,000 samples, as uint8 rounded down, against
        the first 50,000 training images (all `num_images` where there are fewer); BatchNorm in train mode, 32 images at a time.
        """
        batch_norm = model.get("norm") == "batch"
        return cls(
            metrics, PUBLISHED_IMAGES, min(PUBLISHED_IMAGES, num_images), mode="train" if batch_norm else "eval",
            batch_size=PUBLISHED_BATCH if batch_norm else cls.batch_size, rounding="down", name="published",
        )  # fmt: skip


def departures(protocol: Protocol, weights: str | None) -> list[str]:
    """In what the published protocol cannot be kept, a sentence each."""
    told = []
    if protocol.num_reals < PUBLISHED_IMAGES:
        told.append(f"takes {PUBLISHED_IMAGES:,} real images; there are {protocol.num_reals:,}, and all are taken")
    if weights != "average":
        told.append("takes averaged weights; there are none, and those that there are are judged")
    return told


class Evaluation:
    """Judges models of one shape against one set of real images. All methods are collectives: every rank calls them.

    stream: the real images, at the model's resolution. detectors: where their files are, by name (see `open_detector`).
    lpips: a TorchScript file, as PATH_OR_URL#sha256=HEX, that takes two batches [B, 3, H, W] in [-1, 1] and returns their
    distances. statistics: where features of the real images are kept; None keeps them in this process alone, and so does an index
    without checksums. Raises
    UserError when a figure cannot be computed from what there is, before anything is.
    """

    def __init__(
        self, stream: ImageStream, protocol: Protocol, group: Group, *, detectors: dict[str, str] | None = None,
        lpips: str | None = None, statistics: Folder | None = None, cache_dir: str | None = None, progress: bool = True,
    ):  # fmt: skip
        self.stream, self.group, self.progress = stream, group, progress
        # Without checksums nobody would see that the images of a set were replaced.
        self.statistics = statistics if stream.index.crc32 is not None else None
        self.figures, self.protocol = group.together(lambda: self._resolve(protocol, detectors or {}))
        group.on_main(
            lambda: self._open(detectors or {}, lpips, cache_dir)
        )  # one rank fetches, and the others find the files
        group.together(lambda: self._open(detectors or {}, lpips, cache_dir))
        self.real: dict[str, _Features] = {}
        self.patient = group.patient()

    def _resolve(self, protocol: Protocol, detectors: dict[str, str]) -> tuple[tuple[Figure, ...], Protocol]:
        """What to compute, and from how many images. What needs no detector is checked first: those may have to be fetched."""
        figures, stream = catalogue.parse(protocol.metrics), self.stream
        for name in ("num_fakes", "batch_size"):
            if getattr(protocol, name) < 1:
                raise UserError(f"{name}: {getattr(protocol, name)} is not a number of images")
        check_truncation(protocol.truncation, protocol.truncation_layers)
        num_reals = len(stream) if protocol.num_reals is None else protocol.num_reals
        if not 1 <= num_reals <= len(stream):
            raise UserError(f"num_reals: {num_reals:,} real images are asked for; {stream.where} has {len(stream):,}")
        for figure in figures:
            figure.check_size(stream.resolution)
            figure.check_images(num_reals, protocol.num_fakes, None)
        unknown = sorted({*detectors} - {figure.detector for figure in figures})
        if unknown:
            raise UserError(f"detector {unknown[0]}: no figure names it; metrics such as frechet_{unknown[0]} would")
        return figures, replace(protocol, num_reals=num_reals)

    def _open(self, detectors: dict[str, str], lpips: str | None, cache_dir: str | None) -> None:
        shape = (self.stream.index.num_channels, self.stream.resolution, self.stream.resolution)
        names = dict.fromkeys(figure.detector for figure in self.figures if figure.detector)
        self.detectors = {
            name: features.open_detector(name, detectors.get(name), shape, self.group.device, cache_dir)
            for name in names
        }
        for figure in self.figures:
            if figure.detector:
                dim = self.detectors[figure.detector].dim
                if dim > features.MAX_DIM:
                    raise UserError(
                        f"{figure.name}: its features have {dim:,} values, and figures take at most {features.MAX_DIM:,};"
                        " take a detector such as inception"
                    )
                figure.check_images(self.protocol.num_reals, self.protocol.num_fakes, dim)
        self.lpips = None
        if any(figure.kind == "lpips" for figure in self.figures):
            if lpips is None:
                raise UserError("lpips: needs its weights; give a TorchScript file of them with --lpips PATH_OR_URL")
            self.lpips = features.open_lpips(lpips, self.stream.resolution, self.group.device, cache_dir)

    def describe(self, figures: tuple[Figure, ...] | None = None) -> dict[str, Any]:
        """The whole protocol as plain JSON: what figures must share to be compared; or the protocol of some of the figures."""
        figures = figures or self.figures
        fields, stream = asdict(self.protocol), self.stream
        kinds = {figure.kind for figure in figures}
        used = {figure.detector for figure in figures if figure.detector}
        described = {
            "name": fields["name"],
            "metrics": [figure.name for figure in figures],
            "reals": {
                "digest": stream.digest, "split": list(stream.index.splits), "count": fields["num_reals"], "of": len(stream),
                "resolution": stream.resolution,
            },
            "uint8": f"rounded {'to the nearest' if fields['rounding'] == 'nearest' else 'down'}",
            "mode": fields["mode"], "batch_size": fields["batch_size"],
            "detectors": [detector.protocol for name, detector in self.detectors.items() if name in used],
        }  # fmt: skip
        if used:
            described["fakes"] = {name: fields[name] for name in ("seed", "truncation", "truncation_layers")}
            described["fakes"] |= {"count": fields["num_fakes"], "labels": "classes in turn"}
        if "kernel" in kinds:
            described["kernel"] = {"subsets": kid.NUM_SUBSETS, "subset_size": kid.SUBSET_SIZE, "degree": 3}
        if kinds & {"precision", "recall"}:
            described["precision_recall_neighbours"] = precision_recall.PR_NEIGHBOURS
        if kinds & {"density", "coverage"}:
            described["density_coverage_neighbours"] = precision_recall.DC_NEIGHBOURS
        if "lpips" in kinds:
            described["lpips"] = {"sha256": self.lpips.sha256}
        return described

    @torch.no_grad()
    @features.exact_float32()  # as a training that is judged may have set it otherwise than a command
    def run(self, model: Model) -> dict[str, float]:
        """The figures by name; a kernel distance also with its deviation over the subsets, as NAME_deviation.

        Raises UserError, on every rank, when it is no model for this protocol, and when there is nothing to judge: a real image
        that cannot be read, or NaN and infinity in the model's images or in what a detector makes of them.
        """
        self.group.together(lambda: self._check_model(model))
        protocol = self.protocol
        self._find_real()
        missing = [name for name in self.detectors if name not in self.real]
        of_features = bool(self.detectors)
        of_reconstructions = any(figure.detector is None for figure in self.figures)
        total = protocol.num_reals * (bool(missing) + of_reconstructions) + protocol.num_fakes * of_features
        shows = self.progress and self.group.is_main
        with _mode(model, protocol.mode), progress_bar(total, "judging", " images", enabled=shows) as self.bar:
            if missing:
                self._collect_real(missing)
            fake = {}
            if of_features:
                fake = self._collect(list(self.detectors), protocol.num_fakes, self._samples(model), "samples")
            figures = self._judge_reconstructions(model) if of_reconstructions else {}
        figures |= self.patient.on_main(lambda: self._judge_features(fake))
        deviations = [f"{figure.name}_deviation" for figure in self.figures if figure.kind == "kernel"]
        return {name: figures[name] for name in [*(figure.name for figure in self.figures), *deviations]}

    # Real images

    def _real_protocol(self, name: str) -> dict[str, Any]:
        wants_all = any(figure.needs_features for figure in self.figures if figure.detector == name)
        return {
            "format": 1, "kind": "features" if wants_all else "moments", "digest": self.stream.digest,
            "count": self.protocol.num_reals, "resolution": self.stream.resolution, "detector": self.detectors[name].protocol,
        }  # fmt: skip

    def _find_real(self) -> None:
        """What earlier evaluations kept; only rank 0 needs it, and all know of it."""
        for name in self.detectors:
            if name not in self.real and self.statistics is not None:
                protocol = self._real_protocol(name)
                found = None

                def look() -> bool:
                    nonlocal found
                    found = real_statistics.load(self.statistics, protocol)
                    return found is not None

                if self.group.on_main(look):
                    self.real[name] = _Features.of(found) if found else _Features(0)

    def _collect_real(self, names: list[str]) -> None:
        images = (batch.images for batch in self._real_batches())
        found = self._collect(names, self.protocol.num_reals, images, "real images")
        # Kept for the next time, and off a GPU that trains in between.
        self.real |= {name: _Features.of(collected.tensors()) for name, collected in found.items()}
        if self.statistics is not None:
            self.group.on_main(lambda: self._keep_real(names))

    def _keep_real(self, names: list[str]) -> None:
        for name in names:
            try:
                real_statistics.save(self.statistics, self._real_protocol(name), self.real[name].tensors())
            except UserError as error:  # a convenience: the figures do not need it
                tqdm.write(f"sivae: features of the real images are not kept: {error}")

    def _units(self, count: int, rank: int | None = None) -> list[range]:
        """Image numbers of a rank's batches; None means this rank."""
        size, group = self.protocol.batch_size, self.group
        starts = range(0, count, size)[group.rank if rank is None else rank :: group.world_size]
        return [range(start, min(start + size, count)) for start in starts]

    def _real_batches(self) -> Iterator[Batch]:
        """This rank's real images, read a batch ahead. What one rank cannot read is an error of all, at the end."""
        failure = None
        units = self._units(self.protocol.num_reals)
        with ThreadPoolExecutor(1) as reader:
            waiting = [reader.submit(self.stream.sample, numbers) for numbers in units[:1]]
            for following in [*units[1:], None]:
                if not waiting:
                    break
                try:
                    batch = waiting.pop().result()
                except UserError as error:
                    failure = error
                    break
                if following is not None:
                    waiting.append(reader.submit(self.stream.sample, following))
                yield batch
        self.group.agree(False, failure)

    # Features

    def _samples(self, model: Model) -> Iterator[Tensor]:
        protocol, bad = self.protocol, torch.zeros((), device=self.group.device)
        for numbers in self._units(protocol.num_fakes):
            made = model.sample(
                len(numbers), seed=protocol.seed, batch_size=len(numbers), first=numbers.start,
                truncation=protocol.truncation, truncation_layers=protocol.truncation_layers,
            )  # fmt: skip
            bad += _count_nonfinite(made)
            yield model.to_uint8(made, truncate=protocol.rounding == "down")
        self._refuse_nonfinite(bad, "samples")

    def _collect(self, names: list[str], count: int, batches: Iterator[Tensor], what: str) -> dict[str, _Features]:
        """On rank 0 the features of all ranks' images; `batches` are this rank's, in the order of `_units`. All finite, or a UserError."""
        device, units, found = self.group.device, self._units(count), {}
        num_rows = sum(map(len, units))
        for name in names:
            wants_all = any(figure.needs_features for figure in self.figures if figure.detector == name)
            found[name] = _Features(self.detectors[name].dim, device, num_rows if wants_all else 0)
        failure = None
        for images in batches:  # to their end whatever happens: it is there that the ranks agree
            images = images.to(device, non_blocking=True)
            try:
                for name in names if failure is None else ():
                    found[name].add(self.detectors[name](images))
            except UserError as error:
                failure = error
            self._advance(len(images))
        self.group.agree(False, failure)
        for name, collected in found.items():
            for tensor in collected.sums.tensors().values():
                self.group.sum(tensor)
            if not bool(collected.sums.total.isfinite().all()):
                raise UserError(f"detector {name}: its features of the {what} are not finite", shared=True)
            if any(figure.needs_features for figure in self.figures if figure.detector == name):
                collected.rows = self._gathered(collected.rows, count)
        return found if self.group.is_main else {name: _Features(0) for name in found}

    def _gathered(self, rows: Tensor, count: int) -> Tensor:
        """On rank 0 all ranks' rows in the order of the images, in the host's memory; each rank gives those of its own batches."""
        gathered = torch.empty(count if self.group.is_main else 0, rows.shape[1])
        for rank in range(self.group.world_size):
            numbers = torch.tensor([number for unit in self._units(count, rank) for number in unit], dtype=torch.long)
            sent = self.group.send_to_main(rows, rank, len(numbers))
            if self.group.is_main:
                gathered[numbers] = sent
        return gathered

    def _judge_features(self, fake: dict[str, _Features]) -> dict[str, float]:
        """On rank 0."""
        figures: dict[str, float] = {}
        for name in self.detectors:
            kinds = {figure.kind: figure.name for figure in self.figures if figure.detector == name}
            real, made = self.real[name], fake[name]
            rows, made_rows = (found.rows.to(self.group.device) for found in (real, made))
            values: dict[str, float] = {}
            if "frechet" in kinds:
                values["frechet"] = frechet_distance(made.sums.moments(), real.sums.moments())
            if "kernel" in kinds:
                values["kernel"], deviation = kid.kernel_distance(rows, made_rows, seed=self.protocol.seed)
                figures[f"{kinds['kernel']}_deviation"] = deviation
            if kinds.keys() & {"precision", "recall"}:
                pair = precision_recall.precision_recall(rows, made_rows)
                values |= dict(zip(("precision", "recall"), pair))
            if kinds.keys() & {"density", "coverage"}:
                pair = precision_recall.density_coverage(rows, made_rows)
                values |= dict(zip(("density", "coverage"), pair))
            figures |= {kinds[kind]: value for kind, value in values.items() if kind in kinds}
        return figures

    # Reconstructions

    def _judge_reconstructions(self, model: Model) -> dict[str, float]:
        """Means over the real images, of 8-bit reconstructions from the mean of q(z | x)."""
        kinds = [figure.kind for figure in self.figures if figure.detector is None]
        device, count = self.group.device, self.protocol.num_reals
        sums = torch.zeros(len(kinds), dtype=torch.float64, device=device)
        bad, failure = torch.zeros((), device=device), None
        for batch in self._real_batches():  # to their end whatever happens, as in `_collect`
            images = batch.images.to(device)
            again = model.reconstruct(images, batch.labels if model.num_classes else None)
            bad += _count_nonfinite(again)
            pair = to_float(images), to_float(model.to_uint8(again, truncate=self.protocol.rounding == "down"))
            try:
                sums += torch.stack([self._reconstruction(kind, *pair).double().sum() for kind in kinds])
            except UserError as error:
                failure = failure or error
            self._advance(len(images))
        self.group.agree(False, failure)
        self._refuse_nonfinite(bad, "reconstructions")
        means = dict(zip(kinds, (self.group.sum(sums) / count).tolist()))
        for kind, mean in means.items():
            if math.isnan(mean):
                raise UserError(f"{kind}: is not a number for some of the real images; nothing is judged", shared=True)
        return means

    def _reconstruction(self, kind: str, real: Tensor, again: Tensor) -> Tensor:
        if kind != "lpips":
            return getattr(reconstruction, kind)(real, again)
        return self.lpips(real, again)

    # What both need

    def check(self, settings: dict[str, Any]) -> None:
        """Raises UserError when no model of these settings can be judged so."""
        protocol, index = self.protocol, self.stream.index
        if protocol.mode == "train" and settings.get("norm") != "batch":
            raise UserError("mode: train is for models with BatchNorm (model.norm=batch); this has none")
        if protocol.truncation != 1 and settings["family"] != "style":
            raise UserError(f"truncation: only the style family has it, not {settings['family']}")
        num_classes = settings.get("num_classes", 0)
        if num_classes and any(figure.detector is None for figure in self.figures):
            if (index.num_classes or 0) != num_classes:
                raise UserError(
                    f"reconstructions of this model need the labels of its {num_classes} classes; {self.stream.where}"
                    f" has {index.num_classes or 'no'} classes"
                )

    def _check_model(self, model: Model) -> None:
        shape = (self.stream.index.num_channels, self.stream.resolution, self.stream.resolution)
        if model.sample_shape != shape:
            raise UserError(f"the model makes images of shape {model.sample_shape}, and the real ones have {shape}")
        self.check(model.settings)

    def _refuse_nonfinite(self, bad: Tensor, what: str) -> None:
        count = int(self.group.sum(bad).item())
        if count:
            raise UserError(f"{count:,} {what} of this model hold NaN or infinity; nothing is judged", shared=True)

    def _advance(self, count: int) -> None:
        # Rank 0's bar stands for all ranks, whose shares are equal but for a batch.
        self.bar.update(min(count * self.group.world_size, self.bar.total - self.bar.n))


class _Features:
    """The sums for moments and, where `num_rows` is given, the vectors themselves, float32 [num_rows, dim]."""

    def __init__(self, dim: int, device: torch.device | str = "cpu", num_rows: int = 0):
        self.sums = MomentSums(dim, device)
        self.rows = torch.empty(num_rows, dim, device=device)
        self._filled = 0

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> _Features:
        """From what `tensors` gave, in the host's memory."""
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        made = cls(0)
        made.sums, made.rows = MomentSums.of(tensors), tensors["rows"]
        return made

    def add(self, features: Tensor) -> None:
        self.sums.add(features)
        if len(self.rows):
            self.rows[self._filled : self._filled + len(features)] = features
            self._filled += len(features)

    def tensors(self) -> dict[str, Tensor]:
        return self.sums.tensors() | {"rows": self.rows}


@contextmanager
def _mode(model: Model, mode: str) -> Iterator[None]:
    """`train` lets BatchNorm take the statistics of each batch, and leaves its running averages as they are."""
    norms = [
        m for network in (model.encoder, model.decoder) for m in network.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    for norm in norms if mode == "train" else ():
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()
            norm.track_running_stats = True


def _count_nonfinite(images: Tensor) -> Tensor:
    return (~images.isfinite()).flatten(1).any(dim=1).sum()


def write(run: Folder, evaluation: Evaluation, figures: dict[str, float], model: Model, data_url: str) -> str:
    """Keep figures with their protocol; see `keep`."""
    images_seen, group = model.info.get("images_seen"), evaluation.group
    told = {name: value if abs(value) < float("inf") else str(value) for name, value in figures.items()}
    known = {"data": data_url, "device": str(group.device), "ranks": group.world_size}
    prefix = "" if images_seen is None else f"{images_seen:012d}-"
    return keep(run, prefix, told, evaluation.describe(), model, known)


def keep(
    run: Folder, prefix: str, figures: dict[str, Any], protocol: dict[str, Any], model: Model, known: dict[str, Any]
) -> str:
    """Keep figures of a model under evaluations/ of its run, with their protocol and what else is known. Returns the file's path or
    URL as it may be shown. The same model judged again by the same protocol takes the same name."""
    protocol = protocol | {"weights": model.weights or "unknown"}
    digest = weights_digest(model)
    key = hashlib.sha256(json.dumps([protocol, digest], sort_keys=True).encode()).hexdigest()[:8]
    content = {
        "figures": figures, "protocol": protocol, "images_seen": model.info.get("images_seen"), "weights_sha256": digest,
        **known, "sivae": __version__, "torch": torch.__version__, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
    run.write(json.dumps(content, indent=1).encode(), FOLDER, f"{prefix}{key}.json")
    return f"{shown(run.url)}/{FOLDER}/{prefix}{key}.json"
