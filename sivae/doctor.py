"""`sivae doctor`: what is installed, which accelerator there is, what bfloat16 gains on it, whether the data and the run directory open, and what to do."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from sivae import __version__, checkpoint, config, run_directory
from sivae.distributed import Group, pick_device
from sivae.errors import UserError, shown
from sivae.storage import Folder

OPTIONAL = {
    "scikit-learn": "digits: needs it: pip install scikit-learn",
    "imagecodecs": "decodes faster than Pillow: pip install 'sivae[codecs]'",
    "av": "decodes KTH's videos: pip install 'sivae[video]'",
    "s3fs": "for s3:// URLs: pip install 'sivae[s3]'",
    "gcsfs": "for gs:// URLs: pip install 'sivae[gcs]'",
    "matplotlib": "for the pictures of sivae ood and toy2d: pip install 'sivae[pictures]'",
    "ray": "for the cluster launchers: pip install 'sivae[cluster]'",
}


def run(path: str | None, overrides: list[str]) -> int:
    """Print one line per finding; 0 when nothing stands in the way of training, else 1."""
    problems = 0

    def line(good: bool | None, text: str) -> None:
        nonlocal problems
        problems += good is False
        print(f"{'ok  ' if good else 'note' if good is None else 'BAD '}  {text}")

    line(
        sys.version_info >= (3, 11),
        f"sivae {__version__}, Python {platform.python_version()}, {os.cpu_count()} CPU cores",
    )
    for name in run_directory.PACKAGES:
        version = run_directory.installed_version(name)
        line(version is not None, f"{name} {version}" if version else f"{name} is missing: pip install {name}")
    for name, purpose in OPTIONAL.items():
        version = run_directory.installed_version(name)
        line(True if version else None, f"{name} {version}" if version else f"{name} is not installed ({purpose})")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            # Not torch's own answer, which is of the current GPU, and yes where bfloat16 is emulated.
            bfloat16 = bool(torch.version.hip) or properties.major >= 8
            line(
                True,
                f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, bfloat16 {bfloat16}",
            )
    else:
        built = torch.version.cuda or torch.version.hip
        reason = (
            "this torch is built without CUDA" if not built else "torch has CUDA but finds no GPU; look at nvidia-smi"
        )
        line(None, f"no GPU: training runs on the CPU ({reason})")
    try:
        line(None, _precision_advice(product_speeds(pick_device("auto"))))
    except (UserError, RuntimeError) as error:
        line(False, f"the device cannot compute: {error}")
    if path is not None:
        _check_config(path, overrides, line)
    print("nothing stands in the way" if not problems else f"{problems} things to mend")
    return 1 if problems else 0


def product_speeds(device: torch.device) -> dict[str, float]:
    """FLOPs a second of matrix products on the device in each precision, the best of those that a fifth of a second has time for.
    They are small on a CPU, as some take a hundred times longer over bfloat16."""
    size, together = (4096, 8) if device.type == "cuda" else (256, 1)
    factors = {
        name: torch.randn(size, size, device=device).to(getattr(torch, name)) for name in ("float32", "bfloat16")
    }
    spent: dict[str, list[float]] = {name: [] for name in factors}
    for _ in range(50):
        for name, factor in factors.items():
            # The first on a GPU also loads the library and its kernels.
            if len(spent[name]) > 1 and sum(spent[name]) > 0.1:
                continue
            start = time.perf_counter()
            for _ in range(together):
                product = factor @ factor
            product[0, 0].item()  # waits for the device
            spent[name].append(time.perf_counter() - start)
    return {name: together * 2 * size**3 / min(seconds) for name, seconds in spent.items()}


def _precision_advice(speeds: dict[str, float]) -> str:
    """A CPU may name bfloat16 among its instructions and yet be slower with it."""
    ratio = speeds["bfloat16"] / speeds["float32"]
    advice = "is worth trying" if ratio > 1.1 else "saves memory, but no time" if ratio > 0.9 else "costs time here"
    return f"products run {ratio:.2g} times as fast in bfloat16 as in float32: engine.precision=bfloat16 {advice}"


def _check_config(path: str, overrides: list[str], line) -> None:
    """What a run looks at when it starts, up to its first step."""
    from sivae.background import Background
    from sivae.evaluator import Evaluator
    from sivae.levels import Levels
    from sivae.state import initial_tensors

    try:
        settings = config.load(path, overrides)
    except config.ConfigError as error:
        line(False, str(error))
        return
    line(True, f"{path}: valid, global batch {settings.schedule.batch_size}, {settings.schedule.total_images:,} images")
    alone = Group(0, 1, torch.device("cpu"), None)
    folder = Folder(settings.run.directory, settings.run.storage_options)

    def directory() -> str:
        run_directory.check_place(folder)
        found = checkpoint.read_newest(folder, report=lambda text: line(None, text), files=())
        if found is None:
            return f"run.directory {settings.run.directory}: can be written; no checkpoint yet"
        run_directory.check_model(found.state.get("model"), settings, folder.url)
        return f"run.directory {settings.run.directory}: can be written; resumes from checkpoint {found.name}"

    def data() -> str:
        for stream in Levels(settings, alone).streams:
            stream.sample([0, len(stream) - 1])
        return f"data.url {shown(settings.data.url)}: {len(stream):,} images, the first and the last can be read"

    def initial() -> str:
        initial_tensors(settings)
        return f"run.init_from {shown(settings.run.init_from)}: fits"

    def judging() -> str:
        Evaluator(settings, alone, folder, Background(alone))
        return f"evaluate: {', '.join(settings.evaluate.metrics)} can be computed"

    def fine(look: Callable[[], Any], key: str) -> bool:
        try:
            told = look()
        except (UserError, config.ConfigError) as error:
            names_a_setting = re.match(r"[a-z_]+(\.[a-z_]+)+: ", str(error))
            line(False, str(error) if names_a_setting else f"{key}: {error}")
            return False
        if isinstance(told, str):
            line(True, told)
        return True

    fine(lambda: pick_device(settings.run.device), "run.device")
    fine(directory, "run.directory")
    if settings.run.init_from:
        fine(initial, "run.init_from")
    if fine(data, "data.url") and settings.evaluate.every_images:
        fine(judging, "evaluate")
