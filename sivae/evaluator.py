"""Judging a run while it trains, as `sivae evaluate` does afterwards, and keeping its best checkpoint.

The best is a pointer beside the checkpoints, which their cleaning respects. A checkpoint holds the figure it was judged by, so
that a run killed between the checkpoint and the pointer finds its best again.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from sivae import checkpoint, inference, real_statistics, schedule
from sivae.background import Background
from sivae.config import Config
from sivae.config.run import EvaluateSettings
from sivae.data import open_stream
from sivae.distributed import Group
from sivae.errors import UserError, shown
from sivae.evaluate import Evaluation, Protocol, departures, write
from sivae.storage import Folder


@contextmanager
def _full_paths() -> Iterator[None]:
    """What is wrong with a setting has its full path, which `sivae evaluate` has not."""
    try:
        yield
    except UserError as error:
        if str(error).partition(":")[0] not in EvaluateSettings.model_fields:
            raise
        raise UserError(f"evaluate.{error}", shared=error.shared) from None


class Evaluator:
    """Does nothing where `evaluate.every_images` is None. `run` and `is_best` are collectives; files are written in the background."""

    def __init__(self, settings: Config, group: Group, run: Folder, background: Background):
        self.settings, self.group, self.run_folder, self.background = settings, group, run, background
        self.figures: dict[str, float] = {}
        """The last ones, as metrics.jsonl has them."""
        self.judged: tuple[int, float] | None = None  # images seen, and the figure that decides
        if settings.evaluate.every_images is None:
            return
        evaluate, data, model = settings.evaluate, settings.data, settings.model
        self.url = evaluate.data or data.url
        stream = group.together(
            lambda: open_stream(
                self.url, split=evaluate.split or data.split, resolution=model.resolution, num_channels=model.num_channels,
                batch_size=1, random_crop=None if data.random_crop else False, cache_dir=data.cache_dir,
                cache_bytes=data.cache_bytes, storage_options=data.storage_options, timeout_sec=data.timeout_sec,
                progress=group.is_main,
            )
        )  # fmt: skip
        names = tuple(evaluate.metrics)
        if evaluate.protocol == "published":
            if (evaluate.split or data.split) != "train":
                raise UserError(
                    "evaluate.split: the published protocol takes the training images; set it to train", shared=True
                )
            protocol = Protocol.published(names, model.model_dump(), len(stream))
            for sentence in departures(protocol, self._weights) if group.is_main else ():
                print(f"sivae: evaluate.protocol: {sentence}", file=sys.stderr)
        else:
            fields = ("num_fakes", "num_reals", "batch_size", "truncation", "truncation_layers", "mode")
            protocol = Protocol(names, **{field: getattr(evaluate, field) for field in fields})
        protocol = replace(protocol, seed=evaluate.seed)
        with _full_paths():
            self.evaluation = Evaluation(
                stream, protocol, group, detectors=evaluate.detectors, lpips=evaluate.lpips,
                statistics=real_statistics.default_folder(data.cache_dir), cache_dir=data.cache_dir, progress=False,
            )  # fmt: skip
            group.together(lambda: self.evaluation.check(model.model_dump()))
        self.decides = self.evaluation.figures[0]
        described = json.dumps(self.evaluation.describe((self.decides,)), sort_keys=True)
        self.protocol = hashlib.sha256(described.encode()).hexdigest()[:16]
        best = group.on_main(lambda: checkpoint.best(run))
        if best is not None and not self._comparable(best) and group.is_main:
            print(
                f"sivae: the best checkpoint so far ({best['name']}) was judged in another way; the next that is judged takes its place",
                file=sys.stderr,
            )

    @property
    def _weights(self) -> str:
        return "average" if self.settings.ema.halflife_images else "plain"

    def due(self, images_seen: int, batch_size: int, last: bool) -> bool:
        every = self.settings.evaluate.every_images
        return every is not None and (last or schedule.due(images_seen, batch_size, every))

    def run(self, average: dict[str, Tensor], images_seen: int) -> str | None:
        """Judge the averaged weights, which every rank holds; `figures` has the result. Returns what a person should hear."""
        info = {"images_seen": images_seen}
        model = inference.Model(self.settings.model.model_dump(), self.group.device, info, self._weights)
        inference.fill(model, average, "the running average")
        self.figures, self.judged = {}, None
        try:
            found = self.evaluation.run(model)
        except UserError as error:  # such as an image that cannot be read: no reason to lose a run
            return str(error)
        self.figures = {f"evaluate/{name}": value for name, value in found.items()}
        value = found[self.decides.name]
        if math.isfinite(value):
            self.judged = images_seen, value
        model.encoder.cpu(), model.decoder.cpu()  # the background holds only what is in the host's memory
        self.background.submit(lambda: write(self.run_folder, self.evaluation, found, model, shown(self.url)))
        return None

    def at(self, images_seen: int) -> dict[str, Any] | None:
        """What a checkpoint keeps of its own judgement."""
        if self.judged is None or self.judged[0] != images_seen:
            return None
        return {"figure": self.decides.name, "value": self.judged[1], "protocol": self.protocol}

    def is_best(self, images_seen: int) -> bool:
        """Whether the weights of this moment were judged better than the best checkpoint. No save may be under way."""
        judged = self.at(images_seen)
        return self.group.on_main(lambda: judged is not None and self._beats(judged["value"]))

    def point(self, name: str, judged: dict[str, Any] | None) -> None:
        """On rank 0: a checkpoint was published or read back, with what was judged of it; it may be the best."""
        if self.settings.evaluate.every_images is None or judged is None or not self._comparable(judged):
            return
        if self._beats(judged["value"]):
            checkpoint.set_best(self.run_folder, name, judged)

    def _comparable(self, judged: dict[str, Any]) -> bool:
        """Whether it is this figure, of the same images by the same protocol."""
        return (judged["figure"], judged.get("protocol")) == (self.decides.name, self.protocol)

    def _beats(self, value: float) -> bool:
        best = checkpoint.best(self.run_folder)
        if best is None or not self._comparable(best):
            return True
        return value > best["value"] if self.decides.higher_is_better else value < best["value"]
