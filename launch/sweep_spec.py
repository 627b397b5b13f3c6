"""What a sweep is: the YAML file, checked against the settings of a run before anything starts.

config: configs/digits.yaml           # the run that every trial varies
overrides: [schedule.total_images=8985]
directory: sweeps/betas_digits        # trials, table, pictures, best.yaml
metric: frechet_pixels                # what is compared, and `mode`: min or max
search: random                        # random, grid, optuna or pbt
scheduler: asha                       # asha stops bad trials early; none lets all finish
trials: 12
report_images: 1797                   # how often a trial saves and is judged
space:
  objective.beta_kl: {loguniform: [0.1, 1.0]}
"""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any, Literal

import fsspec
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from launch import paths
from sivae import config
from sivae.config import Config, ConfigError

KINDS = ("choice", "uniform", "loguniform", "grid")
OWN = ("run.directory", "run.checkpoint_images", "tracking.log_images", "tracking.progress")  # set for each trial
JUDGED = (
    "frechet_pixels",
    "reconstruction_mse",
)  # computed from each checkpoint; all other metrics are the trainer's own


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Asha(Section):
    grace_rounds: int = Field(2, ge=1)
    """No trial is stopped before so many reports."""
    reduction_factor: float = Field(3.0, gt=1)
    """At each rung the best 1/reduction_factor go on; the rungs lie so many times further apart each."""


class Pbt(Section):
    every_rounds: int = Field(2, ge=1)
    """Reports between two exchanges. All trials wait for each other there."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """The worst share of the trials continues from one of the best share."""
    resample: float = Field(0.25, ge=0, le=1)
    """Probability that a setting is drawn anew, instead of being multiplied by 0.8 or 1.2."""


class Spec(Section):
    config: str
    """YAML file of the run that every trial varies."""
    overrides: list[str] = []
    """Settings of all trials that replace the file's, as key.path=value."""
    directory: str = Field(min_length=1)
    """Folder or URL that all nodes share: trials, and in the end the table, the pictures and best.yaml."""
    metric: str = Field(min_length=1)
    """What is compared: a name that training reports (`terms/rec`), or `frechet_pixels` or `reconstruction_mse`, which are
    computed from each checkpoint and, unlike losses, do not depend on the betas."""
    mode: Literal["min", "max"] = "min"
    """Whether small or large values of `metric` are good."""
    search: Literal["random", "grid", "optuna", "pbt"] = "random"
    """Where the settings of the next trial come from; `pbt` trains a population whose worst continue from its best."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` stops bad trials early. `pbt` schedules by itself."""
    trials: int = Field(1, ge=1)
    """How many trials (`grid`: how often the whole grid)."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the search. Each trial's own seed is the config's."""
    workers: int = Field(1, ge=1)
    """Workers (GPUs, or CPU slots) of one trial."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPU slots of one worker."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at a time; None means as many as the cluster has room for."""
    report_images: int = Field(gt=0)
    """A trial saves a checkpoint and is judged every so many images."""
    judge_images: int = Field(1000, ge=2)
    """Images and samples that `frechet_pixels` and `reconstruction_mse` are computed from."""
    metric_patience: int = Field(10, ge=1)
    """After so many reports without `metric` the sweep stops: it would never come."""
    max_failures: int = Field(3, ge=0)
    """Lost workers and nodes that each trial survives."""
    asha: Asha = Asha()
    pbt: Pbt = Pbt()
    space: dict[str, dict[str, list[Any]]] = Field(min_length=1)
    """Key path of a setting: one of {choice: [...]}, {uniform: [low, high]}, {loguniform: [low, high]}, {grid: [...]}.
    Several paths joined by commas get the same value."""

    @model_validator(mode="after")
    def _check(self):
        for key, how in self.space.items():
            if len(how) != 1 or next(iter(how)) not in KINDS:
                raise ValueError(f"space.{key}: give one of {', '.join(KINDS)}, not {', '.join(how) or 'nothing'}")
            if own := [path for path in key.split(",") if path.strip() in OWN]:
                raise ValueError(f"space.{key}: {own[0].strip()} is set by the sweep for each trial; remove it")
            kind, values = next(iter(how.items()))
            if not values:
                raise ValueError(f"space.{key}.{kind}: is empty")
            if kind in ("uniform", "loguniform"):
                numbers = len(values) == 2 and all(
                    isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
                )
                if not numbers or not values[0] < values[1]:
                    raise ValueError(f"space.{key}.{kind}: needs two numbers that rise, [low, high], not {values}")
                if kind == "loguniform" and values[0] <= 0:
                    raise ValueError(f"space.{key}.loguniform: low must be above 0, not {values[0]}")
            if kind == "grid" and self.search in ("optuna", "pbt"):
                raise ValueError(f"space.{key}.grid: search `{self.search}` cannot walk a grid; use choice")
            if kind not in ("grid", "choice") and self.search == "grid":
                raise ValueError(
                    f"space.{key}.{kind}: search `grid` needs values to walk; use grid: [...] or search: random"
                )
        if self.search == "pbt" and self.scheduler != "none":
            raise ValueError(f"scheduler: search `pbt` schedules by itself; remove `{self.scheduler}`")
        if self.search == "pbt" and self.trials < 2:
            raise ValueError(f"trials: a population of {self.trials} has nobody to learn from; give 4 or more")
        return self

    @property
    def keys(self) -> list[str]:
        return list(self.space)

    def settings(self, values: dict[str, Any], directory: str | None = None) -> Config:
        """A trial's settings: the config with the sweep's overrides and these values. `directory` makes it a trial that
        saves and reports every `report_images`; without it they are those of a run of its own."""
        overrides = list(self.overrides)
        for key, value in values.items():
            overrides += [f"{path.strip()}={json.dumps(value)}" for path in key.split(",")]
        if directory is not None:
            overrides += [
                f"run.directory={json.dumps(directory)}", f"run.checkpoint_images={self.report_images}",
                f"tracking.log_images={self.report_images}", "tracking.progress=false",
            ]  # fmt: skip
        return config.load(self.config, overrides)

    def rounds(self, images_seen: int) -> int:
        """Reports up to here. Intervals end at whole batches, so images alone would not line up between trials."""
        return max(1, math.ceil(images_seen / self.report_images - 0.5))

    def corners(self) -> list[dict[str, Any]]:
        """Values that span the space: what holds for them holds for the trials, as far as one can know before."""
        ends = {key: (list(v) if kind in ("choice", "grid") else [float(v[0]), float(v[1])]) for key, how in self.space.items() for kind, v in how.items()}  # fmt: skip
        first = {key: values[0] for key, values in ends.items()}
        return (
            [first]
            + [first | {key: value} for key, values in ends.items() for value in values[1:]]
            + [{key: values[-1] for key, values in ends.items()}]
        )

    def draw(self) -> list[dict[str, Any]]:
        """The values of all trials of `random` and `grid`, and the first of `pbt`: a function of the spec alone, so that a
        sweep that starts again has the same ones."""
        chance = random.Random(self.seed)
        grids = {key: how["grid" if "grid" in how else "choice"] for key, how in self.space.items() if "grid" in how or self.search == "grid"}  # fmt: skip
        drawn = []
        for _ in range(self.trials):
            for point in itertools.product(*grids.values()):
                values = dict(zip(grids, point))
                for key, how in self.space.items():
                    if key not in values:
                        values[key] = draw_one(chance, how)
                drawn.append({key: values[key] for key in self.space})
        return drawn


