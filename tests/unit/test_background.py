"""Proves that work in the background is done in order by one thread of rank 0 and not waited for, that its first failure stops
the rest and reaches who trains, and that a run's saves keep to that: a true copy, one at a time, told of once it is published,
finished before the run ends, whatever ends it.

    python -m pytest tests/unit/test_background.py
"""

import gc
import threading
import time
import weakref

import pytest
import torch

from sivae import background, checkpoint, config, distributed, trainer
from sivae.background import Background
from sivae.errors import UserError
from sivae.saver import Saver
from sivae.state import TrainingState
from sivae.storage import Folder
from tests.unit.judged import ALONE

PATIENCE_SEC = 60


@pytest.fixture
def work():
    found = Background(ALONE)
    yield found
    found.close()


class Gate:
    """Something that blocks until it is opened, and knows whether somebody waits at it."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.opened.wait(PATIENCE_SEC)


def test_work_is_done_in_order_and_not_waited_for(work):
    gate, done, threads = Gate(), [], set()
    work.submit(gate)
    for number in range(5):
        work.submit(lambda number=number: (done.append(number), threads.add(threading.get_ident())))
    assert gate.reached.wait(PATIENCE_SEC) and done == []
    gate.opened.set()
    work.wait()
    assert done == [0, 1, 2, 3, 4] and len(threads) == 1 and threads != {threading.get_ident()}


def test_the_first_failure_stops_the_rest_and_is_raised_whenever_asked(work):
    done = []

    def fail(sentence):
        raise UserError(sentence)

    for job in (lambda: done.append(1), lambda: fail("first"), lambda: done.append(2), lambda: fail("second")):
        work.submit(job)
    for look in (work.wait, work.check, work.wait):
        with pytest.raises(UserError, match="first"):
            look()
    assert done == [1] and work.failed
    work.close()


def test_what_waits_is_bounded(work):
    """A storage that does not keep up holds training back before the host's memory is full of pictures."""
    gate = Gate()
    work.submit(gate)
    for _ in range(background.MAX_WAITING - 1):
        work.submit(lambda: None)
    another = threading.Thread(target=work.submit, args=(lambda: None,))
    another.start()
    another.join(0.2)
    assert another.is_alive()
    gate.opened.set()
    another.join(PATIENCE_SEC)
    assert not another.is_alive()


def test_other_ranks_have_no_thread(work):
    other = Background(distributed.Group(1, 2, torch.device("cpu"), None))
    before, done = threading.active_count(), []
    other.submit(lambda: done.append(1))
    other.wait()
    other.close()
    assert threading.active_count() == before and not done


def test_closing_waits_for_what_is_under_way(work):
    done = []
    work.submit(lambda: (time.sleep(0.2), done.append(1)))
    work.submit(lambda: done.append(2))
    work.close()
    assert done == [1, 2]


# A run's saves


@pytest.fixture
def settings(cache_dir, tmp_path):
    def make(*overrides):
        return config.load(
            "configs/digits.yaml",
            [
                f"run.directory={tmp_path / 'run'}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "model.channels=[8,16]",
                "model.latent_dim=4", "schedule.total_images=96", "run.checkpoint_images=32", "run.keep_checkpoints=9",
                "tracking.log_images=16", "tracking.progress=false", "tracking.tensorboard=false", *overrides,
            ],
        )  # fmt: skip

    make.folder = Folder(str(tmp_path / "run"))
    return make


@pytest.fixture
def weights_wait(monkeypatch):
    """The writing of a checkpoint's weights blocks: returns the gate of the n-th one."""
    gates, write, count = [Gate() for _ in range(9)], Folder.write, iter(range(9))

    def slow(self, data, *names):
        if names[-1] == "weights.safetensors":
            gates[next(count)]()
        return write(self, data, *names)

    monkeypatch.setattr(Folder, "write", slow)
    return gates


def in_thread(settings, report=lambda *_: None):
    """A run that trains in a thread of its own; returns it, and where its result or its error comes to lie."""
    box = []

    def go():
        try:
            box.append(trainer.train(settings, report))
        except UserError as error:
            box.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    return thread, box


def until(condition):
    deadline = time.monotonic() + PATIENCE_SEC
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def images_logged(folder):
    return len(folder.read("metrics.jsonl").splitlines()) * 16 if folder.exists("metrics.jsonl") else 0


