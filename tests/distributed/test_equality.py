"""Two DeepSpeed engines do what plain torch does on one process, with 1e-6 in float32, on 1, 2 and 3 ranks (which share a batch of 8 unevenly), for ZeRO 0 to 3 and
accumulation 1 and 2, clipping on, and reductions that overlap with the backward pass; whole state goes out and in at every stage; a NaN on one rank stops all.

    pytest tests/distributed/test_equality.py
"""

import pytest

from tests.processes import run_torchrun


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_engines_equal_plain_torch(ranks):
    done = run_torchrun(ranks, ["-m", "tests.distributed.equality_worker"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("equal"), done.stdout
    assert done.stdout.count("stage") == 14
