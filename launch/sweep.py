"""`python -m launch.sweep configs/sweeps/NAME.yaml [key=value ...]`: Ray Tune over any settings of a run, by key path.

Each trial is a training group of its own with its own GPUs. Interrupted (Ctrl-C, SIGTERM, SIGKILL) the sweep goes on when the
same command runs again; trials that failed, but for those that diverged, are then tried again. In the end the sweep's directory
holds table.md, best.yaml (which `sivae train` takes as it is), TensorBoard logs with the settings as hparams, and pictures.
launch/sweep_spec.py says what the file may hold.

Exit codes: 0 done, 1 something is wrong (one sentence on stderr), 2 wrong arguments, 75 interrupted.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import yaml

from launch import cluster, sweep_spec
from launch.signals import Signals
from launch.sweep_spec import Spec
from launch.train import EXIT_ERROR, EXIT_INTERRUPTED, environment
from sivae import startup
from sivae.config import ConfigError
from sivae.errors import UserError
from sivae.storage import Folder

SPEC_FILE, CONFIG_FILE, TUNE_FOLDER = "sweep.yaml", "base.yaml", "tune"
FIRST_FILE = "tuner.pkl"  # of Tune's: before it is there, no trial has started


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("sweep", help="YAML file; path or URL")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace what the file says, e.g. trials=4")
    parser.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS"),
        help="host:port of a Ray cluster whose node this is; without it, and without RAY_ADDRESS, this machine alone",
    )  # fmt: skip
    parser.add_argument("--cache-dir", help="folder on every node's own disk for caches")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="environment variable for all trials"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def say(text: str) -> None:
    print(f"launch.sweep: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_intermixed_args(arguments)
    sys.stdout = cluster.Quiet(sys.stdout)
    try:
        return sweep(options)
    except (UserError, ConfigError) as error:
        if options.debug:
            raise
        print(f"launch.sweep: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        say("stopped; run the same command to go on")
        return EXIT_INTERRUPTED
    finally:
        cluster.leave()


def sweep(options: argparse.Namespace) -> int:
    signals = Signals()
    spec = sweep_spec.in_full(sweep_spec.load(options.sweep, options.overrides))
    settings = spec.settings(spec.corners()[0])
    variables = environment(options.env)
    folder = Folder(spec.directory)
    with hold(folder):
        base = read_base(spec)
        refuse_another(folder, spec, base)
        signals.beside(lambda: cluster.connect(options.address, variables, dashboard=True))
        signals.check()
        gpus = float(settings.run.device == "cuda" or (settings.run.device == "auto" and cluster.has_gpus()))
        together = concurrency(spec, gpus)
        folder.write(text_of(spec).encode(), SPEC_FILE)
        # Trials begin for days, and on other nodes: the file that they vary is the one of now.
        folder.write(base, CONFIG_FILE)
        spec = spec.model_copy(update={"config": f"{folder.url}/{CONFIG_FILE}"})
        tune_trials(spec, folder, gpus, together, options.cache_dir, signals)
        signals.check()
        from launch import sweep_report

        for line in sweep_report.write(spec, folder):
            print(line)
    return 0


@contextmanager
def hold(folder: Folder) -> Iterator[None]:
    """Keep the sweep's directory to this process. Raises UserError when another sweep works there, or it cannot be written."""
    folder.try_writing()
    with startup.importing():
        from sivae import run_directory  # and with it torch
    held = run_directory.lock(folder, "sweep", "directory")
    try:
        yield
    finally:
        if held is not None:
            held.close()


def text_of(spec: Spec) -> str:
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def read_base(spec: Spec) -> bytes:
    """The file that every trial varies."""
    with fsspec.open(spec.config) as file:
        return file.read()


def refuse_another(folder: Folder, spec: Spec, base: bytes) -> None:
    """Raises UserError when trials of another sweep are in the directory, or of one that varied another `base`."""
    if not (folder.exists(SPEC_FILE) and folder.exists(TUNE_FOLDER, FIRST_FILE)):
        return
    before, now = yaml.safe_load(folder.read(SPEC_FILE)), spec.model_dump(mode="json")
    different = [key for key in now if before.get(key) != now[key]]
    # (A sweep of an earlier version has no copy.)
    if folder.exists(CONFIG_FILE) and yaml.safe_load(folder.read(CONFIG_FILE)) != yaml.safe_load(base):
        different.append(f"what {spec.config} says")
    if different:
        raise UserError(
            f"directory: {folder.url} holds another sweep ({', '.join(different)} {'differs' if len(different) == 1 else 'differ'}); set another directory, or"
            " undo the change to go on with that one"
        )