def test_training_goes_on_during_a_save_and_the_next_save_waits(settings, weights_wait):
    folder, heard = settings.folder, []
    thread, box = in_thread(settings(), lambda metrics, name: heard.append(name))
    assert weights_wait[0].reached.wait(PATIENCE_SEC)
    until(lambda: images_logged(folder) == 64)  # two steps on, where the second save is due
    time.sleep(0.2)
    assert images_logged(folder) == 64 and not weights_wait[1].reached.is_set(), "two copies at once"
    assert checkpoint.list_names(folder) == [] and set(heard) == {None}
    weights_wait[0].opened.set()
    assert weights_wait[1].reached.wait(PATIENCE_SEC)
    until(lambda: images_logged(folder) == 96)
    assert checkpoint.list_names(folder) == ["000000000032"] and set(heard) == {None, "000000000032"}
    for gate in weights_wait:
        gate.opened.set()
    thread.join(PATIENCE_SEC)
    assert box[0].checkpoint == "000000000096" == heard[-1]
    assert checkpoint.list_names(folder) == ["000000000032", "000000000064", "000000000096"]
    told = [name for before, name in zip([None, *heard], heard) if name != before]
    assert told == checkpoint.list_names(folder), "each is told of, in order"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_save_holds_the_moment_when_it_was_taken(settings, weights_wait, stage, tmp_path):
    """Two steps are trained between the copy and its writing. What is written equals the end of a run that stops there."""
    kind = [
        "objective.name=bootstrap",
        "objective.target_refresh_images=16",
        "model.norm=batch",
        f"engine.zero_stage={stage}",
    ]
    for gate in weights_wait[1:]:
        gate.opened.set()
    thread, box = in_thread(settings(*kind))
    until(lambda: images_logged(settings.folder) == 64 or box)
    weights_wait[0].opened.set()
    thread.join(PATIENCE_SEC)
    assert box[0].images_seen == 96
    trainer.train(settings(*kind, "schedule.total_images=32", f"run.directory={tmp_path / 'short'}"))
    taken = checkpoint.read(settings.folder, "000000000032").tensors
    expected = checkpoint.read(Folder(str(tmp_path / "short")), "000000000032").tensors
    assert set(taken) == {"weights", "average", "optimizer", "target"}
    for file, named in expected.items():
        assert set(taken[file]) == set(named)
        assert all(torch.equal(taken[file][name], value) for name, value in named.items()), file


def test_a_snapshot_shares_no_memory_with_what_learns(settings):
    with distributed.join("cpu") as group:
        state = TrainingState(settings("objective.name=bootstrap", "model.norm=batch"), group, 1)
        taken = state.tensors()
        before = {file: {name: value.clone() for name, value in named.items()} for file, named in taken.items()}
        with torch.no_grad():
            for engine in (state.encoder, state.decoder):
                live = [
                    *engine.network.parameters(),
                    *engine.network.buffers(),
                    *engine.average,
                    *engine.average_buffers.values(),
                ]
                moments = [value for values in engine._adam().state.values() for value in values.values()]
                for value in (*live, *moments, *state.target.state_dict().values()):
                    value.add_(1)
    for file, named in taken.items():
        assert all(torch.equal(value, before[file][name]) for name, value in named.items()), file


def test_memory_is_free_when_a_checkpoint_is_told_of(tmp_path):
    work = Background(ALONE)
    saver = Saver(ALONE, Folder(str(tmp_path)), work, keep=1, after=lambda name, state: None)
    tensor = torch.zeros(1000)
    gone = weakref.ref(tensor)
    saver.save({"images_seen": 1}, {"weights": {"a": tensor}}, {})
    del tensor
    assert saver.settle().name == "000000000001" and saver.settle() is None
    gc.collect()
    assert gone() is None
    work.close()


def test_a_save_that_fails_ends_the_run_at_the_next_step(settings, monkeypatch):
    write = Folder.write

    def full(self, data, *names):
        if names[-1] == "average.safetensors" and "000000000032" not in names:
            raise UserError("run: cannot write, the disk is full")
        return write(self, data, *names)

    monkeypatch.setattr(Folder, "write", full)
    heard = []
    with pytest.raises(UserError, match="the disk is full"):
        trainer.train(settings("schedule.total_images=960"), lambda metrics, name: heard.append(name))
    assert images_logged(settings.folder) <= 96  # at the latest where the next save is due
    assert settings.folder.names("checkpoints") == ["000000000032"] and heard[-1] == "000000000032"


def test_an_error_of_the_run_waits_for_the_save_under_way(settings, monkeypatch):
    """Whatever ends a run, short of a kill, what it began to save is published."""
    write = Folder.write

    def slow(self, data, *names):
        if names[0] == "checkpoints":
            time.sleep(0.1)
        return write(self, data, *names)

    def fail(metrics, name):
        if metrics and len(calls.append(1) or calls) == 3:
            raise RuntimeError("peer lost")

    calls = []
    monkeypatch.setattr(Folder, "write", slow)
    with pytest.raises(RuntimeError, match="peer lost"):
        trainer.train(settings(), fail)
    assert checkpoint.list_names(settings.folder) == ["000000000032"]


def test_pictures_that_cannot_be_written_are_one_sentence(settings, monkeypatch):
    write = Folder.write

    def full(self, data, *names):
        if names[0] == "pictures":
            raise UserError("pictures: cannot write, the disk is full")
        return write(self, data, *names)

    monkeypatch.setattr(Folder, "write", full)
    with pytest.raises(UserError, match="pictures: cannot write"):
        trainer.train(settings("tracking.picture_images=96"))


def test_training_goes_on_while_pictures_are_written(settings, monkeypatch):
    write, gate = Folder.write, Gate()

    def slow(self, data, *names):
        if names[0] == "pictures":
            gate()
        return write(self, data, *names)

    monkeypatch.setattr(Folder, "write", slow)
    thread, box = in_thread(settings("tracking.picture_images=32", "run.checkpoint_images=1000"))
    until(lambda: images_logged(settings.folder) == 96)
    assert gate.reached.is_set() and not settings.folder.names("pictures") and not box
    gate.opened.set()
    thread.join(PATIENCE_SEC)
    files = settings.folder.names("pictures")
    assert len([file for file in files if file.startswith("samples")]) == 3 and box[0].picture.endswith(files[-4])
