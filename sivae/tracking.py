"""What a run tells: progress bar, metrics.jsonl, TensorBoard, pictures. Rank 0 only; the other ranks hold a silent one."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from sivae.images import png_bytes
from sivae.storage import Folder

logger = logging.getLogger("sivae")


class Tracker:
    """`images_seen` is the position that the run starts or resumes from; later lines of an interrupted run are dropped."""

    def __init__(
        self, run: Folder, *, active: bool, total_images: int, images_seen: int, tensorboard: bool, progress: bool, settings_yaml: str,
    ):  # fmt: skip
        self.run, self.active = run, active
        self.bar = None
        self.writer = None
        if not active:
            return
        # Files that grow are written locally; for an object store `sync` uploads them.
        self.local = run.path if run.is_local else tempfile.mkdtemp(prefix="sivae-")
        os.makedirs(self.local, exist_ok=True)
        self._keep_until(images_seen)
        self.metrics_file = open(os.path.join(self.local, "metrics.jsonl"), "a", encoding="utf-8")
        if tensorboard:
            # Slow to import, so only where it is wanted.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(
                os.path.join(self.local, "tensorboard"), purge_step=images_seen + 1 if images_seen else None
            )
            self.writer.add_text("settings", f"```yaml\n{settings_yaml}```", images_seen)
        if progress:
            terminal = sys.stderr.isatty()
            self.bar = tqdm(
                total=total_images, initial=images_seen, unit=" images", unit_scale=True, dynamic_ncols=terminal,
                mininterval=0.2 if terminal else 15.0, file=sys.stderr, desc="train",
            )  # fmt: skip

    def advance(self, images: int) -> None:
        if self.bar is not None:
            self.bar.update(images)

    def scalars(self, values: dict[str, float], images_seen: int) -> None:
        """One line of metrics.jsonl and the same numbers in TensorBoard, where `a/b` groups them under a."""
        if not self.active:
            return
        line = {"images_seen": images_seen, "time": round(time.time(), 3)} | values
        self.metrics_file.write(json.dumps(line) + "\n")
        self.metrics_file.flush()
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, images_seen)
        if self.bar is not None:
            shown = {"loss_encoder": "enc", "loss_decoder": "dec", "rec": "rec", "kl_real": "kl", "kl_gap": "gap"}
            named = {name.split("/")[-1]: value for name, value in values.items()}
            self.bar.set_postfix(
                {short: f"{named[name]:.4g}" for name, short in shown.items() if name in named}, refresh=False
            )

    def picture(self, name: str, pixels: np.ndarray, images_seen: int) -> str | None:
        """A PNG under pictures/ and in TensorBoard. Returns its path."""
        if not self.active:
            return None
        file = f"{name}-{images_seen:012d}.png"
        self.run.write(png_bytes(pixels), "pictures", file)
        if self.writer is not None:
            self.writer.add_image(name, pixels, images_seen, dataformats="HWC")
        return f"{self.run.url}/pictures/{file}"

    def histogram(self, name: str, values: Tensor, images_seen: int) -> None:
        if self.writer is not None:
            self.writer.add_histogram(name, values, images_seen)

    def hparams(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """The settings beside the last metrics, for TensorBoard's HPARAMS tab."""
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        flat = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in _flatten(settings).items()
        }
        for summary in hparams(flat, {f"final/{name.split('/')[-1]}": value for name, value in metrics.items()}):
            self.writer.file_writer.add_summary(summary)

    def note(self, line: str) -> None:
        """A line for a person: above the progress bar, on stderr."""
        if self.active:
            tqdm.write(f"sivae: {line}", file=sys.stderr)

    def sync(self) -> None:
        """Everything onto the storage of the run directory."""
        if not self.active:
            return
        if self.writer is not None:
            self.writer.flush()
        if not self.run.is_local:
            for root, _, files in os.walk(self.local):
                for file in files:
                    path = os.path.join(root, file)
                    with open(path, "rb") as opened:
                        self.run.write(opened.read(), *os.path.relpath(path, self.local).split(os.sep))

    def close(self) -> None:
        if not self.active:
            return
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()
        self.metrics_file.close()
        self.sync()

    def _keep_until(self, images_seen: int) -> None:
        """Drop lines of metrics.jsonl from after the checkpoint: they will be made again. A line cut by a kill goes too."""
        path = os.path.join(self.local, "metrics.jsonl")
        if not self.run.is_local and self.run.exists("metrics.jsonl"):
            with open(path, "wb") as file:
                file.write(self.run.read("metrics.jsonl"))
        if not os.path.exists(path):
            return
        kept = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    if json.loads(line)["images_seen"] <= images_seen:
                        kept.append(line)
                except (ValueError, KeyError):
                    logger.debug("dropped a damaged line of %s", path)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            file.writelines(kept)
        os.replace(f"{path}.part", path)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
