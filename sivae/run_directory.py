"""A run directory: the resolved settings, what they ran on, and the check that it is this model's."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from sivae import __version__, config
from sivae.errors import UserError, differences, shown
from sivae.inference import SETTINGS_FILE
from sivae.storage import Folder

logger = logging.getLogger("sivae")
PACKAGES = (
    "torch",
    "deepspeed",
    "webdataset",
    "numpy",
    "safetensors",
    "pydantic",
    "omegaconf",
    "fsspec",
    "tensorboard",
    "pillow",
)


def record(folder: Folder, settings: config.Config, world_size: int) -> None:
    """Write config.yaml and environment.json. The settings of an earlier start stay where they differ, as
    config-YYYYMMDD-HHMMSS.yaml.
    """
    text = config.dump_yaml(settings)
    if folder.exists("config.yaml"):
        before = folder.read("config.yaml")
        if before.decode() != text:
            folder.write(before, f"config-{time.strftime('%Y%m%d-%H%M%S')}.yaml")
    folder.write(text.encode(), "config.yaml")
    folder.write(json.dumps(environment(world_size), indent=1).encode(), "environment.json")


def check_place(folder: Folder) -> None:
    """Raise UserError unless a run can be kept there."""
    folder.try_writing()
    if folder.exists(SETTINGS_FILE):
        raise UserError(
            f"{folder.url}: holds an exported model ({SETTINGS_FILE}), which all commands would take in place of the run's"
            " checkpoints; set another run.directory"
        )


def check_model(model: dict[str, Any] | None, settings: config.Config, where: str) -> None:
    """Raise UserError unless a checkpoint's model settings are those of this run."""
    ours = settings.model.model_dump(mode="json")
    if model == ours:
        return
    raise UserError(
        f"{where}: holds checkpoints of another model ({differences(model or {}, ours)}); set another run.directory, or the model's settings as they were"
    )


def environment(world_size: int) -> dict[str, Any]:
    """Versions, git commit, machine and command line."""
    return {
        "sivae": __version__,
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "machine": platform.machine(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ranks": world_size,
        "command": [_without_secret(argument) for argument in sys.argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def lock(folder: Folder, who: str = "run", setting: str = "run.directory") -> IO | None:
    """Hold a local run directory until the process ends, also by SIGKILL. Raises UserError when another run holds it.

    `who` and `setting`: what works there and what names the place, in that sentence.

    Two runs in one directory would mix their checkpoints. An object store has no locks; None there.
    """
    if not folder.is_local:
        return None
    try:
        os.makedirs(folder.path, exist_ok=True)
        file = open(os.path.join(folder.path, ".lock"), "w")
    except OSError as error:
        raise UserError(f"{folder.url}: cannot be written ({error.strerror}); set another {setting}") from None
    try:
        # Not flock: that lock would live on in the data workers of a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"{folder.url}: another {who} works in this directory; wait for it, or set another {setting}"
        ) from None
    except OSError as error:  # some network filesystems have no locks
        logger.debug("%s cannot be locked: %s", folder.url, error)
    return file


def _without_secret(argument: str) -> str:
    """A command-line argument as it may be kept."""
    key, equals, _ = argument.partition("=")
    return f"{key}=..." if equals and "storage_options" in key else shown(argument)


def _git(*arguments: str) -> str | None:
    """Of the checkout that the code runs from; None when it is no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
