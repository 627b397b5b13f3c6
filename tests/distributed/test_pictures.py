"""Ranks make the pictures of training together: the same as one makes, each with its share of the work.

python -m pytest tests/distributed/test_pictures.py
"""

import re

import pytest

from tests.processes import run_torchrun

TOGETHER = """
import sys
import torch
from sivae import distributed, inference, pictures
from sivae.config import parse_model

rows = 0

def count(network, arguments):
    global rows
    rows += len(arguments[0])

settings = {
    "conv": {"family": "conv", "num_channels": 1, "resolution": 8, "channels": [8], "latent_dim": 3},
    "style": {
        "family": "style", "num_channels": 3, "resolution": 16, "base_channels": 4, "max_channels": 8, "latent_dim": 4,
        "num_mapping_layers": 1, "num_classes": 3,
    },
}[sys.argv[1]]
with distributed.join("cpu") as group:
    torch.manual_seed(0)
    info = {"stage": {"level": 2, "blend": 1.0}} if sys.argv[1] == "style" else {}
    model = inference.Model(parse_model(settings).model_dump(), info=info)
    for network in model.encoder, model.decoder:
        network.register_forward_pre_hook(count)
    images, labels = torch.rand(5, *model.sample_shape), torch.arange(5) % 3
    def made():
        global rows
        rows = 0
        return pictures.make(model, images, labels, seed=0), rows
    alone, all_rows = made()
    pictures.share(model, group)
    together, own_rows = made()
    assert alone.figures.keys() == together.figures.keys()
    pairs = [(alone.mu, together.mu), (alone.logvar, together.logvar)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    pixels = [(alone.panels[name], together.panels[name]) for name in alone.panels]
    pixels += [(alone.figures[name].tiles, together.figures[name].tiles) for name in alone.figures]
    for one, other in pixels:
        assert one.shape == other.shape and (one.int() - other.int()).abs().max() <= 1  # rounding to 8 bits
    assert all_rows / 2 <= own_rows <= 0.65 * all_rows, (own_rows, all_rows)
    print(f"rank {group.rank}: {own_rows} rows of {all_rows}, {sorted(alone.figures)}", flush=True)
    distributed.end_process(0)
"""


@pytest.mark.parametrize("family, figures", [("conv", 2), ("style", 5)])
def test_ranks_make_pictures_together(family, figures, tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    done = run_torchrun(2, [str(script), family])
    assert done.returncode == 0, done.stderr
    # (Two processes may write on one line.)
    told = re.findall(r"rank \d: \d+ rows of \d+, \[(.*?)\]", done.stdout)
    assert len(told) == 2 and all(len(names.split(", ")) == figures for names in told), done.stdout
