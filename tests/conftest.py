"""Shared by all tests: one thread per process, as several processes share the machine; the `gpu` mark; a packed set of digits."""

import os

import pytest
import torch

from sivae import allocator

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)


def pytest_configure(config):
    # A process trains on one kind of device, DeepSpeed's, and most tests are written for a CPU.
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and pytest -m gpu"))


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch):
    """What training in a test would leave to the tests after it: DeepSpeed's linear layer of ZeRO 3, an allocator that keeps all."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Where `digits:` is packed once for the whole test run."""
    return str(tmp_path_factory.mktemp("cache"))