def draw_one(chance: random.Random, how: dict[str, list[Any]]) -> Any:
    kind, values = next(iter(how.items()))
    if kind == "uniform":
        return chance.uniform(*values)
    if kind == "loguniform":
        return math.exp(chance.uniform(math.log(values[0]), math.log(values[1])))
    return chance.choice(values)


def load(path: str, overrides: list[str] = []) -> Spec:
    """Read and check a sweep. Raises ConfigError in one sentence: also for a setting that runs do not have."""
    try:
        with fsspec.open(path, "r") as file:
            tree = OmegaConf.create(file.read())
        if overrides:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(tree, resolve=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); see configs/sweeps"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: holds no sweep; see configs/sweeps/betas_digits.yaml for an example")
    try:
        spec = Spec.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(item) for item in error.errors())) from None
    for values in spec.corners():
        try:
            settings = spec.settings(values)
        except ConfigError as error:
            raise ConfigError(
                f"space: {error}" if str(error).partition(":")[0] in " ".join(spec.keys) else str(error)
            ) from None
        settings.passes(spec.workers)
    if settings.run.storage_options or settings.data.storage_options:
        raise ConfigError("run.storage_options: a sweep keeps what trials were told; give credentials by --env instead")
    return spec


def in_full(spec: Spec) -> Spec:
    """The same sweep with its local paths as seen from here: trials run in other folders."""

    def full(value: Any) -> Any:
        return paths.in_full(value) if isinstance(value, str) else value

    told = {key: place for key, place in paths.of(spec.settings(spec.corners()[0])).items() if key != "run.directory"}
    # (data.url in any case: a sweep that was begun when only that was told in full must find itself again.)
    changed = [
        f"{key}={json.dumps(full(place))}" for key, place in told.items() if key == "data.url" or full(place) != place
    ]
    space = {
        key: {kind: [full(value) for value in values] for kind, values in how.items()}
        if any(path.strip() in paths.SETTINGS for path in key.split(","))
        else how
        for key, how in spec.space.items()
    }
    return spec.model_copy(
        update={
            "directory": full(spec.directory), "config": full(spec.config), "overrides": [*spec.overrides, *changed], "space": space,
        }
    )  # fmt: skip


def _sentence(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown in a sweep; known are {', '.join(Spec.model_fields)}"
    if item["type"] == "missing":
        return f"{where}: is missing"
    if len(item["loc"]) > 1 and item["loc"][0] == "space":
        return f"space.{item['loc'][1]}: is written as in {{uniform: [0.1, 1.0]}}, with one of {', '.join(KINDS)}, not {item['input']!r}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"
