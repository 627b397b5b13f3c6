"""Commands on sets of images: pack, check, index."""

from __future__ import annotations

import argparse
import os
import re
import time

from sivae.cli import EXIT_ERROR
from sivae.commands.files import require
from sivae.errors import shown

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MAX_LINES = 20  # of a list that is printed


def pack(options: argparse.Namespace) -> None:
    from sivae.data.pack import pack as pack_set

    started_sec = time.monotonic()
    index = pack_set(
        options.source,
        options.dest,
        resolution=options.resolution,
        num_channels=options.num_channels,
        labels=options.labels,
        image_format=options.format,
        quality=options.quality,
        crop=options.crop,
        filter=options.filter,
        samples_per_shard=options.samples_per_shard,
        shard_size_bytes=_bytes(options.shard_size, "--shard-size"),
        splits=options.splits,
        pyramid=options.pyramid,
        skip_bad=options.skip_bad,
        verify=options.verify,
        licence=options.licence,
        num_workers=_workers(options),
    )
    _tell_left_out(index.skipped)
    level = f"/{index.resolution}" if options.pyramid else ""
    url = options.dest.rstrip("/") + level
    print(
        f"{_describe_set(index)}, in {time.monotonic() - started_sec:.0f} s: train with data.url={shown(url)}"
        + (" (or another level of the pyramid)" if level else "")
    )


def check(options: argparse.Namespace) -> int:
    from sivae.data.check import check as check_set

    report = check_set(options.url, split=options.split, num_workers=_workers(options))
    for line in report.findings.lines:
        print(line)
    left = report.findings.count - len(report.findings.lines)
    if left:
        print(f"... and {left:,} more")
    seen = f"{report.num_images:,} images, {_size(report.num_bytes)}, digest {report.digest[:16]}"
    if report.findings.count:
        print(f"{shown(options.url)}: {report.findings.count:,} findings in {seen}; copy or pack the set again")
        return EXIT_ERROR
    unsure = (
        ""
        if report.has_checksums
        else "; the index has no checksums (sivae index --crc makes them), so images were only decoded"
    )
    print(f"{shown(options.url)}: all right, {seen}{unsure}")
    return 0


def index(options: argparse.Namespace) -> None:
    from sivae.data.make_index import folder_of, make_index

    made = make_index(
        options.urls, output=options.output, crc=options.crc, split=options.split, licence=options.licence
    )
    print(f"{_describe_set(made)}: train with data.url={shown(options.output or folder_of(options.urls))}")


def _describe_set(index) -> str:
    classes = f", {index.num_classes} classes" if index.num_classes else ""
    splits = ""
    if len(index.splits) > 1:
        splits = " (" + ", ".join(f"{name} {count:,}" for name, count in index.splits.items()) + ")"
    num_bytes = _size(sum(shard.size_bytes for shard in index.shards))
    channels = "1 channel" if index.num_channels == 1 else f"{index.num_channels} channels"
    return f"{index.count:,} images{splits} of {index.resolution} pixels, {channels}{classes}, {num_bytes}"


def _tell_left_out(skipped: tuple[str, ...]) -> None:
    for line in skipped[:MAX_LINES]:
        print(line.encode("utf-8", "backslashreplace").decode())  # names of files need not be text
    if len(skipped) > MAX_LINES:
        print(f"... and {len(skipped) - MAX_LINES:,} more; the index lists them all under skipped")
    if skipped:
        print(f"{len(skipped):,} images cannot be read and were left out")


def _workers(options: argparse.Namespace) -> int:
    """Processes to use; 0 is this one alone."""
    require(options.workers is None or options.workers >= 0, f"--workers: {options.workers} is negative")
    if options.workers is not None:
        return options.workers
    # The cores that this process may use, where the system can tell
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(num_bytes: int) -> str:
    unit = next((unit for unit in ("TB", "GB", "MB", "kB") if num_bytes >= UNITS[unit]), None)
    return f"{num_bytes / UNITS[unit]:.1f} {unit}" if unit else f"{num_bytes} bytes"


def _bytes(text: str, option: str) -> int:
    """A number of bytes such as 4096, 500MB or 1GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text, re.ASCII)
    factor = {unit.lower(): value for unit, value in UNITS.items()}.get(match[2].lower()) if match else None
    require(factor, f"{option}: {text!r} is no size; give bytes, or a number with kB, MB, GB, KiB, MiB or GiB")
    require(float(match[1]) * factor >= 1, f"{option}: {text!r} is less than a byte")
    return round(float(match[1]) * factor)
