"""What a sweep leaves: table.md, best.yaml, TensorBoard logs with hparams, pictures. Made from the trials' own accounts."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.sweep_spec import Spec
from launch.trial import LINEAGE, read_failure, read_history
from sivae import config
from sivae.errors import UserError
from sivae.storage import Folder


@dataclass(frozen=True)
class Trial:
    """`history`: one entry a report, with the values that held then; `failed`: why it ended, if it did, and `failed_with` the
    values that held at that time."""

    name: str
    history: list[dict[str, Any]]
    lineage: list[dict[str, Any]]
    failed: str | None
    failed_with: dict[str, Any] | None = None

    def last(self, metric: str) -> float:
        return self.history[-1]["metrics"][metric]

    @property
    def values(self) -> dict[str, Any]:
        return self.history[-1]["values"]

    @property
    def images_seen(self) -> int:
        return self.history[-1]["images_seen"]


def read_trials(folder: Folder) -> list[Trial]:
    found = []
    for name in folder.names("trials"):
        own = folder.folder("trials", name)
        lineage = json.loads(own.read(LINEAGE)) if own.exists(LINEAGE) else []
        failure = read_failure(own) or {}
        found.append(Trial(name, read_history(own), lineage, failure.get("sentence"), failure.get("values")))
    return found


def write(spec: Spec, folder: Folder) -> Iterator[str]:
    """Write everything into the sweep's directory; yields what a person should read. Raises UserError when no trial got anywhere."""
    trials = read_trials(folder)
    good = [trial for trial in trials if trial.history]
    if not good:
        reason = next((trial.failed for trial in trials if trial.failed), "no trial reported anything")
        raise UserError(f"all {len(trials)} trials failed, the first with: {reason}")
    sign = 1 if spec.mode == "min" else -1
    # A trial that diverged ends the list; among the others the last report counts.
    ranked = sorted(good, key=lambda one: (one.failed is not None, sign * _number(one.last(spec.metric), sign)))
    best = ranked[0]
    rows = table(spec, ranked, [trial for trial in trials if not trial.history])
    settings = spec.settings(best.values)
    run = os.path.join("runs", f"{folder.url.rstrip('/').rpartition('/')[2]}-best")
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"directory": run})})
    changed = " The settings changed during the trial; these are its last.\n" if best.lineage else "\n"
    head = (
        f"# The best of {len(trials)} trials: {spec.metric} {best.last(spec.metric):.5g} after {best.images_seen:,} images"
        f" (trial {best.name}).{changed}"
    )
    folder.write((head + config.dump_yaml(settings)).encode(), "best.yaml")
    folder.write("\n".join([f"# {spec.metric} ({spec.mode})", "", *rows, ""]).encode(), "table.md")
    pictures = draw(spec, folder, ranked)
    tensorboard(spec, folder, ranked)
    yield from rows
    yield f"best: {folder.url}/best.yaml, as `sivae train {folder.url}/best.yaml`; its trained model: {folder.url}/trials/{best.name}"
    yield f"pictures: {', '.join(f'{folder.url}/{name}' for name in pictures)}"
    yield f"log: tensorboard --logdir {folder.url}/tensorboard"


def _number(value: float, sign: int) -> float:
    return value if math.isfinite(value) else sign * math.inf


