"""What Ray Tune calls while a sweep runs. A module of its own: Tune saves these objects, and reads them in another process."""

from __future__ import annotations

import pickle
import signal
import sys
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from launch.sweep_spec import Spec
from launch.trial import may_be_mended, note_failure, read_failure
from sivae.errors import UserError
from sivae.storage import Folder

LISTEN_SEC = 1.0
fatal: list[str] = []  # why no trial of this process's sweep can succeed
boards: list[Any] = []  # where the trials of this process's sweep leave word
stops: list[threading.Event] = []  # set when somebody asks this process's sweep to stop


def say(text: str) -> None:
    print(f"launch.sweep: {text}", file=sys.stderr, flush=True)


class Watch(TrialProgressCallback):
    """Tells a person what happens, in place of Tune's own account, and notices when no trial can succeed."""

    def __init__(self, spec: Spec, folder: Folder):
        super().__init__()
        self.spec, self.folder = spec, folder
        self.numbers: dict[str, int] = {}
        self.next_look = 0.0

    def number(self, trial) -> int:
        return self.numbers.setdefault(trial.trial_id, len(self.numbers) + 1)

    def on_trial_start(self, iteration, trials, trial, **info):
        for one in sorted(trials, key=lambda other: other.trial_id):  # the same after an interruption
            self.number(one)
        say(f"trial {self.number(trial)} ({trial.trial_id}) starts: {shown(trial.config['point'])}")

    def on_step_begin(self, iteration, trials, **info):
        if any(stop.is_set() for stop in stops):
            signal.raise_signal(signal.SIGUSR1)  # of which Tune hears: then it saves its state and ends the trials

    def on_step_end(self, iteration, trials, **info):
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + LISTEN_SEC
            self.listen()

    def listen(self):
        """Tell what the trials have left on the board."""
        for board in boards:
            try:
                lines = ray.get(board.news.remote(), timeout=30).lines
            except RayError:
                continue
            for line in lines:
                trial_id, _, text = line.partition(" ")
                say(f"trial {self.numbers[trial_id]}: {text}")

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if self.spec.metric in result:
            say(
                f"trial {self.number(trial)} at {result['images_seen']:,} images: {self.spec.metric} {result[self.spec.metric]:.5g}"
            )

    def on_trial_complete(self, iteration, trials, trial, **info):
        failed = read_failure(self.folder.folder("trials", trial.trial_id))
        if failed is not None:
            say(f"trial {self.number(trial)} failed: {failed['sentence']}")
            if failed["all"]:
                fatal.append(failed["sentence"])

    def on_trial_recover(self, iteration, trials, trial, **info):
        failures = f"failure {trial.run_metadata.num_failures} of at most {self.spec.max_failures}"
        say(f"trial {self.number(trial)} {ended(trial)}; starting it again, {failures}")

    def on_trial_error(self, iteration, trials, trial, **info):
        sentence = f"{ended(trial)}, more often than max_failures allows"
        say(f"trial {self.number(trial)} {sentence}")
        note_failure(self.folder.folder("trials", trial.trial_id), f"the trial {sentence}", trial.config["point"])


def ended(trial: Trial) -> str:
    """How a trial's process ended when it left no word in the trial's folder, as a clause."""
    if trial.pickled_error_file is None:  # Tune writes down what came from the trial's process, not what it met itself
        return "could not be run"
    with open(trial.pickled_error_file, "rb") as file:
        error = pickle.load(file)
    if isinstance(error, RayActorError):
        return "was lost"
    cause = error.cause if isinstance(error, RayTaskError) else error
    kind = "" if isinstance(cause, UserError) else f"{type(cause).__name__}: "
    return f"ended with {kind}{' '.join(str(cause).split())[:500]}"


class Stop(Stopper):
    """Ends the sweep when no trial can succeed."""

    def __call__(self, trial_id, result):
        return False

    def stop_all(self):
        return bool(fatal)


class Again:
    """What all schedulers of a sweep do besides: when it starts again, trials that failed for a reason that somebody may have
    mended are tried again, and those that were lost too often. Tune takes the first for ended and would start all of the second
    at once. Here they wait, paused, until fewer than `together` trials run."""

    def __init__(self, *arguments, folder: Folder, together: int, **options):
        super().__init__(*arguments, **options)
        self.folder, self.together = folder, together

    def on_trial_add(self, controller, trial):
        super().on_trial_add(controller, trial)
        if not trial.is_finished():
            return
        # So it was read from the disk.
        failure = read_failure(self.folder.folder("trials", trial.trial_id))
        if trial.status == Trial.ERROR or (failure is not None and may_be_mended(failure)):
            trial.run_metadata.num_failures = 0
            trial.set_status(Trial.PAUSED)
            controller.get_live_trials().add(trial)

    def choose_trial_to_run(self, controller):
        chosen = super().choose_trial_to_run(controller)
        if chosen is not None and chosen.status == Trial.PAUSED:
            busy = sum(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in controller.get_trials())
            return chosen if busy < self.together else None
        return chosen


class InOrder(Again, FIFOScheduler):
    """Lets every trial finish."""


class Halving(Again, ASHAScheduler):
    """Stops bad trials early."""


class Exchange(Again, PopulationBasedTraining):
    """Ray's, without an exchange after the last report, which nobody would train on from, and with its place in the sweep found
    again after an interruption, which Ray forgets: it would exchange at the next report, whenever that comes."""

    def __init__(self, *arguments, last_round: int, **options):
        super().__init__(*arguments, **options)
        self.last_round = last_round
        self.caught_up = False

    def on_trial_result(self, controller, trial, result):
        if result["rounds"] >= self.last_round:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)

    def choose_trial_to_run(self, controller):
        if not self.caught_up:
            self._catch_up(controller)
            self.caught_up = True
        return super().choose_trial_to_run(controller)

    def _catch_up(self, controller) -> None:
        """The exchange that comes next is the first that not all trials have come to; who has waits there."""
        rounds = {trial: trial.last_result.get("rounds", 0) for trial in controller.get_live_trials()}
        interval = self._perturbation_interval
        self._next_perturbation_sync = (min(rounds.values(), default=0) // interval + 1) * interval
        for trial, seen in rounds.items():
            state = self._trial_state[trial]
            state.last_perturbation_time = self._next_perturbation_sync - interval
            if seen:
                self._save_trial_state(state, seen, trial.last_result, trial)
            if seen >= self._next_perturbation_sync:
                controller._set_trial_status(trial, Trial.PAUSED)


def shown(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )
