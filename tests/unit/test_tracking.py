"""Proves that metrics.jsonl of a run in several lives, on a disk and in an object store, tells every position once.

pytest tests/unit/test_tracking.py
"""

import json
import uuid

import pytest

from sivae.storage import Folder
from sivae.tracking import Tracker


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    return Folder(str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}")


def live(folder, images_seen, *positions):
    """Begin at `images_seen` and log at these positions."""
    tracker = Tracker(folder, 100, tensorboard=False, progress=False, settings_yaml="")
    tracker.open(images_seen)
    for position in positions:
        tracker.scalars({"terms/rec": float(images_seen)}, position)
    tracker.close()


def told(folder):
    lines = map(json.loads, folder.read("metrics.jsonl").splitlines())
    return [(line["images_seen"], line["terms/rec"]) for line in lines]


def test_what_came_after_the_checkpoint_is_told_again(folder):
    live(folder, 0, 16, 32, 48)
    live(folder, 32, 48, 64)
    assert told(folder) == [(16, 0.0), (32, 0.0), (48, 32.0), (64, 32.0)]


def test_a_line_that_is_damaged_goes(folder):
    """A kill cuts it anywhere; after a power cut it can be anything."""
    live(folder, 0, 16, 32)
    for cut in (b'{"images_seen": 4', b'{"terms/rec": 1.0}', b"48", b"\0\0", b"\xff\xfe"):
        folder.write(folder.read("metrics.jsonl") + cut, "metrics.jsonl")
        live(folder, 32)
        assert told(folder) == [(16, 0.0), (32, 0.0)]


def test_a_rollback_takes_back_what_it_undoes(folder):
    tracker = Tracker(folder, 100, tensorboard=False, progress=False, settings_yaml="")
    tracker.open(0)
    for position in (16, 32):
        tracker.scalars({"terms/rec": 0.0}, position)
    tracker.sync()
    tracker.open(16)
    tracker.scalars({"terms/rec": 1.0}, 32)
    tracker.close()
    assert told(folder) == [(16, 0.0), (32, 1.0)]