def concurrency(spec: Spec, gpus: float) -> int:
    """Trials at a time. Trials beyond it wait without holding anything, and a trial gets all its workers or none: no number of
    trials can lock each other out."""
    need = cluster.Need(spec.cpus_per_worker, gpus)
    found = cluster.nodes(need)
    room = cluster.most_ever(need) or need.most([node.total for node in found])
    if room < spec.workers:
        raise UserError(
            f"workers: a trial needs {spec.workers} with {need} each, but the cluster has room for {room}; lower workers"
        )
    together = min(room // spec.workers, spec.max_concurrent or room)
    say(
        f"{together} trials at a time, {spec.workers} workers each with {need}; the cluster has room for {room} workers"
    )
    return together


def tune_trials(
    spec: Spec, folder: Folder, gpus: float, together: int, cache_dir: str | None, signals: Signals
) -> None:
    """Start the trials, or go on with them, to their end or until a signal comes. Raises UserError when none can succeed."""
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # what a SIGKILL may cost
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else it prints tables of its own
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # tracebacks; they are kept in its own folder
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that fails at once reports nothing
    import logging

    from ray import tune

    from launch import sweep_watch, trial
    from launch.board import open_board

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Consider boosting PBT performance")
    random.seed(spec.seed)  # population based training draws from the module's own
    from numpy import random as numpy_random

    numpy_random.seed(spec.seed)
    # Drivers of trials take no CPU slot, and stay on the head node, which is not taken away.
    board = open_board()
    trainable = tune.with_resources(
        tune.with_parameters(trial.run, spec=spec, gpus=gpus, cache_dir=cache_dir, board=board),
        {"node:__internal_head__": 1e-4},
    )
    watch, stop = sweep_watch.Watch(spec, folder), sweep_watch.Stop()
    sweep_watch.boards.append(board)
    sweep_watch.stops.append(signals.asked)
    where = dict(storage_path=folder.path if folder.is_local else folder.join())
    if not folder.is_local:
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        where["storage_filesystem"] = PyFileSystem(FSSpecHandler(folder.fs))
    path = f"{where['storage_path']}/{TUNE_FOLDER}"
    restorable = tune.Tuner.can_restore(path, storage_filesystem=where.get("storage_filesystem"))
    space, search, scheduler, samples = plan(spec, folder, together)
    if restorable:
        say(f"going on with the sweep in {folder.url}")
        tuner = tune.Tuner.restore(
            path, trainable=trainable, resume_unfinished=True, param_space=space,
            storage_filesystem=where.get("storage_filesystem"),
        )  # fmt: skip
        # Ours know this process; what was saved of the other's is not asked.
        tuner._local_tuner._run_config.callbacks = [watch]
        tuner._local_tuner._run_config.stop = stop
        tuner._local_tuner._tune_config.scheduler = scheduler
    else:
        tuner = tune.Tuner(
            trainable, param_space=space,
            tune_config=tune.TuneConfig(
                metric=spec.metric, mode=spec.mode, search_alg=search, scheduler=scheduler, num_samples=samples,
                max_concurrent_trials=None if search is not None else together, reuse_actors=False,
                trial_name_creator=lambda one: one.trial_id, trial_dirname_creator=lambda one: one.trial_id,
            ),
            run_config=tune.RunConfig(
                name=TUNE_FOLDER, **where, verbose=0, callbacks=[watch], stop=stop,
                # Losing the head node's process is the one fault that a trial does not survive by itself.
                failure_config=tune.FailureConfig(max_failures=spec.max_failures),
            ),
        )  # fmt: skip
    signals.check()
    tuner.fit()
    watch.listen()
    if sweep_watch.fatal:
        raise UserError(sweep_watch.fatal[0])


def plan(spec: Spec, folder: Folder, together: int) -> tuple[dict, Any, Any, int]:
    """Tune's parameter space, search, scheduler and number of samples."""
    from ray import tune

    from launch import sweep_watch

    # The longest trial's, where they are not all as long.
    last = max(spec.rounds(spec.settings(values).schedule.total_images) for values in spec.corners())
    domains = {key: domain(how) for key, how in spec.space.items()}
    again = dict(folder=folder, together=together)
    scheduler = sweep_watch.InOrder(**again)
    if spec.scheduler == "asha":
        scheduler = sweep_watch.Halving(
            **again,
            time_attr="rounds",
            max_t=last + 1,
            grace_period=spec.asha.grace_rounds,
            reduction_factor=spec.asha.reduction_factor,
        )
    if spec.search == "pbt":
        scheduler = sweep_watch.Exchange(
            **again, last_round=last,
            time_attr="rounds", perturbation_interval=spec.pbt.every_rounds, quantile_fraction=spec.pbt.quantile,
            resample_probability=spec.pbt.resample, synch=True, log_config=False,
            hyperparam_mutations={"point": {key: getattr(d, "categories", d) for key, d in domains.items()}},
            custom_explore_fn=within(spec),
        )  # fmt: skip
    if spec.search == "optuna":
        import optuna
        from ray.tune.search import ConcurrencyLimiter
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return {"point": domains}, ConcurrencyLimiter(OptunaSearch(seed=spec.seed), together), scheduler, spec.trials
    # All points are drawn before: a sweep that starts again has the same trials.
    return {"point": tune.grid_search(spec.draw())}, None, scheduler, 1


def domain(how: dict[str, list[Any]]) -> Any:
    from ray import tune

    kind, values = next(iter(how.items()))
    return (
        {"uniform": tune.uniform, "loguniform": tune.loguniform}[kind](*values)
        if kind in ("uniform", "loguniform")
        else tune.choice(values)
    )


def within(spec: Spec):
    """Multiplying by 1.2 must not lead out of the space."""
    bounds = {key: (kind, values) for key, how in spec.space.items() for kind, values in how.items()}

    def one(key: str, value: Any) -> Any:
        kind, values = bounds[key]
        return min(max(value, values[0]), values[1]) if kind in ("uniform", "loguniform") else value

    return lambda config: config | {"point": {key: one(key, value) for key, value in config["point"].items()}}


if __name__ == "__main__":
    sys.exit(main())
