"""An error of one rank is raised on every rank, and is of the same kind there.

python -m pytest tests/distributed/test_errors.py
"""

import re

from tests.processes import run_torchrun

SCRIPT = """
from sivae import distributed
from sivae.errors import Diverged, UserError

def raised(work):
    try:
        work()
    except Exception as error:
        kind = type(error).__name__
        print(f"rank {group.rank}: {kind} {error} {getattr(error, 'shared', None)};", flush=True)

def fail(rank, error):
    if group.rank == rank:
        raise error

with distributed.join("cpu") as group:
    raised(lambda: group.together(lambda: fail(1, Diverged("one"))))
    raised(lambda: group.agree(False, UserError("two") if group.rank == 1 else None))
    raised(lambda: group.on_main(lambda: fail(0, Diverged("three"))))
    raised(lambda: group.on_main(lambda: fail(0, ValueError("four"))))
    distributed.end_process(0)
"""


def test_the_kind_of_an_error_crosses_the_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_torchrun(2, [str(script)])
    assert done.returncode == 0, done.stderr
    told = {rank: re.findall(rf"rank {rank}: ([^;]*);", done.stdout) for rank in (0, 1)}
    assert told[1] == [
        "Diverged one True", "UserError two True", "Diverged three True", "RankFailed rank 0 failed: ValueError('four') True",
    ]  # fmt: skip
    # Rank 0 raises its own error as it is.
    assert told[0] == ["Diverged one True", "UserError two True", "Diverged three False", "ValueError four None"]