def table(spec: Spec, ranked: list[Trial], nothing: list[Trial]) -> list[str]:
    lines = [f"| trial | {spec.metric} | images | {' | '.join(spec.keys)} | |", "|" + "---|" * (len(spec.keys) + 4)]
    for trial in ranked:
        values = " | ".join(_shown((trial.failed_with or trial.values)[key]) for key in spec.keys)
        total = spec.settings(trial.values).schedule.total_images  # a setting like any other: trials may differ in it
        notes = ["stopped early"] if trial.images_seen < total and not trial.failed else []
        notes += [f"went on from {', '.join(step['trial'] for step in trial.lineage)}"] if trial.lineage else []
        notes += [f"failed: {trial.failed}"] if trial.failed else []
        lines.append(
            f"| {trial.name} | {trial.last(spec.metric):.5g} | {trial.images_seen:,} | {values} | {'; '.join(notes)} |"
        )
    for trial in nothing:
        values = " | ".join(_shown((trial.failed_with or {}).get(key, "")) for key in spec.keys)
        lines.append(f"| {trial.name} | | 0 | {values} | failed: {trial.failed or 'it reported nothing'} |")
    return lines


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tensorboard(spec: Spec, folder: Folder, trials: list[Trial]) -> None:
    """One log a trial: the metrics over images, and its settings for the HPARAMS tab."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    for trial in trials:
        with tempfile.TemporaryDirectory() as local:
            writer = SummaryWriter(local)
            for entry in trial.history:
                for name, value in entry["metrics"].items():
                    writer.add_scalar(name, value, entry["images_seen"])
            plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in trial.values.items()}
            for summary in hparams(plain, {spec.metric: trial.last(spec.metric)}):
                writer.file_writer.add_summary(summary)
            writer.close()
            folder.remove("tensorboard", trial.name)
            for file in os.listdir(local):
                with open(os.path.join(local, file), "rb") as opened:
                    folder.write(opened.read(), "tensorboard", trial.name, file)


def draw(spec: Spec, folder: Folder, ranked: list[Trial]) -> list[str]:
    """The metric over images for every trial; parallel coordinates of the settings, or, where trials change them, the settings
    over images. Returns the names of the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = matplotlib.colormaps["viridis_r"]
    shade = {
        trial.name: colours(0.08 + 0.92 * (1 - index / max(1, len(ranked) - 1))) for index, trial in enumerate(ranked)
    }
    names = []

    def finish(figure, name: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=130)
        pyplot.close(figure)
        folder.write(buffer.getvalue(), name)
        names.append(name)

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    for index, trial in reversed(list(enumerate(ranked))):
        x, y = [e["images_seen"] for e in trial.history], [e["metrics"][spec.metric] for e in trial.history]
        best = index == 0
        axes.plot(x, y, color=shade[trial.name], lw=2.6 if best else 1.3, marker="o", ms=4 if best else 3, zorder=3 if best else 2, label=f"best: {trial.name}" if best else None)  # fmt: skip
    values = [
        e["metrics"][spec.metric] for trial in ranked for e in trial.history if math.isfinite(e["metrics"][spec.metric])
    ]
    if values and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("images seen")
    axes.set_ylabel(f"{spec.metric} ({'lower' if spec.mode == 'min' else 'higher'} is better)")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_title(f"{len(ranked)} trials, darker is better")
    axes.grid(alpha=0.3)
    axes.legend()
    finish(figure, "metric.png")
    if spec.search == "pbt":
        figure, rows = pyplot.subplots(
            len(spec.keys), 1, figsize=(8, 1.2 + 2.0 * len(spec.keys)), sharex=True, squeeze=False, layout="constrained"
        )
        for key, (axes,) in zip(spec.keys, rows):
            for trial in reversed(ranked):
                x = [e["images_seen"] for e in trial.history]
                axes.step(
                    x,
                    [e["values"][key] for e in trial.history],
                    where="pre",
                    color=shade[trial.name],
                    lw=2.4 if trial is ranked[0] else 1.2,
                )
            axes.set_title(key.split(",")[0], fontsize=9, loc="left")
            if "loguniform" in spec.space[key]:
                axes.set_yscale("log")
                for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                    axis(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
            axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.grid(alpha=0.3)
        rows[-1][0].set_xlabel("images seen")
        figure.suptitle("settings of each trial, darker is better")
        finish(figure, "settings.png")
    else:
        finish(_parallel(pyplot, spec, ranked, shade), "parallel.png")
    return names


def _parallel(pyplot, spec: Spec, ranked: list[Trial], shade: dict[str, Any]):
    """One vertical axis for each setting and one for the metric; a line is a trial."""
    axes_names = [*spec.keys, spec.metric]
    figure, axes = pyplot.subplots(figsize=(2.2 * len(axes_names) + 1, 4.6), layout="constrained")
    columns = []
    for key in axes_names:
        raw = [trial.last(spec.metric) if key == spec.metric else trial.values[key] for trial in ranked]
        numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in raw)
        log = key in spec.space and "loguniform" in spec.space[key]
        if numeric:
            finite = [value for value in raw if math.isfinite(value)] or [0.0]
            low, high = min(finite), max(finite)
            place = (lambda v: math.log(v)) if log else (lambda v: v)
            span = (place(high) - place(low)) or 1.0
            columns.append(
                [(place(min(max(v, low), high)) - place(low)) / span if math.isfinite(v) else 1.0 for v in raw]
            )
            marks = [(0.0, _shown(float(low))), (1.0, _shown(float(high)))]
        else:
            kinds = sorted({str(value) for value in raw})
            marks = [(index / max(1, len(kinds) - 1), kind) for index, kind in enumerate(kinds)]
            columns.append([next(place for place, kind in marks if kind == str(value)) for value in raw])
        at = len(columns) - 1
        axes.axvline(at, color="0.6", lw=1)
        for place, text in marks:
            if place in (0.0, 1.0):
                axes.text(at, place * 1.06 - 0.03, text, ha="center", va="bottom" if place else "top", fontsize=8)
            else:
                axes.text(at + 0.03, place, text, va="center", fontsize=8, zorder=4, bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 1})  # fmt: skip
    for index, trial in reversed(list(enumerate(ranked))):
        axes.plot(range(len(columns)), [column[index] for column in columns], color=shade[trial.name], lw=2.8 if index == 0 else 1.3, marker="o", ms=4, zorder=3 if index == 0 else 2)  # fmt: skip
    axes.set_xticks(range(len(axes_names)), [name.split(",")[0].replace(".", ".\n", 1) for name in axes_names])
    axes.tick_params(axis="x", pad=16, length=0)
    axes.set_yticks([])
    axes.set_ylim(-0.02, 1.02)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title("settings and result of each trial, darker is better", pad=24)
    return figure
