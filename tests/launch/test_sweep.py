"""`python -m launch.sweep` on a real Ray: bad trials stop early, good weights are copied, an interrupted sweep goes on.

pytest tests/launch/test_sweep.py
"""

import hashlib
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from launch import cluster, run, sweep, sweep_spec, trial
from launch.judge import judge
from launch.sweep_report import Trial, _parallel, read_trials, table, write
from sivae import config, run_directory
from sivae.config import ConfigError
from sivae.data.pack import pack
from sivae.errors import UserError
from sivae.storage import Folder
from tests.launch.conftest import assert_equal, refused, tensors
from tests.processes import ROOT, run_sivae

MODULE = "launch.sweep"


@pytest.fixture
def spec_file(cache_dir, tmp_path):
    """Write a sweep over small runs on digits, reports every 160 images; returns its path."""

    def write(space: dict, *overrides: str, total: int = 640, **settings) -> str:
        tree = {
            "config": str(ROOT / "configs" / "digits.yaml"),
            "overrides": [
                f"schedule.total_images={total}", f"tracking.picture_images={total}", "model.channels=[8,16]", "model.latent_dim=4",
                "data.num_workers=0", f"data.cache_dir={cache_dir}", *overrides,
            ],
            "directory": str(tmp_path / "sweep"), "metric": "frechet_pixels", "report_images": 160, "judge_images": 200, "space": space,
        } | settings  # fmt: skip
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return write


def trials(tmp_path) -> list:
    return read_trials(Folder(str(tmp_path / "sweep")))


def test_asha_stops_bad_trials_and_the_best_trains(start, spec_file, tmp_path, nothing_left):
    """Two learning rates that learn and one that does not, walked as a grid, two at a time."""
    rates = [1e-3, 8e-4, 1e-9]
    path = spec_file({"encoder_optimizer.lr,decoder_optimizer.lr": {"grid": rates}}, search="grid", scheduler="asha",
                     asha={"grace_rounds": 1, "reduction_factor": 2.0})  # fmt: skip
    process = start(MODULE, [path])
    assert process.wait(300) == 0, process.text
    found = {trial.values["encoder_optimizer.lr,decoder_optimizer.lr"]: trial for trial in trials(tmp_path)}
    assert set(found) == set(rates)
    assert found[1e-3].images_seen == 640, "a good trial runs to its end"
    assert found[1e-9].images_seen < 640, "a bad trial does not"
    assert max(found[rate].last("frechet_pixels") for rate in (1e-3, 8e-4)) < found[1e-9].last("frechet_pixels")
    sweep = tmp_path / "sweep"
    best = config.load(str(sweep / "best.yaml"))
    assert best.encoder_optimizer.lr == best.decoder_optimizer.lr in (1e-3, 8e-4)
    assert best.run.checkpoint_images == config.load("configs/digits.yaml").run.checkpoint_images, (
        "of a run, not of a trial"
    )
    done = run_sivae(
        ["train", str(sweep / "best.yaml"), f"run.directory={tmp_path / 'run'}", "schedule.total_images=96"]
    )
    assert done.returncode == 0, done.stderr
    assert (sweep / "table.md").read_text().count("\n| ") == 4 and "stopped early" in process.text
    for name in ("metric.png", "parallel.png"):
        picture = np.asarray(Image.open(sweep / name).convert("L"))
        assert picture.shape[0] > 400 and picture.std() > 5, f"{name} is empty"
    check_hparams(sweep / "tensorboard", trials=3)


