"""The driver of `launch.train`: joins the cluster, runs the attempts, tells what happens. Started by launch/train.py."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from launch import cluster, train
from launch.cluster import Need
from launch.run import Limits, Outcome, Run, parse_workers, sizes
from launch.signals import Signals
from launch.supervise import LOST, hear, say_ended
from sivae.config import ConfigError
from sivae.errors import UserError

# Of this process: the one that it takes the place of may have saved checkpoints.
NOTHING_TRAINED = "stopped while nothing was training; run the same command to go on"
SHOWN = {
    "loss_encoder": "enc",
    "loss_decoder": "dec",
    "rec": "rec",
    "kl_real": "kl",
    "kl_gap": "gap",
    "images_per_sec": "images/s",
}


def say(text: str) -> None:
    own = text.startswith(("sivae: ", "train: "))  # a worker's line has its own beginning
    print(text if own else f"launch.train: {text}", file=sys.stderr, flush=True)


class Teller:
    """A line for each report. A checkpoint is published after its metrics were logged, and then named alone."""

    def __init__(self):
        self.told: dict[str, float] = {}

    def __call__(self, metrics: dict[str, float], checkpoint: str | None) -> None:
        named = {} if metrics == self.told else {name.split("/")[-1]: value for name, value in metrics.items()}
        values = ", ".join(f"{short} {named[name]:.4g}" for name, short in SHOWN.items() if name in named)
        self.told = metrics
        say(", ".join(filter(None, (values, checkpoint and f"checkpoint {checkpoint}"))))


def drive(arguments: list[str]) -> int:
    signals = Signals()
    hear()
    options = train.build_parser().parse_intermixed_args(arguments)
    settings = train.check(options)
    count = Path(os.environ[train.FAILURES_FILE]) if train.FAILURES_FILE in os.environ else None
    failures = int(count.read_text() or 0) if count else 0
    numbers = sizes(settings, parse_workers(options.workers))
    if ":" in options.workers:
        rest = [n for n in parse_workers(options.workers) if n not in numbers]
        say(
            f"elastic: {', '.join(map(str, numbers))} workers share the global batch of {settings.schedule.batch_size}"
            + (f" ({', '.join(map(str, rest))} cannot)" if rest else "") + ", which stays the same"
        )  # fmt: skip

    def go() -> Outcome:
        wait_sec = options.wait if failures else 0.0
        cluster.connect(options.address, train.environment(options.env), wait_sec=wait_sec, asked=signals.asked)
        signals.check()
        gpus = settings.run.device == "cuda" or (settings.run.device == "auto" and cluster.has_gpus())
        return Run(
            settings, numbers, Need(options.cpus_per_worker, float(gpus), options.placement),
            Limits(options.wait if options.address else 0.0, options.grow_every, options.max_failures), stop=signals.asked,
            say=say, on_report=Teller(), on_failure=lambda n: count and count.write_text(str(n)), cache_dir=options.cache_dir,
            failures=failures,
        ).go()  # fmt: skip

    outcome = signals.beside(go)
    if outcome.interrupted:
        say(
            f"stopped, checkpoint {outcome.checkpoint} is saved; run the same command to go on"
            if outcome.checkpoint
            else NOTHING_TRAINED
        )
        return train.EXIT_INTERRUPTED
    print(f"{outcome.images_seen:,} images seen; checkpoint {settings.run.directory}/checkpoints/{outcome.checkpoint}")
    if outcome.picture:
        print(f"picture: {outcome.picture}")
    return 0


def main() -> int:
    sys.stdout = cluster.Quiet(sys.stdout)
    code = train.EXIT_ERROR
    try:
        code = _drive_or_tell(sys.argv[1:])
        return code
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        if train.FAILURES_FILE in os.environ:
            say_ended(Path(os.environ[train.FAILURES_FILE]), code)
        cluster.leave()


def _drive_or_tell(arguments: list[str]) -> int:
    """The exit code, after a sentence where it is not one of `drive`."""
    try:
        return drive(arguments)
    except (UserError, ConfigError) as error:
        if "--debug" in arguments:
            raise
        print(f"launch.train: error: {error}", file=sys.stderr)
        return train.EXIT_ERROR
    except KeyboardInterrupt:
        say(NOTHING_TRAINED)
        return train.EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 (a lost cluster shows in many kinds)
        if "--debug" in arguments:
            raise
        import ray

        if isinstance(error, (ray.exceptions.RayError, ConnectionError)):
            print(f"launch.train: lost the cluster ({type(error).__name__})", file=sys.stderr)
            return LOST
        print(
            f"launch.train: error: {type(error).__name__}: {' '.join(str(error).split())[:500]}; --debug shows where",
            file=sys.stderr,
        )
        return train.EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
