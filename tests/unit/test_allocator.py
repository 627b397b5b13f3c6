"""Proves that freed memory is used again without the system's help, in a process of its own.

python -m pytest tests/unit/test_allocator.py
"""

import platform
import subprocess
import sys

import pytest

PAGES = 10240  # of 4 KiB: a tensor of 40 MiB, which glibc would never keep
SCRIPT = f"""
import resource, sys, torch
from sivae.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones({PAGES * 1024})
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_freed_memory_is_used_again():
    found = {
        how: int(subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True).stdout)
        for how in ("leave", "keep")
    }
    # glibc left to itself maps and clears all of it ten times; a page may be a huge one.
    assert found["keep"] < PAGES / 10 and found["keep"] < found["leave"]
