"""One trial of a sweep: a training run of its own, whose reports go to Ray Tune.

Tune holds nothing but a small pointer (which run, which checkpoint); the checkpoints are the run's own. When the pointer that
Tune hands out names another trial's run, this trial is to go on from there: it takes a copy of that checkpoint, weights and
optimizer states and all, and trains on with its own settings (population based training).
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from launch import cluster
from launch.judge import judge
from launch.run import Limits, Run
from launch.sweep_spec import JUDGED, Spec
from sivae import checkpoint, tracking
from sivae.config import Config, ConfigError
from sivae.errors import Diverged, UserError
from sivae.storage import Folder

POINTER, LINEAGE, FAILED, HISTORY = "pointer.json", "lineage.json", "failed.json", "history.json"


def run(config: dict[str, Any], spec: Spec, gpus: float, cache_dir: str | None, board: Any) -> None:
    """What Tune runs in a process of its own for each trial, and again after each pause. `config["point"]`: values by key path;
    `board`: where the sweep hears of what is said."""
    from ray import tune

    values = config["point"]

    trial_id = tune.get_context().get_trial_id()
    folder = Folder(spec.directory).folder("trials", trial_id)
    try:
        folder.remove(FAILED)  # of an earlier try
        settings = spec.settings(values, folder.url)
        Trial(trial_id, values, spec, settings, folder, gpus, cache_dir, board).go()
    except (UserError, ConfigError) as error:
        # Not raised: Tune would try it again at once. Where that may help, it is tried when the sweep starts again.
        note_failure(folder, str(error), values, isinstance(error, NoMetric), isinstance(error, Diverged))


def note_failure(
    folder: Folder, sentence: str, values: dict[str, Any], all_fail: bool = False, diverged: bool = False
) -> None:
    """Keep why a trial ended, and with which values. `all_fail`: no other trial will do better."""
    failure = {"sentence": sentence, "all": all_fail, "diverged": diverged, "values": values}
    folder.write(json.dumps(failure).encode(), FAILED)


def read_failure(folder: Folder) -> dict[str, Any] | None:
    return json.loads(folder.read(FAILED)) if folder.exists(FAILED) else None


def may_be_mended(failure: dict[str, Any]) -> bool:
    """Whether a failure may have a cause outside the trial, so that another try is worth it: a divergence is a result."""
    return not failure["all"] and not failure.get("diverged", False)


class NoMetric(UserError):
    """The metric of the sweep does not come: no other trial will have it either."""


class Trial:
    def __init__(
        self,
        trial_id: str,
        values: dict[str, Any],
        spec: Spec,
        settings: Config,
        folder: Folder,
        gpus: float,
        cache_dir: str | None,
        board: Any,
    ):
        self.trial_id, self.values, self.spec, self.settings, self.folder = trial_id, values, spec, settings, folder
        self.gpus, self.cache_dir, self.board = gpus, cache_dir, board
        self.reports_without = 0
        self.told: str | None = None

    def go(self) -> None:
        pointer = read_pointer()
        if pointer is not None and pointer["trial"] != self.trial_id:
            self.told = inherit(
                self.folder, Folder(self.spec.directory).folder("trials", pointer["trial"]), pointer, self.values
            )
        elif pointer is not None:
            self.told = pointer["checkpoint"]
        self._catch_up()
        need = cluster.Need(self.spec.cpus_per_worker, self.gpus)
        names = checkpoint.list_names(self.folder)
        outcome = Run(
            self.settings, [self.spec.workers], need, Limits(wait_sec=600.0, max_failures=self.spec.max_failures, queue=True),
            say=lambda text: self.board.tell.remote(f"{self.trial_id} {text}"), on_report=self._report, cache_dir=self.cache_dir, lockstep=True, janitor=True,
            newest=names[-1] if names else None,
            restarted=True,  # by a sweep that was killed, perhaps, whose workers may live a little longer
        ).go()  # fmt: skip
        if self.told is None or outcome.interrupted:
            raise self._no_metric()

    def _catch_up(self) -> None:
        """Tell what a kill kept from being told: a checkpoint was saved, but Tune does not know of it."""
        names = checkpoint.list_names(self.folder)
        if not names or names[-1] == self.told:
            return
        images = images_of(names[-1])
        data = self.folder.read("metrics.jsonl") if self.folder.exists("metrics.jsonl") else b""
        lines = [line for line in tracking.read_lines(data) if line["images_seen"] <= images]
        metrics = {name: value for name, value in lines[-1].items() if "/" in name} if lines else {}
        if metrics and images >= images_of(self.told or "0"):
            self._report(metrics, names[-1])

    def _report(self, metrics: dict[str, float], name: str | None) -> None:
        """Hand a report to Tune, with the measures of the checkpoint. Tune may end this process in it."""
        from ray import tune

        if name is None or name == self.told:
            return
        if self.spec.metric in JUDGED:
            cluster_cache(self.cache_dir)
            metrics = metrics | judge(self.settings, name, self.spec.judge_images)
        if self.spec.metric not in metrics:
            self.reports_without += 1
            self.seen = sorted(metrics)
            if self.reports_without >= self.spec.metric_patience:
                raise self._no_metric()
            return
        images = images_of(name)
        told = {
            "images_seen": images,
            "rounds": self.spec.rounds(images),
            "run": self.folder.url,
            "checkpoint_name": name,
        }
        told |= metrics
        self._remember(images, metrics, name)
        with tempfile.TemporaryDirectory() as pointer:
            with open(os.path.join(pointer, POINTER), "w") as file:
                json.dump({"trial": self.trial_id, "checkpoint": name}, file)
            tune.report(told, checkpoint=tune.Checkpoint.from_directory(pointer))
        self.told = name

    def _remember(self, images: int, metrics: dict[str, float], name: str) -> None:
        """The trial's own account of itself, which the sweep's table and pictures are made from."""
        history = read_history(self.folder)
        rounds = self.spec.rounds(images)
        line = {"rounds": rounds, "images_seen": images, "checkpoint": name, "values": self.values, "metrics": metrics}
        history = [before for before in history if before["rounds"] < rounds] + [line]
        self.folder.write(json.dumps(history).encode(), HISTORY)

    def _no_metric(self) -> NoMetric:
        return NoMetric(
            f"metric: {self.spec.metric} was never reported in {self.reports_without} reports; reported are"
            f" {', '.join([*getattr(self, 'seen', []), *JUDGED])}"
        )


def read_history(folder: Folder) -> list[dict[str, Any]]:
    return json.loads(folder.read(HISTORY)) if folder.exists(HISTORY) else []


def cluster_cache(cache_dir: str | None) -> None:
    from launch.worker import place_caches

    place_caches(cache_dir)


def read_pointer() -> dict[str, str] | None:
    from ray import tune

    found = tune.get_checkpoint()
    if found is None:
        return None
    with found.as_directory() as folder, open(os.path.join(folder, POINTER)) as file:
        return json.load(file)


def inherit(own: Folder, donor: Folder, pointer: dict[str, str], values: dict[str, Any]) -> str:
    """Make the donor's checkpoint this run's newest, once; returns its name here. The run's older ones go.

    `lineage.json` keeps what came from where, with the sha256 of every file. It is written last: killed before, the copy is
    made again.
    """
    lineage = json.loads(own.read(LINEAGE)) if own.exists(LINEAGE) else []
    last = lineage[-1] if lineage else None
    if (
        last
        and (last["trial"], last["checkpoint"]) == (pointer["trial"], pointer["checkpoint"])
        and last["values"] == values
    ):
        if own.exists("checkpoints", last["name"], "manifest.json") or checkpoint.list_names(own)[-1:] > [last["name"]]:
            return last["name"]
    source = checkpoint.read(donor, pointer["checkpoint"])
    before = own.names("checkpoints")
    name = checkpoint.save(own, source.state, source.tensors)
    for other in before:
        if other != name:
            own.remove("checkpoints", other, "manifest.json")
            own.remove("checkpoints", other)
    manifests = [
        json.loads(f.read("checkpoints", n, "manifest.json")) for f, n in ((donor, pointer["checkpoint"]), (own, name))
    ]
    lineage.append(
        {
            "trial": pointer["trial"], "checkpoint": pointer["checkpoint"], "name": name, "values": values,
            "sha256": {file: about["sha256"] for file, about in manifests[1]["files"].items()},
            "donor_sha256": {file: about["sha256"] for file, about in manifests[0]["files"].items()},
        }
    )  # fmt: skip
    own.write(json.dumps(lineage, indent=1).encode(), LINEAGE)
    return name


def images_of(name: str) -> int:
    return int(name.partition(".")[0])
