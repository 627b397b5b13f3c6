"""No garbage collection while a command imports, and none of what it imported.

pytest tests/unit/test_startup.py
"""

import gc
import subprocess
import sys

import pytest

from sivae import startup
from sivae.cli import main


@pytest.fixture
def thawed():
    yield
    gc.unfreeze()


def test_collection_waits_for_the_imports(thawed):
    with startup.importing():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 1000


def test_after_an_import_that_fails_it_goes_on(thawed):
    with pytest.raises(ImportError), startup.importing():
        import no_such_module  # noqa: F401
    assert gc.isenabled()


def test_a_caller_keeps_its_own_collection():
    """`main([...])` in somebody's process leaves that one's objects alone."""
    before = gc.get_freeze_count()
    assert main(["check", "no/such/set"]) == 1
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_the_last_collection_is_left_out():
    """What runs last before it says how much it has to go through."""
    program = (
        "import atexit, gc; from sivae import startup\n"
        "atexit.register(lambda: print(len(gc.get_objects())))\n"
        "with startup.importing(): import argparse\n"
        "kept = [[] for _ in range(1000)]; print(len(gc.get_objects()))\n"
    )
    # Last registered runs first: frozen, then counted.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    alive, left = map(int, done.stdout.split())
    assert left < 100 < 1000 < alive