def check_hparams(folder, trials: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    logs = list(folder.iterdir())
    assert len(logs) == trials
    for log in logs:
        events = EventAccumulator(str(log))
        events.Reload()
        assert events.Scalars("frechet_pixels")
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        data = plugin_data_pb2.HParamsPluginData.FromString(content)
        assert "encoder_optimizer.lr,decoder_optimizer.lr" in data.session_start_info.hparams


def test_pbt_goes_on_from_the_better_trials_state(start, spec_file, head, tmp_path, nothing_left):
    """The worse of two takes the better one's weights and optimizer states (by hash), and trains on from exactly those. A SIGKILL
    when the first of them has come to the exchange changes nothing of that."""
    path = spec_file({"encoder_optimizer.lr,decoder_optimizer.lr": {"loguniform": [1e-4, 2e-3]}}, "run.keep_checkpoints=9", search="pbt",
                     trials=2, pbt={"every_rounds": 2, "quantile": 0.5})  # fmt: skip
    process = start(MODULE, [path, "--address", head.address])
    process.until(lambda: " at 320 images" in process.text, "a trial at the exchange", timeout=300)
    process.popen.kill()
    process.popen.wait()
    process = start(MODULE, [path, "--address", head.address])
    assert process.wait(300) == 0, process.text
    assert "going on with the sweep" in process.text
    assert all([entry["rounds"] for entry in trial.history] == [1, 2, 3, 4] for trial in trials(tmp_path))
    heirs = [trial for trial in trials(tmp_path) if trial.lineage]
    assert len(heirs) == 1 and len(heirs[0].lineage) == 1, "one exchange, none after the end"
    heir, step = heirs[0], heirs[0].lineage[0]
    donor = next(trial for trial in trials(tmp_path) if trial.name == step["trial"] != heir.name)
    at_exchange = {trial.name: trial.history[1]["metrics"]["frechet_pixels"] for trial in (heir, donor)}
    assert at_exchange[donor.name] < at_exchange[heir.name]
    assert step["checkpoint"] in ("000000000320", "000000000320.1"), (
        "the second where the SIGKILL came while it was being saved"
    )
    own, other = (tmp_path / "sweep" / "trials" / trial.name / "checkpoints" for trial in (heir, donor))
    for file in ("weights", "optimizer", "average"):
        here, there = (hashlib.sha256((folder / name / f"{file}.safetensors").read_bytes()).hexdigest()
                       for folder, name in ((own, step["name"]), (other, step["checkpoint"])))  # fmt: skip
        assert here == there, file
    # The same by hand: the donor's checkpoint, the heir's settings.
    assert step["values"] == heir.values != donor.values
    spec = sweep_spec.load(path)
    byhand = tmp_path / "byhand"
    (byhand / "checkpoints").mkdir(parents=True)
    (other / step["checkpoint"]).rename(byhand / "checkpoints" / step["checkpoint"])
    settings = spec.settings(heir.values, str(byhand))
    (tmp_path / "byhand.yaml").write_text(config.dump_yaml(settings))
    done = run_sivae(["train", str(tmp_path / "byhand.yaml")])
    assert done.returncode == 0 and "resuming at 320 images" in done.stderr, done.stderr
    assert_equal(tensors(own.parent, 640), tensors(byhand, 640))
    assert (tmp_path / "sweep" / "settings.png").exists()


def test_interrupted_twice_it_goes_on_with_the_same_trials(start, spec_file, tmp_path, nothing_left):
    """SIGTERM in mid-trial, SIGKILL in mid-trial, after one of a trial's own process, then to the end: the trials are those of the
    spec, their weights those of runs that nobody disturbed."""
    path = spec_file({"objective.beta_kl": {"loguniform": [0.1, 1.0]}}, search="random", trials=2, total=960, seed=5)
    expected = [values["objective.beta_kl"] for values in sweep_spec.load(path).draw()]
    process = start(MODULE, [path])
    process.until(lambda: " at 160 images" in process.text, "a report", timeout=240)
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.text
    assert "run the same command to go on" in process.text and "Traceback" not in process.text
    names = {trial.name for trial in trials(tmp_path)}
    process = start(MODULE, [path])
    process.until(lambda: process.text.count(" images: frechet_pixels") >= 2, "two reports", timeout=240)
    assert "going on with the sweep" in process.text
    process.until(lambda: ": sivae: resuming at" in process.text, "what a trial's worker says", timeout=60)
    next(one for one in process.family() if "ray::ImplicitFunc" in " ".join(one.cmdline())).kill()
    process.until(lambda: " was lost; starting it again, failure 1 of at most 3" in process.text, "its end", timeout=60)
    assert "Traceback" not in process.text, process.text
    process.popen.kill()
    process.popen.wait()
    assert min(trial.images_seen for trial in trials(tmp_path)) < 960, "it was to happen in mid-trial"
    process = start(MODULE, [path])
    assert process.wait(300) == 0, process.text
    found = trials(tmp_path)
    assert names <= {trial.name for trial in found} and len(found) == 2
    assert sorted(trial.values["objective.beta_kl"] for trial in found) == sorted(expected)
    assert all([entry["rounds"] for entry in trial.history] == list(range(1, 7)) for trial in found)
    disturbed = next(trial for trial in found if trial.name in names)
    done = run_sivae(["train", *_by_hand(path, disturbed.values, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert_equal(tensors(tmp_path / "sweep" / "trials" / disturbed.name, 960), tensors(tmp_path / "alone", 960))
    # Another spec in the same directory is refused, the same one has nothing left to do.
    other = json.loads(json.dumps(yaml.safe_load(open(path)))) | {"seed": 6}
    open(path, "w").write(yaml.safe_dump(other))
    assert "holds another sweep (seed differs)" in refused(start(MODULE, [path]), MODULE)


def _by_hand(path: str, values: dict, tmp_path) -> list[str]:
    settings = sweep_spec.load(path).settings(values, str(tmp_path / "alone"))
    (tmp_path / "alone.yaml").write_text(config.dump_yaml(settings))
    return [str(tmp_path / "alone.yaml")]


def test_optuna_on_a_metric_of_the_trainer(start, spec_file, head, tmp_path, nothing_left):
    """And whoever edits the config meanwhile changes no trial."""
    edited = tmp_path / "edited.yaml"
    edited.write_bytes((ROOT / "configs" / "digits.yaml").read_bytes())
    space = {"objective.beta_kl": {"loguniform": [0.1, 1.0]}, "model.norm": {"choice": ["group", "layer"]}}
    path = spec_file(space, search="optuna", metric="terms/rec", trials=2, total=160, config=str(edited))
    process = start(MODULE, [path, "--address", head.address])
    process.until(lambda: "trials at a time" in process.text, "room")
    edited.write_text(edited.read_text().replace("beta_neg: 64.0", "beta_neg: 8.0"))
    assert process.wait(240) == 0, process.text
    found = trials(tmp_path)
    assert len(found) == 2 and all(0.1 <= trial.values["objective.beta_kl"] <= 1.0 for trial in found)
    best = config.load(str(tmp_path / "sweep" / "best.yaml"))
    assert best.model.norm in ("group", "layer") and best.objective.beta_neg == 64
    for one in found:
        assert config.load(str(tmp_path / "sweep" / "trials" / one.name / "config.yaml")).objective.beta_neg == 64


def test_failed_trials_are_tried_again_when_the_same_command_runs_again(start, spec_file, head, tmp_path, nothing_left):
    """Both trials fail for want of the data set. With the data set there the same command trains the one, and the other diverges:
    a result, which is not tried again."""
    space = {"objective.beta_rec": {"grid": [1.0e38, 0.5]}, "objective.beta_kl": {"grid": [0.25]}}
    path = spec_file(space, f"data.url={tmp_path / 'set'}", search="grid", metric="terms/rec", total=160)
    arguments = [path, "--address", head.address]
    sentence = refused(start(MODULE, arguments), MODULE)
    assert "all 2 trials failed" in sentence and str(tmp_path / "set") in sentence, sentence
    pack("digits:", str(tmp_path / "set"), resolution=16, num_workers=0, progress=False)
    process = start(MODULE, arguments)
    assert process.wait(240) == 0, process.text
    good, bad = sorted(trials(tmp_path), key=lambda one: one.failed is not None)
    assert good.failed is None and good.values["objective.beta_rec"] == 0.5 and good.images_seen == 160
    assert "non-finite" in bad.failed and not bad.history
    rows = (tmp_path / "sweep" / "table.md").read_text().splitlines()[-2:]
    assert "failed: " not in rows[0] and "| 0 | 0.25 | 1e+38 | failed: " in rows[1], rows
    failure = trial.read_failure(Folder(str(tmp_path / "sweep")).folder("trials", bad.name))
    assert not trial.may_be_mended(failure), "the next start leaves it as it is"


def test_metric_that_never_comes(start, spec_file, head, nothing_left):
    path = spec_file({"objective.beta_kl": {"choice": [0.5, 0.6]}}, metric="terms/fid", metric_patience=2, trials=2,
                     max_concurrent=1, total=64000)  # fmt: skip
    sentence = refused(start(MODULE, [path, "--address", head.address]), MODULE)
    assert "terms/fid was never reported in 2 reports" in sentence and "terms/rec" in sentence


@pytest.mark.parametrize(
    "space, settings, words",
    [
        ({"objective.beta_kk": {"choice": [1.0]}}, {}, ["objective.beta_kk", "unknown setting", "beta_kl"]),
        ({"objective.beta_kl": {"loguniform": [0.0, 1.0]}}, {}, ["space.objective.beta_kl.loguniform", "above 0"]),
        ({"objective.beta_kl": {"uniform": [2.0, 1.0]}}, {}, ["space.objective.beta_kl.uniform", "rise"]),
        ({"objective.beta_kl": {"normal": [0.0, 1.0]}}, {}, ["space.objective.beta_kl", "choice, uniform, loguniform, grid"]),
        ({"objective.beta_kl": {"uniform": [-1.0, 1.0]}}, {}, ["objective.beta_kl", "greater than or equal to 0"]),
        ({"schedule.batch_size": {"choice": [16, 1]}}, {"workers": 2}, ["1 images a step are too few for 2 ranks"]),
        ({"objective.beta_kl": {"choice": [1.0]}}, {"search": "pbt", "trials": 1}, ["trials", "nobody to learn from"]),
        ({"objective.beta_kl": {"choice": [1.0]}}, {"trails": 4}, ["trails", "unknown in a sweep"]),
        ({"objective.beta_kl": {"choice": [1.0]}}, {"mode": "least"}, ["mode", "'min' or 'max'"]),
        ({"objective.beta_kl": {"choice": [1.0]}}, {"directory": "/proc/nothing"}, ["/proc/nothing", "cannot write"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_anything_starts(start, spec_file, nothing_left, space, settings, words):
    sentence = refused(start(MODULE, [spec_file(space, **settings)]), MODULE)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    "how, settings, words",
    [
        ({"choice": []}, {}, "objective.beta_kl.choice: is empty"),
        ({"choice": [1.0], "grid": [1.0]}, {}, "give one of choice, uniform, loguniform, grid, not choice, grid"),
        ({"grid": [1.0]}, {"search": "optuna"}, "`optuna` cannot walk a grid"),
        ({"uniform": [0.0, 1.0]}, {"search": "grid"}, "`grid` needs values to walk"),
        ({"choice": [1.0]}, {"search": "pbt", "trials": 4, "scheduler": "asha"}, "`pbt` schedules by itself"),
        ({"choice": [1.0]}, {"overrides": ["data.storage_options={key: hidden}"]}, "give credentials by --env"),
    ],
)
def test_what_a_sweep_cannot_be_is_refused(spec_file, how, settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        sweep_spec.load(spec_file({"objective.beta_kl": how}, **settings))
    assert "hidden" not in str(caught.value)


def test_more_workers_than_there_is_room_for(start, spec_file, head, nothing_left):
    path = spec_file({"objective.beta_kl": {"choice": [1.0]}}, workers=16)
    sentence = refused(start(MODULE, [path, "--address", head.address]), MODULE)
    assert "a trial needs 16 with 1 CPU each, but the cluster has room for 2" in sentence
    sentence = refused(start(MODULE, [path, "workers=8", "--address", head.address]), MODULE)
    assert "a trial needs 8 with 1 CPU each" in sentence, "nothing was trained: another spec may come"


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["SigCgt"], 16) >> (number - 1) & 1)


def test_a_spec_is_kept_from_the_first_trial_on(spec_file, tmp_path):
    path, folder = spec_file({"objective.beta_kl": {"choice": [1.0]}}), Folder(str(tmp_path / "sweep"))
    first, other = sweep_spec.load(path), sweep_spec.load(path, ["workers=2"])
    base = sweep.read_base(first)
    folder.write(sweep.text_of(first).encode(), sweep.SPEC_FILE)
    sweep.refuse_another(folder, other, base)
    folder.write(b"", sweep.TUNE_FOLDER, sweep.FIRST_FILE)
    sweep.refuse_another(folder, first, b"of a version that kept no copy")
    folder.write(base, sweep.CONFIG_FILE)
    sweep.refuse_another(folder, first, base + b"# a remark")
    with pytest.raises(UserError, match=r"holds another sweep \(workers differs\)"):
        sweep.refuse_another(folder, other, base)
    with pytest.raises(UserError, match=r"holds another sweep \(what .*digits.yaml says differs\)"):
        sweep.refuse_another(folder, first, base.replace(b"beta_neg: 64.0", b"beta_neg: 8.0"))


def test_a_directory_holds_one_sweep_at_a_time(start, spec_file, tmp_path, nothing_left):
    path = spec_file({"objective.beta_kl": {"choice": [1.0]}})
    held = run_directory.lock(Folder(str(tmp_path / "sweep")))
    sentence = refused(start(MODULE, [path]), MODULE)
    held.close()
    assert sentence.endswith("sweep: another sweep works in this directory; wait for it, or set another directory")


@pytest.mark.parametrize("phase", ["while the settings are read", "while Ray starts"])
def test_sigterm_before_the_trials_is_an_interruption_too(start, spec_file, tmp_path, nothing_left, phase):
    if phase == "while Ray starts":
        process = start(MODULE, [spec_file({"objective.beta_kl": {"choice": [1.0]}})])
        process.until(lambda: any("gcs_server" in member.name() for member in process.family()), "a part of Ray")
    else:
        os.mkfifo(tmp_path / "slow.yaml")  # which nobody writes to
        process = start(MODULE, [str(tmp_path / "slow.yaml")])
        process.until(lambda: catches(process.popen.pid, signal.SIGTERM), "a handler of SIGTERM", timeout=30)
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.text
    assert "run the same command to go on" in process.text and "Traceback" not in process.text


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = sweep_spec.load(str(path))
    drawn = spec.draw()
    assert len(drawn) == spec.trials and drawn == spec.draw(), "the trials are a function of the file"
    for values in drawn:
        spec.settings(values)
    with pytest.raises(ConfigError, match="unknown"):
        sweep_spec.load(str(path), ["colour=red"])


def test_values_stay_inside_their_space(spec_file):
    from launch.sweep import within

    spec = sweep_spec.load(
        spec_file({"objective.beta_kl": {"loguniform": [0.1, 1.0]}, "model.norm": {"choice": ["group", "layer"]}})
    )
    assert all(0.1 <= values["objective.beta_kl"] <= 1.0 for values in spec.draw())
    for moved, clipped in ((1.2, 1.0), (0.08, 0.1), (0.5, 0.5)):
        point = {"objective.beta_kl": moved, "model.norm": "layer"}
        assert within(spec)({"point": point}) == {"point": point | {"objective.beta_kl": clipped}}


def test_trials_are_drawn_as_the_file_says(spec_file):
    space = {
        "objective.beta_kl,objective.beta_rec": {"loguniform": [0.01, 100.0]},
        "model.norm": {"grid": ["group", "layer"]},
    }
    spec = sweep_spec.load(spec_file(space, trials=100))
    drawn = spec.draw()
    assert [values["model.norm"] for values in drawn] == ["group", "layer"] * 100, "so often the whole grid"
    small = sum(values["objective.beta_kl,objective.beta_rec"] < 1 for values in drawn)
    assert 70 < small < 130, "half of 200 lie below the geometric mean, with a deviation of 7"
    settings = spec.settings(drawn[0], "trials/one")
    assert settings.objective.beta_kl == settings.objective.beta_rec == drawn[0]["objective.beta_kl,objective.beta_rec"]
    assert settings.run.directory == "trials/one"
    assert settings.run.checkpoint_images == settings.tracking.log_images == spec.report_images == 160
    assert [spec.rounds(images) for images in (16, 192, 288, 320)] == [1, 1, 2, 2], (
        "at ends of whole batches, not always 160"
    )
    assert sweep_spec.load(spec_file(space, trials=100, seed=1)).draw() != drawn
    space["objective.beta_kl"] = {"choice": [0.5, 1.0, 2.0]}
    del space["objective.beta_kl,objective.beta_rec"]
    points = [tuple(values.values()) for values in sweep_spec.load(spec_file(space, search="grid")).draw()]
    assert points == [(norm, beta) for norm in ("group", "layer") for beta in (0.5, 1.0, 2.0)]


def test_local_paths_are_those_of_the_one_who_starts_the_sweep(spec_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["evaluate.data=real", "evaluate.detectors.inception=nets/i.pt#sha256=00", "data.cache_dir=~/cache"]
    space = {
        "run.init_from": {"choice": ["base", "s3://bucket/base", None]},
        "data.url": {"choice": ["set", "digits:"]},
    }
    spec = sweep_spec.in_full(sweep_spec.load(spec_file(space, *overrides, directory="here")))
    assert spec.directory == str(tmp_path / "here")
    assert spec.space["run.init_from"]["choice"] == [str(tmp_path / "base"), "s3://bucket/base", None]
    assert spec.space["data.url"]["choice"] == [str(tmp_path / "set"), "digits:"]
    settings = spec.settings({"run.init_from": None, "data.url": "digits:"})
    assert (settings.run.init_from, settings.data.url) == (None, "digits:"), "the space comes last"
    assert settings.evaluate.data == str(tmp_path / "real")
    assert settings.evaluate.detectors == {"inception": f"{tmp_path}/nets/i.pt#sha256=00"}
    assert settings.data.cache_dir == "~/cache", "the home directory is that of the node"
    (tmp_path / "run.yaml").write_text((ROOT / "configs" / "digits.yaml").read_text())
    path = spec_file({"objective.beta_kl": {"choice": [1.0]}}, "run.init_from=base", config="run.yaml")
    spec = sweep_spec.in_full(sweep_spec.load(path))
    assert spec.config == str(tmp_path / "run.yaml")
    assert spec.settings({}).run.init_from == str(tmp_path / "base")


def test_trials_of_different_length_all_come_to_their_end(spec_file, tmp_path):
    space = {"schedule.total_images": {"choice": [320, 1280, 640]}}
    folder = Folder(str(tmp_path / "sweep"))
    spec = sweep_spec.load(spec_file(space, search="grid", scheduler="asha"))
    assert sweep.plan(spec, folder, 1)[2]._max_t == 9, "one more than the longest has"
    spec = sweep_spec.load(spec_file(space, search="pbt", trials=2))
    assert sweep.plan(spec, folder, 1)[2].last_round == 8

    def ended(total: int, images: int) -> Trial:
        values, metrics = {"schedule.total_images": total}, {"frechet_pixels": 1.0}
        return Trial(f"{total}", [{"images_seen": images, "values": values, "metrics": metrics}], [], None)

    rows = table(spec, [ended(320, 320), ended(1280, 1280), ended(640, 320)], [])[2:]
    assert ["stopped early" in row for row in rows] == [False, False, True]


def test_the_table_has_the_values_that_a_trial_failed_with(spec_file, tmp_path):
    """Of one whose values had changed since its last report, and of one that had not reported anything."""
    spec = sweep_spec.load(spec_file({"objective.beta_kl": {"uniform": [0.1, 1.0]}}, search="pbt", trials=2))
    changed, silent = (Folder(str(tmp_path / "sweep")).folder("trials", name) for name in ("changed", "silent"))
    report = {"rounds": 1, "images_seen": 160, "values": {"objective.beta_kl": 0.5}, "metrics": {"frechet_pixels": 1.0}}
    changed.write(json.dumps([report]).encode(), trial.HISTORY)
    trial.note_failure(changed, "rec became non-finite", {"objective.beta_kl": 0.625})
    trial.note_failure(silent, "no such file", {"objective.beta_kl": 0.75})
    first, second = trials(tmp_path)
    rows = table(spec, [first], [second])[2:]
    assert (
        "| changed | 1 | 160 | 0.625 | failed: rec" in rows[0] and "| silent | | 0 | 0.75 | failed: no such" in rows[1]
    ), rows
    assert first.values == {"objective.beta_kl": 0.5}, "those of its last report"


def test_a_trial_waits_for_room_that_others_use(monkeypatch):
    """After a node was lost there are more trials than room: those that wait do not fail."""
    free_at = time.monotonic() + 1.0
    monkeypatch.setattr(run.cluster, "nodes", lambda need: [cluster.Node("one", int(time.monotonic() > free_at), 1)])
    demand = SimpleNamespace(met=lambda: False, open=lambda: None)

    def wait(workers: int, queue: bool) -> int:
        limits = run.Limits(wait_sec=0.0, queue=queue)
        return run.Run(None, [workers], cluster.Need(1, 0), limits)._wait(workers, 0.0, demand)

    with pytest.raises(UserError, match="room for 1, of which 1 in use"):
        wait(1, queue=False)
    with pytest.raises(UserError, match="2 are asked for"):
        wait(2, queue=True)
    assert wait(1, queue=True) == 1


@pytest.mark.parametrize(
    "space, words",
    [
        ({"objective.beta_kl": "loguniform(0.1, 1.0)"}, r"space.objective.beta_kl: is written as in \{uniform: \[0.1"),
        ({"objective.beta_kl": {"uniform": 0.5}}, r"space.objective.beta_kl: is written as in \{uniform: \[0.1"),
        ({"objective.beta_kl, tracking.log_images": {"choice": [1, 2]}}, "tracking.log_images is set by the sweep"),
    ],
)
def test_a_space_in_another_form_or_of_what_the_sweep_sets(spec_file, space, words):
    with pytest.raises(ConfigError, match=words):
        sweep_spec.load(spec_file(space))


def test_a_trial_that_tune_could_not_run_is_told():
    from launch.sweep_watch import ended

    assert ended(SimpleNamespace(pickled_error_file=None)) == "could not be run"


def test_every_choice_is_named_in_the_picture(spec_file):
    from matplotlib import pyplot

    spec = sweep_spec.load(spec_file({"model.channels": {"choice": [[8], [8, 8], [8, 16]]}}))
    metrics = {"frechet_pixels": 1.0}
    ranked = [
        Trial(f"{number}", [{"images_seen": 160, "values": values, "metrics": metrics}], [], None)
        for number, values in enumerate(spec.corners())
    ]
    figure = _parallel(pyplot, spec, ranked, {one.name: "k" for one in ranked})
    assert {"[8]", "[8, 8]", "[8, 16]"} <= {text.get_text() for text in figure.axes[0].texts}
    pyplot.close(figure)


def test_the_best_is_the_last_report_of_a_trial_that_did_not_fail(spec_file, tmp_path):
    space = {key: {"choice": values} for key, values in {
        "model.norm": ["group", "layer"], "objective.beta_kl": [0.5], "model.residual": ["intro_vae"],
    }.items()}  # fmt: skip
    spec = sweep_spec.load(spec_file(space, mode="max", metric="terms/rec"))
    folder = Folder(str(tmp_path / "sweep"))
    told = {"good": [9.0, 1.0], "middle": [0.0, 2.0], "bad": [1.0, 3.0], "lost": [1.0, math.nan], "failed": [0.0, 0.0]}
    constant = {"objective.beta_kl": 0.5, "model.residual": "intro_vae"}
    for name, values in told.items():
        reports = [
            {"rounds": number, "images_seen": 160 * number, "metrics": {"terms/rec": -value},
             "values": {"model.norm": "layer" if name == "good" else "group"} | constant}
            for number, value in enumerate(values, 1)
        ]  # fmt: skip
        folder.write(json.dumps(reports).encode(), "trials", name, trial.HISTORY)
    trial.note_failure(folder.folder("trials", "failed"), "rec became non-finite", {"model.norm": "group"} | constant)
    folder.write(b"another life", "tensorboard", "good", "old")
    *rows, best, pictures, log = write(spec, folder)
    assert [row.split()[1] for row in rows[2:]] == ["good", "middle", "bad", "lost", "failed"], rows
    assert ["stopped early" in row for row in rows[2:]] == [True] * 4 + [False]
    assert config.load(str(tmp_path / "sweep" / "best.yaml")).model.norm == "layer"
    assert best.endswith("trials/good") and folder.exists("metric.png") and folder.exists("parallel.png")
    assert "old" not in folder.names("tensorboard", "good")


def test_a_trial_that_was_killed_tells_its_last_checkpoint(tmp_path, monkeypatch):
    """With what was told before it, by the lines of its metrics that a power cut has left whole."""
    folder, told = Folder(str(tmp_path)), []
    folder.write(b"{}", "checkpoints", "000000000320.0", "manifest.json")
    lines = [json.dumps({"images_seen": images, "time": 1.0, "terms/rec": images / 10}) for images in (160, 320, 480)]
    folder.write("\n".join([*lines, '{"images_se']).encode(), "metrics.jsonl")
    killed = trial.Trial("one", {}, None, None, folder, 0.0, None, None)
    monkeypatch.setattr(killed, "_report", lambda *report: told.append(report))
    for known in (None, "000000000160.0", "000000000320.0", "000000000480.0"):
        killed.told = known
        killed._catch_up()
    assert told == [({"terms/rec": 32.0}, "000000000320.0")] * 2


def test_a_run_on_pieces_of_larger_images_is_judged_on_such(small, tmp_path):
    pack("digits:", str(tmp_path / "set"), resolution=20, num_workers=0, progress=False)
    arguments = [*small(tmp_path / "run", total=96), f"data.url={tmp_path / 'set'}", "data.random_crop=true"]
    assert run_sivae(["train", *arguments]).returncode == 0
    measured = judge(config.load(arguments[0], arguments[1:]), f"{96:012d}", 200)
    assert all(math.isfinite(value) and value > 0 for value in measured.values()) and len(measured) == 2


def test_the_janitor_of_places_is_told_its_cluster(monkeypatch):
    """Where two Rays run on a machine, Ray's own does not know which is meant, dies, and keeps the places of trials that end early."""
    from ray.train.v2._internal.callbacks import placement_group_callback

    from launch import group

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(group.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:2"))
    placement_group_callback.PlacementGroupCleaner("one", 1.0, 1.0, 1.0)
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:2"
