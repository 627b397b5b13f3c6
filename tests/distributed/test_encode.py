"""Proves that two ranks share out a set and leave the same bytes as one process, and that what is wrong is said once.

python -m pytest tests/distributed/test_encode.py
"""

import numpy as np
import pytest
import torch

from sivae import inference
from sivae.cli import main
from sivae.config import parse_model
from sivae.data.pack import pack
from tests.processes import run_sivae

COUNT = 4096 + 300  # two parts


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 1), dtype=np.uint8))
    pack("images.npy", "set", resolution=4, num_workers=0, progress=False)
    tree = {"family": "mlp", "sample_shape": [1, 4, 4], "latent_dim": 3, "num_hidden": 8}
    torch.manual_seed(0)
    inference.export(inference.Model(parse_model(tree).model_dump()), "model")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_ranks_leave_what_one_process_does(here):
    arguments = ["encode", str(here / "model"), str(here / "set")]
    done = run_sivae([*arguments, str(here / "shared")], ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4,396 images, 3 latent dimensions, 2 parts") == 1
    assert "rank 0 of 2" in done.stderr and "4.10k/4.10k" in done.stderr  # its share, not all
    assert main([*arguments, str(here / "alone")]) == 0
    alone = contents(here / "alone")
    assert len(alone) == 3 and contents(here / "shared") == alone

    refused = run_sivae([*arguments, str(here / "shared"), "--split", "none"], ranks=2)
    assert refused.returncode == 1 and contents(here / "shared") == alone
    assert refused.stderr.count("sivae: error: ") == 1 and "there is no split 'none'" in refused.stderr
