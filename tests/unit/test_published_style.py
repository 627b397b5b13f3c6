"""Proves that published style checkpoints are read with what is averaged in them, that the imported network computes what was
recorded, also through `sivae import`, and that other, truncated and hostile files are refused and nothing in them is run.

    python -m pytest tests/unit/test_published_style.py
"""

import pickle
import random
import resource
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import sivae
from sivae.cli import main
from sivae.errors import UserError
from sivae.models import inert_pickle, published
from tests.unit.test_inference import model_of
from tests.unit.test_published import Evil

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "golden" / "style_soft_intro_vae.npz")


class Track:
    """As the published statistics of training: an object of a class of its own, tensors inside."""

    def __init__(self):
        self.values = [torch.ones(1)]


def entries(group="init"):
    found = defaultdict(OrderedDict)
    for key in GOLDEN.files:
        if key.startswith(f"{group}/"):
            _, entry, name = key.split("/")
            found[entry][name] = torch.from_numpy(GOLDEN[key])
    return dict(found)


def checkpoint(models, **extra):
    """The layout of the published checkpoints."""
    tracker = {"tracks": OrderedDict(loss=Track()), "epochs": [1], "means_over_epochs": OrderedDict(loss=[0.5])}
    optimizer = {"state": defaultdict(dict), "param_groups": [{"lr": 0.1}]}
    return {"models": models, "auxiliary": {"tracker": tracker, "encoder_optimizer": optimizer}, "epoch": 3, **extra}


def write(path, content, old=False):
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return str(path)


