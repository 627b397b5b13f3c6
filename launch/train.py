"""`python -m launch.train CONFIG [key=value ...] --workers N`: sivae's training on the workers of a Ray cluster.

This process checks what can be checked and then only watches over the driver, a process of its own (launch/driver.py), which it
starts again when that is lost. Stopping it (SIGTERM, Ctrl-C) saves a checkpoint; running the same command again goes on.

Exit codes: 0 done, 1 something is wrong (one sentence on stderr), 2 wrong arguments, 75 stopped with a checkpoint saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from launch import paths
from launch.supervise import supervise
from sivae import config
from sivae.config import Config, ConfigError
from sivae.errors import UserError

EXIT_ERROR, EXIT_INTERRUPTED = 1, 75
FAILURES_FILE = "SIVAE_LAUNCH_FAILURES"  # where driver and watcher keep the count of failures


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", help="YAML file; path or URL")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")
    add_run_options(parser)
    parser.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS"),
        help="host:port of a Ray cluster whose node this is; without it, and without RAY_ADDRESS, this machine alone",
    )  # fmt: skip
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="environment variable for all workers; without a value, as it is here",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that `launch.submit` hands on as they are."""
    parser.add_argument(
        "--workers", default="1", metavar="N or MIN:MAX",
        help="one worker per GPU, or per CPU slot; a range is elastic: it goes on with what is left and grows again",
    )  # fmt: skip
    parser.add_argument(
        "--placement", default="pack", choices=["pack", "spread", "strict_pack", "strict_spread"],
        help="pack (default) fills a node before the next, for the fast links inside it; spread shares out memory and disks",
    )  # fmt: skip
    parser.add_argument("--cpus-per-worker", type=float, default=1.0, metavar="N", help="CPU slots of a worker")
    parser.add_argument(
        "--max-failures", type=int, default=8, metavar="N",
        help="lost workers, nodes and drivers after which it gives up; -1 never (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--wait", type=float, default=60.0, metavar="SEC", help="how long to wait for room (default %(default)s)"
    )
    parser.add_argument(
        "--grow-every", type=float, default=30.0, metavar="SEC",
        help="elastic: how often to look for room for more workers (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-dir", help="folder on every node's own disk for caches (default: $SIVAE_CACHE or in /tmp)"
    )


def load(options: argparse.Namespace) -> Config:
    """The settings, with local paths as seen from here: workers may have another current directory."""
    return paths.settings_in_full(config.load(options.config, options.overrides))


def environment(pairs: list[str]) -> dict[str, str]:
    """`NAME=VALUE` and `NAME` as variables. Raises UserError when a name has no value here."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or (not equals and name not in os.environ):
            raise UserError(f"--env: {name or pair} is not set here; give it as NAME=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def check(options: argparse.Namespace) -> Config:
    """All that can be refused before anything starts."""
    from launch.run import parse_workers, sizes

    settings = load(options)
    sizes(settings, parse_workers(options.workers))
    environment(options.env)
    if options.cpus_per_worker <= 0:
        raise UserError(f"--cpus-per-worker: {options.cpus_per_worker:g} is not a number of CPU slots")
    return settings


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_intermixed_args(arguments)
    try:
        check(options)
    except (UserError, ConfigError) as error:
        if options.debug:
            raise
        print(f"launch.train: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    with tempfile.TemporaryDirectory(prefix="sivae-launch-") as folder:
        count = Path(folder) / "failures"
        count.write_text("0")
        return supervise(
            [sys.executable, "-m", "launch.driver", *arguments], count, options.max_failures,
            environment={FAILURES_FILE: str(count)}, say=lambda line: print(f"launch.train: {line}", file=sys.stderr),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
