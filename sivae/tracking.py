"""What a run tells: progress bar, metrics.jsonl, TensorBoard, pictures. Rank 0 only; the other ranks hold one that is never opened."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from sivae.errors import UserError, shown
from sivae.images import png_bytes
from sivae.progress import progress_bar
from sivae.storage import Folder

logger = logging.getLogger("sivae")


class Tracker:
    """Silent until `open`, which rank 0 alone calls.

    One thread may call `picture`, `histogram` and `sync` while another calls `scalars`; nobody may while `open` or `close` runs.
    """

    def __init__(self, run: Folder, total_images: int, *, tensorboard: bool, progress: bool, settings_yaml: str):
        self.run, self.total_images, self.settings_yaml = run, total_images, settings_yaml
        self.wants_tensorboard, self.wants_progress = tensorboard, progress
        self.local = self.metrics_file = self.writer = self.bar = None

    def open(self, images_seen: int) -> None:
        """Start at this position, or go back to it: what was told of later images is dropped, it will be told again."""
        with _disk_errors(self.run.url):
            if self.local is None:
                # Files that grow are written locally; for an object store `sync` uploads them.
                self.local = self.run.path if self.run.is_local else tempfile.mkdtemp(prefix="sivae-")
                os.makedirs(self.local, exist_ok=True)
            self._close_files()
            self._keep_until(images_seen)
            self.metrics_file = open(os.path.join(self.local, "metrics.jsonl"), "a", encoding="utf-8")
            if self.wants_tensorboard:
                # Slow to import, so only where it is wanted.
                from torch.utils.tensorboard import SummaryWriter

                # Also at 0: a life that ended before its first checkpoint left points too.
                self.writer = SummaryWriter(os.path.join(self.local, "tensorboard"), purge_step=images_seen + 1)
                self.writer.add_text("settings", f"```yaml\n{self.settings_yaml}```", images_seen)
        if self.wants_progress and self.bar is None:
            self.bar = progress_bar(self.total_images, "train", " images", initial=images_seen)

    def advance(self, images: int) -> None:
        if self.bar is not None:
            self.bar.update(images)

    def scalars(self, values: dict[str, float], images_seen: int) -> None:
        """One line of metrics.jsonl and the same numbers in TensorBoard, where `a/b` groups them under a."""
        line = {"images_seen": images_seen, "time": round(time.time(), 3)} | values
        with _disk_errors(self.run.url):
            self.metrics_file.write(json.dumps(line) + "\n")
            self.metrics_file.flush()
            if self.writer is not None:
                for name, value in values.items():
                    self.writer.add_scalar(name, value, images_seen)
        if self.bar is not None:
            short_names = {
                "loss_encoder": "enc", "loss_decoder": "dec", "rec": "rec", "kl_real": "kl", "kl_gap": "gap",
                "substituted": "substituted",
            }  # fmt: skip
            named = {name.split("/")[-1]: value for name, value in values.items()}
            told = {short: f"{named[name]:.4g}" for name, short in short_names.items() if name in named}
            if told:
                self.bar.set_postfix(told, refresh=False)

    def picture(self, name: str, pixels: np.ndarray, images_seen: int) -> None:
        """A PNG under pictures/ and in TensorBoard."""
        self.run.write(png_bytes(pixels), *_picture_file(name, images_seen))
        if self.writer is not None:
            with _disk_errors(self.run.url):
                self.writer.add_image(name, pixels, images_seen, dataformats="HWC")

    def picture_path(self, name: str, images_seen: int) -> str:
        """Where `picture` puts it."""
        return "/".join([self.run.url, *_picture_file(name, images_seen)])

    def histogram(self, name: str, values: Tensor, images_seen: int) -> None:
        if self.writer is not None:
            with _disk_errors(self.run.url):
                self.writer.add_histogram(name, values, images_seen)

    def hparams(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """The settings beside the last metrics, for TensorBoard's HPARAMS tab."""
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        flat = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flatten(settings).items()
        }
        # The table takes each metric's last value from the scalars of the same name.
        for summary in hparams(flat, metrics):
            with _disk_errors(self.run.url):
                self.writer.file_writer.add_summary(summary)

    def note(self, line: str) -> None:
        """A line for a person: above the progress bar, on stderr."""
        if self.local is not None:
            tqdm.write(f"sivae: {line}", file=sys.stderr)

    def sync(self) -> None:
        """Everything onto the storage of the run directory; on rank 0."""
        with _disk_errors(self.run.url):
            if self.writer is not None:
                self.writer.flush()
        if not self.run.is_local:
            for root, _, files in os.walk(self.local):
                for file in files:
                    path = os.path.join(root, file)
                    with open(path, "rb") as opened:
                        self.run.write(opened.read(), *os.path.relpath(path, self.local).split(os.sep))

    def close(self) -> None:
        """Raises UserError when the last of it cannot be written; closed it is all the same."""
        if self.local is None:
            return
        if self.bar is not None:
            self.bar.close()
        try:
            with _disk_errors(self.run.url):
                self._close_files()
            self.sync()
        finally:
            if not self.run.is_local:
                shutil.rmtree(self.local, ignore_errors=True)
            self.local = None

    def _close_files(self) -> None:
        writer, metrics_file, self.writer, self.metrics_file = self.writer, self.metrics_file, None, None
        try:
            if writer is not None:
                writer.close()
        finally:
            if metrics_file is not None:
                metrics_file.close()

    def _keep_until(self, images_seen: int) -> None:
        """Drop lines of metrics.jsonl from after the checkpoint: they will be made again. Damaged lines go too."""
        path = os.path.join(self.local, "metrics.jsonl")
        if not self.run.is_local and self.run.exists("metrics.jsonl"):
            with open(path, "wb") as file:
                file.write(self.run.read("metrics.jsonl"))
        if not os.path.exists(path):
            return
        with open(path, "rb") as file:
            kept = [f"{json.dumps(line)}\n" for line in read_lines(file.read()) if line["images_seen"] <= images_seen]
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            file.writelines(kept)
        os.replace(f"{path}.part", path)


def read_lines(data: bytes) -> Iterator[dict[str, Any]]:
    """What metrics.jsonl tells, line by line, but for damaged lines: a kill can cut one, a power cut can leave any bytes."""
    for line in data.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        if isinstance(told, dict) and isinstance(told.get("images_seen"), int):
            yield told
        else:
            logger.debug("a damaged line of metrics.jsonl: %s", line)


@contextmanager
def _disk_errors(where: str) -> Iterator[None]:
    """What the operating system refuses, most often for want of space, as one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{shown(where)}: metrics cannot be written ({error.strerror or error}); free space and run the same command again"
        ) from error


def _picture_file(name: str, images_seen: int) -> tuple[str, str]:
    return "pictures", f"{name}-{images_seen:012d}.png"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