def refused(path, *parts):
    with pytest.raises(UserError) as caught:
        published.read(str(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_with_objects_beside_the_weights_is_read(tmp_path, old):
    path = write(tmp_path / "model.pth", checkpoint(entries()), old)
    with pytest.raises(Exception, match="Weights only"):
        torch.load(path, weights_only=True)
    found = published.read(path)
    assert found.kind == "style" and set(found.networks) == {"encoder", "decoder"}
    assert found.settings == {
        "family": "style", "num_channels": 3, "resolution": 16, "base_channels": 4, "max_channels": 8, "latent_dim": 8,
        "num_mapping_layers": 3, "num_mapping_layers_to_latent": 3,
    }  # fmt: skip


def test_averaged_entries_are_preferred_and_the_average_style_is_kept(tmp_path):
    plain, averaged = entries("train_init"), entries("final")
    both = plain | {f"{entry}_s": state for entry, state in averaged.items() if entry != "dlatent_avg"}
    both["dlatent_avg"] = averaged["dlatent_avg"]
    found = published.read(write(tmp_path / "both.pth", checkpoint(both)))
    alone = published.read(write(tmp_path / "alone.pth", checkpoint(averaged)))
    for network, state in alone.networks.items():
        assert all(torch.equal(found.networks[network][name], value) for name, value in state.items())
    assert torch.equal(found.networks["decoder"]["average_style"], averaged["dlatent_avg"]["buff"][0])
    assert found.networks["decoder"]["average_style"].any()
    # A worker that keeps no averages saved None for them.
    none = plain | {f"{entry}_s": None for entry in plain}
    published.read(write(tmp_path / "none.pth", checkpoint(none)))


def test_import_encodes_decodes_samples_and_reconstructs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("published.pth", checkpoint(entries()))
    assert main(["import", "published.pth", "ours"]) == 0
    assert "style model, style family, 3x16x16, latent 8" in capsys.readouterr().out
    model = sivae.load("ours")
    x = torch.from_numpy(GOLDEN["lod2_blend1/x"])
    mu, logvar = model.encode(x)
    for name, value in (("mu", mu), ("logvar", logvar)):
        assert torch.allclose(value, torch.from_numpy(GOLDEN[f"lod2_blend1/{name}"]), atol=1e-5)
    images = model.decoder(mu, noise="mean")  # the published decoder's noise=False
    assert torch.allclose(images, torch.from_numpy(GOLDEN["lod2_blend1/decoded_no_noise"]), atol=1e-5)
    assert torch.equal(model.reconstruct(x), model.decode(mu))
    arguments = ["sample", "ours", "--count", "4", "--truncation", "0.7", "--truncation-layers", "4"]
    assert main(arguments) == 0 and Path("samples.png").exists()
    # The average style is 0 in this file; half-way to it, images are nearer to each other.
    whole, truncated = model.sample(8), model.sample(8, truncation=0.3)
    assert truncated.std(dim=0).mean() < 0.8 * whole.std(dim=0).mean()
    assert torch.equal(model.sample(8, truncation=0.3, batch_size=8), truncated)


def test_truncation_and_mixing_are_of_the_style_family_and_within_its_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("published.pth", checkpoint(entries()))
    main(["import", "published.pth", "ours"])
    model = sivae.load("ours")
    a, b = torch.randn(2, 8), torch.randn(2, 8)
    assert model.num_layers == 6
    assert torch.allclose(model.mix(a, b, 6), model.decode(a), atol=1e-6)
    assert torch.allclose(model.mix(a, b, 0), model.decode(b), atol=1e-6)
    assert min((model.mix(a, b, 2) - model.decode(z)).abs().max() for z in (a, b)) > 1e-4
    with pytest.raises(UserError, match="num_coarse: 7 is not in 0 .. 6"):
        model.mix(a, b, 7)
    assert main(["sample", "ours", "--truncation", "0.5", "--truncation-layers", "-1"]) == 1
    assert "truncation_layers: -1 is negative" in capsys.readouterr().err
    assert main(["sample", "ours", "--truncation-layers", "4"]) == 1
    assert "truncation_layers: without a truncation none is truncated" in capsys.readouterr().err
    for call in (lambda m: m.sample(2, truncation=0.5), lambda m: m.mix(a, b, 1)):
        with pytest.raises(UserError, match="a model of the conv family"):
            call(model_of("conv"))


# What is no published style file


@pytest.mark.parametrize("missing", ["discriminator", "mapping_fl", "mapping_tl", "dlatent_avg"])
def test_a_missing_entry_is_named(tmp_path, missing):
    content = {entry: state for entry, state in entries().items() if entry != missing}
    refused(write(tmp_path / "model.pth", checkpoint(content)), "not a published style model", missing)


def test_another_architecture_is_refused(tmp_path):
    def changed(entry, name, value):
        content = entries()
        content[entry][name] = value
        if value is None:
            del content[entry][name]
        return write(tmp_path / "model.pth", checkpoint(content))

    # A discriminator whose last block is fully connected, as others of ALAE's encoders
    refused(changed("discriminator", "encode_block.2.dense.weight", torch.zeros(8, 128)), "unknown parameter discriminator.encode_block.2.dense.weight")  # fmt: skip
    refused(changed("generator", "decode_block.1.conv_1.weight", None), "decoder.blocks.1.conv1.weight has shape None")
    refused(changed("generator", "const", torch.zeros(1, 8, 8, 8)), "decoder.constant has shape (8, 8, 8)")
    refused(changed("mapping_tl", "map_blocks.2.fc.bias", torch.zeros(8)), "gives 8 values, not mu and logvar of 8")
    refused(changed("mapping_fl", "map_blocks.0.fc.weight", 3), "entry mapping_fl is no state dict")


@pytest.mark.parametrize("old", [False, True])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, old):
    path = Path(write(tmp_path / "model.pth", checkpoint(entries()), old))
    data = path.read_bytes()
    for end in {0, 1, 10, 100, *range(0, len(data), len(data) // 60)}:
        path.write_bytes(data[:end])
        refused(path)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_refused_or_read_but_never_a_traceback(tmp_path, old):
    path, draw = Path(write(tmp_path / "model.pth", checkpoint(entries()), old)), random.Random(0)
    data = path.read_bytes()
    for _ in range(100):
        broken = bytearray(data)
        for _ in range(3):
            broken[draw.randrange(6000)] = draw.randrange(256)
        path.write_bytes(broken)
        try:
            published.read(str(path))
        except UserError:
            pass


def test_a_number_that_a_file_gives_an_object_takes_no_memory(tmp_path):
    """By default the first is 0; the C reader of pickles makes a table of 16 bytes for each number up to the largest."""
    path = Path(write(tmp_path / "model.pth", checkpoint(entries()), True))
    data = path.read_bytes()
    at = data.index(b"q\x00", 100)  # BINPUT 0, in the pickle that follows the two of version and machine
    path.write_bytes(data[:at] + b"r" + (2**28).to_bytes(4, "little") + data[at + 2 :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert published.read(str(path)).kind == "style"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "a gigabyte"


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("where", ["beside", "inside", "instead"])
def test_code_in_a_file_is_not_run(tmp_path, where, old):
    marker, content = tmp_path / "marker", entries()
    if where == "inside":
        content["generator"]["const"] = Evil(marker)
    if where == "instead":
        content["generator_s"] = Evil(marker)
    path = write(tmp_path / "model.pth", checkpoint(content, evil=Evil(marker) if where == "beside" else None), old)
    if where == "beside":
        assert published.read(path).kind == "style"
    else:
        refused(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert marker.exists()


def test_what_a_pickle_does_to_functions_does_not_last(tmp_path):
    """A pickle may set attributes of the functions that it names; ours stay as they are."""
    function = torch._utils._rebuild_tensor_v2
    before = function.__defaults__
    path = tmp_path / "program"
    # GLOBAL, then BUILD with the slot state {"__defaults__": ()}
    path.write_bytes(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.")
    with open(path, "rb") as file:
        inert_pickle._Unpickler(file).load()
    assert function.__defaults__ == before
    try:
        pickle.loads(path.read_bytes())  # it would have lasted
        assert function.__defaults__ == () != before
    finally:
        function.__defaults__ = before
