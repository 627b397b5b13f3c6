"""Settings that may name files of the machine on which a command is given: workers, trials and jobs run in other folders."""

from __future__ import annotations

import os

from sivae.config import Config

SETTINGS = ("run.directory", "run.init_from", "data.url", "data.cache_dir", "evaluate.data", "evaluate.lpips")


def of(settings: Config) -> dict[str, str]:
    """What is set of SETTINGS and of the detectors' files, by key path."""
    values = {key: getattr(getattr(settings, key.split(".")[0]), key.split(".")[1]) for key in SETTINGS}
    values |= {f"evaluate.detectors.{name}": place for name, place in settings.evaluate.detectors.items()}
    return {key: value for key, value in values.items() if value is not None}


def is_relative(place: str) -> bool:
    """Whether a path depends on the current folder: no URL, nor `digits:`, nor `~`, which is of the node where it is read."""
    return ":" not in place and not place.startswith("~") and not os.path.isabs(place)


def in_full(place: str) -> str:
    """A path as seen from here; what does not depend on that as it is."""
    return os.path.abspath(place) if is_relative(place) else place


def settings_in_full(settings: Config) -> Config:
    """The same settings, which now mean the same in every folder."""
    sections: dict[str, dict] = {"run": {}, "data": {}, "evaluate": {"detectors": {}}}
    for key, value in of(settings).items():
        section, _, name = key.partition(".")
        values = sections[section]
        if name.startswith("detectors."):
            values, name = values["detectors"], name.removeprefix("detectors.")
        values[name] = in_full(value)
    return settings.model_copy(
        update={name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    )
