"""No garbage collection while a command imports, and none of what it imported; a process ends with the code it was given, whatever threads it has.

pytest tests/unit/test_startup.py
"""

import gc
import os
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


def test_a_thread_of_gloo_that_waits_for_python_does_not_abort_the_end():
    """Ended by `sys.exit(7)`, two of three of these processes abort: rarer where fewer collectives are under way."""
    program = (
        "import atexit, threading, time, torch, torch.distributed as dist\n"
        "from sivae import distributed\n"
        "with distributed.join('cpu'):\n"
        "    held = dist.group.WORLD  # as DeepSpeed does\n"
        "    pairs = [([torch.zeros(20000)], torch.zeros(20000)) for _ in range(2000)]\n"
        "    atexit.register(print, 'the callbacks', end=' ')\n"
        "    threading.Thread(target=lambda: (time.sleep(0.1), print('the threads', end=' '))).start()\n"
        "    for pair in pairs:\n"
        "        dist.all_gather(*pair, async_op=True)\n"
        "distributed.end_process(7)\n"
    )
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (7, "the threads the callbacks "), done.stderr


@pytest.mark.parametrize(
    "ending, code, said",
    [
        ("| cat", 0, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("> /dev/full", 1, "sivae: error: cannot write <stdout>: No space left"),
    ],
)
def test_the_last_words_are_written_or_it_is_said(ending, code, said):
    program = "import ctypes; from sivae import distributed; print('ours'); ctypes.CDLL(None).puts(b'theirs'); distributed.end_process(0)"
    # Unbuffered, print itself would fail.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {ending}', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=buffered)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    assert sorted(done.stdout.split()) == (["ours", "theirs"] if ending in ("| cat", "2>&-") else [])


def test_an_end_that_nobody_reads_is_an_error():
    program = "import sys; from sivae import distributed; sys.stdin.read(); print('said'); distributed.end_process(0)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=buffered,
    )
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 1 and process.stderr.read() == b""


@pytest.mark.parametrize("joined", [True, False])
def test_the_command_ends_the_process_itself_where_it_had_a_group(joined):
    program = (
        "import os, sys; from sivae import cli, commands, distributed\n"
        "def end(code): print('ended', code, flush=True); os._exit(9)\n"
        f"distributed.end_process, distributed.joined = end, {joined}\n"
        "commands.COMMANDS['check'] = lambda options: 3\n"
        "sys.argv = ['sivae', 'check', 'set']; sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == ((9, "ended 3\n") if joined else (3, "")), done.stderr


@pytest.mark.parametrize("said", ["RuntimeError: of ours", "SystemExit: 3"])
def test_the_command_ends_as_python_would(said):
    """A traceback and 1 for what nobody foresaw; what asks for an exit code has it."""
    kind, _, value = said.partition(": ")
    program = (
        "import sys; from sivae import cli, commands, distributed\n"
        f"def fail(options): raise {kind}({value if value.isdigit() else repr(value)})\n"
        "commands.COMMANDS['check'] = fail\n"
        "sys.argv = ['sivae', 'check', 'set']; sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == (int(value) if value.isdigit() else 1)
    assert ("Traceback" in done.stderr and said in done.stderr) == (kind == "RuntimeError")
