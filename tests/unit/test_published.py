"""Proves that published files are recognised by what is in them, that every published parameter becomes exactly one of ours,
that the imported network computes what the published code does, and that a bad or hostile file is refused and never run.

    python -m pytest tests/unit/test_published.py
"""

import os
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sivae import models
from sivae.config import parse_model
from sivae.errors import UserError
from sivae.models import published

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
KINDS = {
    "conv_soft_intro_vae": "image", "conv_bootstrap": "bootstrap", "mlp_soft_intro_vae": "2D", "conv_intro_vae": "image",
}  # fmt: skip


def golden(name):
    data = np.load(GOLDEN / f"{name}.npz")
    return OrderedDict(
        (key.removeprefix("init/"), torch.from_numpy(data[key])) for key in data.files if key.startswith("init/")
    )


def write(path, state, **extra):
    torch.save({"epoch": 3, "model": state, **extra}, path)
    return str(path)


def build(found, **fields):
    """Our networks with the imported weights, loaded strictly."""
    settings = parse_model(found.settings | fields).model_dump()
    networks = models.build(**settings)
    networks.encoder.load_state_dict(found.networks["encoder"])
    networks.decoder.load_state_dict(found.networks["decoder"])
    return networks


# The published architectures, from the repositories (networks as in IntroVAE's networks.py; Soft-IntroVAE's differ in the
# order of the residual block). `projects(i, o)` is their `inc is not outc`.


class PublishedBlock(nn.Module):
    def __init__(self, inc, outc, project, norm_last):
        super().__init__()
        self.norm_last = norm_last
        self.conv_expand = nn.Conv2d(inc, outc, 1, bias=False) if project else None
        self.conv1, self.bn1 = nn.Conv2d(inc, outc, 3, padding=1, bias=False), nn.BatchNorm2d(outc)
        self.conv2, self.bn2 = nn.Conv2d(outc, outc, 3, padding=1, bias=False), nn.BatchNorm2d(outc)

    def forward(self, x):
        skip = x if self.conv_expand is None else self.conv_expand(x)
        y = self.conv2(F.leaky_relu(self.bn1(self.conv1(x)), 0.2))
        return F.leaky_relu(self.bn2(y + skip) if self.norm_last else self.bn2(y) + skip, 0.2)


class PublishedEncoder(nn.Module):
    def __init__(self, cdim, zdim, channels, image_size, cond_dim, intro):
        super().__init__()
        # Integers from the command line are objects of their own: `is` tells equal ones apart, from 257 on.
        channels = [int(str(width)) for width in channels] if intro else channels
        differs = (lambda a, b: a is not b) if intro else (lambda a, b: a != b)
        cc, sz = channels[0], image_size // 2
        self.main = nn.Sequential(nn.Conv2d(cdim, cc, 5, 1, 2, bias=False), nn.BatchNorm2d(cc), nn.LeakyReLU(0.2), nn.AvgPool2d(2))  # fmt: skip
        for ch in channels[1:]:
            self.main.add_module(f"res_in_{sz}", PublishedBlock(cc, ch, differs(cc, ch), intro))
            self.main.add_module(f"down_to_{sz // 2}", nn.AvgPool2d(2))
            cc, sz = ch, sz // 2
        self.main.add_module(f"res_in_{sz}", PublishedBlock(cc, cc, False, intro))
        self.fc = nn.Linear(cc * sz * sz + cond_dim, 2 * zdim)

    def forward(self, x, cond=None):
        y = self.main(x).flatten(1)
        return self.fc(y if cond is None else torch.cat([y, cond], 1)).chunk(2, dim=1)


class PublishedDecoder(nn.Module):
    def __init__(self, cdim, zdim, channels, image_size, cond_dim, intro):
        super().__init__()
        channels = [int(str(width)) for width in channels] if intro else channels
        differs = (lambda a, b: a is not b) if intro else (lambda a, b: a != b)
        cc, sz = channels[-1], image_size // 2 ** len(channels)
        self.shape = (cc, sz, sz)
        self.fc = nn.Sequential(nn.Linear(zdim + cond_dim, cc * sz * sz), nn.ReLU())
        self.main = nn.Sequential()
        for ch in channels[::-1]:
            self.main.add_module(f"res_in_{sz}", PublishedBlock(cc, ch, differs(cc, ch), intro))
            self.main.add_module(f"up_to_{sz * 2}", nn.Upsample(scale_factor=2, mode="nearest"))
            cc, sz = ch, sz * 2
        self.main.add_module(f"res_in_{sz}", PublishedBlock(cc, cc, False, intro))
        self.main.add_module("predict", nn.Conv2d(cc, cdim, 5, 1, 2))

    def forward(self, z, cond=None):
        return self.main(self.fc(z if cond is None else torch.cat([z, cond], 1)).view(-1, *self.shape))


class PublishedModel(nn.Module):
    def __init__(self, cdim=1, zdim=6, channels=(4, 8), image_size=28, cond_dim=0, intro=False, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        with torch.device(device):
            self.encoder = PublishedEncoder(cdim, zdim, list(channels), image_size, cond_dim, intro)
            self.decoder = PublishedDecoder(cdim, zdim, list(channels), image_size, cond_dim, intro)
        if device == "cpu":  # a moment of training, so that no buffer is as it was made
            self.train()
            with torch.no_grad():
                cond = None if not cond_dim else F.one_hot(torch.arange(8) % cond_dim, cond_dim).float()
                self.encoder(torch.rand(8, cdim, image_size, image_size), cond)
                self.decoder(torch.randn(8, zdim), cond)
        self.eval()


@pytest.mark.parametrize("name", KINDS)
def test_golden_files_are_recognised(tmp_path, name):
    found = published.read(write(tmp_path / "model.pth", golden(name)))
    assert found.kind == KINDS[name]
    expected = {"encoder", "decoder"} | ({"target_decoder"} if name == "conv_bootstrap" else set())
    assert set(found.networks) == expected
    if found.kind == "2D":
        assert found.settings == {
            "family": "mlp", "sample_shape": [2], "latent_dim": 2, "num_hidden": 24, "num_layers": 3,
        }  # fmt: skip
    else:
        wanted = {"family": "conv", "channels": [6, 10, 14], "resolution": 32, "latent_dim": 12, "norm": "batch",
                  "num_channels": 3, "num_classes": 0}  # fmt: skip
        assert wanted.items() <= found.settings.items()
    build(found)


@pytest.mark.parametrize("name", KINDS)
def test_the_map_is_one_to_one(name):
    """Each published tensor stands, unchanged, under exactly one of our names, and all our names are filled."""
    state = golden(name)
    # Numbered, so that two tensors of one shape cannot be exchanged unseen.
    state = OrderedDict((key, torch.full_like(value, index)) for index, (key, value) in enumerate(state.items()))
    state = OrderedDict((key, value) for key, value in state.items() if not key.endswith("num_batches_tracked"))
    found = published.convert(state)
    for network in found.networks:
        theirs = {key: value for key, value in state.items() if key.startswith(f"{network}.")}
        ours = found.networks[network]
        assert len(ours) == len(theirs)
        assert sorted(float(v.flatten()[0]) for v in ours.values()) == sorted(
            float(v.flatten()[0]) for v in theirs.values()
        )
        own = getattr(models.build(**parse_model(found.settings).model_dump()), network.removeprefix("target_"))
        shapes = {key: v.shape for key, v in own.state_dict().items() if not key.endswith("num_batches_tracked")}
        assert {key: value.shape for key, value in ours.items()} == shapes


def test_loggamma_of_the_2d_decoder_is_left_out():
    state = golden("mlp_soft_intro_vae") | {"decoder.loggamma": torch.zeros(1)}
    assert "loggamma" not in str(published.convert(state).networks["decoder"].keys())
    build(published.convert(state))


@pytest.mark.parametrize("num_layers", [0, 1, 4, 12])
def test_2d_models_of_any_depth_compute_the_same(num_layers):
    torch.manual_seed(0)
    names = ["input", *[f"hidden_{i}" for i in range(1, num_layers + 1)], "output"]
    layers = {
        part: [nn.Linear(*size) for size in zip([2, *[5] * (num_layers + 1)], [*[5] * (num_layers + 1), out])]
        for part, out in (("encoder", 4), ("decoder", 2))
    }
    state = {
        f"{part}.main.{name}.{leaf}": getattr(layer, leaf)
        for part in layers
        for name, layer in zip(names, layers[part])
        for leaf in ("weight", "bias")
    }
    networks = build(published.convert({name: value.detach() for name, value in state.items()}))
    x = torch.randn(3, 2)
    for part, ours in (("encoder", torch.cat(networks.encoder(x), 1)), ("decoder", networks.decoder(x))):
        y = x
        for layer in layers[part][:-1]:
            y = layer(y).relu()
        assert torch.equal(ours, layers[part][-1](y))


CASES = {
    "28 pixels": {},
    "32 pixels, colour": dict(cdim=3, channels=(4, 8, 8), image_size=32),
    "one level": dict(channels=(4,), image_size=28),
    "conditional": dict(cond_dim=10),
    "conditional, 32 pixels": dict(cond_dim=3, channels=(4, 6, 8), image_size=32),
    "more classes than features of a row": dict(cond_dim=40, channels=(4, 4), image_size=16),
}


@pytest.mark.parametrize("intro", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_imported_models_compute_what_the_published_code_does(tmp_path, case, intro):
    theirs = PublishedModel(**CASES[case], intro=intro)
    path = write(tmp_path / "model.pth", theirs.state_dict())
    found = published.read(path, residual="intro_vae" if intro else None)
    options = {"cdim": 1, "image_size": 28, "channels": (4, 8), "cond_dim": 0} | CASES[case]
    assert found.settings["resolution"] == options["image_size"] and found.settings["num_channels"] == options["cdim"]
    assert found.settings["channels"] == list(options["channels"]) and found.settings["latent_dim"] == 6
    assert found.settings["num_classes"] == options["cond_dim"]
    encoder, decoder = build(found)
    encoder.eval(), decoder.eval()
    x, z = torch.rand(3, options["cdim"], options["image_size"], options["image_size"]), torch.randn(3, 6)
    labels, cond = None, None
    if options["cond_dim"]:
        labels = torch.tensor([0, 2, 1])
        cond = F.one_hot(labels, options["cond_dim"]).float()
    with torch.no_grad():
        # The same operations in the same order: bitwise.
        assert all(torch.equal(a, b) for a, b in zip(encoder(x, labels), theirs.encoder(x, cond)))
        assert torch.equal(decoder(z, labels), theirs.decoder(z, cond))


def test_the_prefix_of_data_parallel_is_dropped(tmp_path):
    state = {f"module.{name}": value for name, value in golden("conv_soft_intro_vae").items()}
    found, plain = published.read(write(tmp_path / "a.pth", state)), published.convert(golden("conv_soft_intro_vae"))
    assert found.settings == plain.settings and found.networks["encoder"].keys() == plain.networks["encoder"].keys()


def test_a_bare_state_dict_and_the_old_format_are_read(tmp_path):
    torch.save(golden("mlp_soft_intro_vae"), tmp_path / "bare.pth")
    assert published.read(str(tmp_path / "bare.pth")).kind == "2D"
    torch.save({"model": golden("mlp_soft_intro_vae")}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert published.read(str(tmp_path / "old.pth")).kind == "2D"


WIDE = (4, 512, 512, 512)


def test_intro_vae_is_known_by_its_wide_equal_projections():
    """Its code projects between levels of equal width above 256; Soft-IntroVAE's does not. Shapes only, no memory."""
    intro = PublishedModel(channels=WIDE, image_size=64, intro=True, device="meta").state_dict()
    assert "encoder.main.res_in_16.conv_expand.weight" in intro  # 512 -> 512
    found = published.convert(intro)
    assert found.kind == "IntroVAE" and found.settings["residual"] == "intro_vae"
    soft = PublishedModel(channels=WIDE, image_size=64, device="meta").state_dict()
    assert "encoder.main.res_in_16.conv_expand.weight" not in soft
    assert published.convert(soft).settings["residual"] == "soft_intro_vae"


@pytest.mark.parametrize("intro", [False, True])
@pytest.mark.parametrize("channels", [WIDE, (64, 128, 256, 512, 512, 512), (4, 300, 300, 8)], ids=str)
def test_a_wide_model_has_exactly_our_parameters(channels, intro):
    """(64 .. 512, 512, 512) is the default of IntroVAE's command."""
    state = PublishedModel(
        channels=channels, image_size=4 * 2 ** len(channels), intro=intro, device="meta"
    ).state_dict()
    found = published.convert(state, residual="intro_vae" if intro else None)
    with torch.device("meta"):
        networks = models.build(**parse_model(found.settings).model_dump())
    for name in ("encoder", "decoder"):
        ours = {key: tuple(value.shape) for key, value in getattr(networks, name).state_dict().items()}
        theirs = {key: tuple(value.shape) for key, value in found.networks[name].items()}
        assert set(theirs) - set(ours) == set() and set(ours) - set(theirs) == set(), f"of the {name}"
        assert ours == theirs


# What is no published file


def refused(path, *parts):
    with pytest.raises(UserError) as caught:
        published.read(str(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(part in message for part in parts), message


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.pth", "there is no such file")
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("old", [False, True])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, old):
    path = tmp_path / "model.pth"
    torch.save({"model": golden("mlp_soft_intro_vae")}, path, _use_new_zipfile_serialization=not old)
    data = path.read_bytes()
    for end in {0, 1, 10, 100, *range(0, len(data), len(data) // 60)}:
        path.write_bytes(data[:end])
        refused(path)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_refused_or_read_but_never_a_traceback(tmp_path, old):
    path, draw = tmp_path / "model.pth", random.Random(0)
    torch.save({"model": golden("mlp_soft_intro_vae")}, path, _use_new_zipfile_serialization=not old)
    data = path.read_bytes()
    raised = {}
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(3):
            broken[draw.randrange(3000)] = draw.randrange(256)
        path.write_bytes(broken)
        try:
            published.read(str(path))
        except UserError:
            pass
        except Exception as error:  # noqa: BLE001 - the point of the test
            raised[type(error).__name__] = str(error)[:80]
    assert not raised


@pytest.mark.parametrize("text", ["hello, this is text\n", "# a comment\n", "{}", "epoch: 3\n", "<html></html>"])
def test_a_text_file_is_refused_as_no_pytorch_file(tmp_path, text):
    path = tmp_path / "model.pth"
    path.write_text(text)
    refused(path)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}}, {}, [1, 2], torch.zeros(3), {"model": {"a": 3}}, {"model": {0: torch.zeros(1)}},
        {"model": {"encoder.fc.weight": torch.zeros(4, 4)}}, {"epoch": 3},
        {"model": {"encoder.main.input.weight": torch.zeros(())}},
        {"model": {"features.0.weight": torch.zeros(3, 3), "classifier.weight": torch.zeros(3, 3)}},
    ],
    ids=lambda content: str(content)[:40],
)  # fmt: skip
def test_other_contents_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    refused(tmp_path / "model.pth")


def test_another_architecture_is_refused(tmp_path):
    resnet = {f"encoder.layer1.{i}.conv1.weight": torch.zeros(3, 3, 3, 3) for i in range(2)}
    refused(write(tmp_path / "model.pth", resnet), "not a published image, bootstrap, 2D or IntroVAE model")
    half = {name: value for name, value in golden("conv_soft_intro_vae").items() if name.startswith("encoder.")}
    refused(write(tmp_path / "half.pth", half))
    extra = golden("conv_soft_intro_vae") | {"encoder.main.attention.weight": torch.zeros(3)}
    refused(write(tmp_path / "extra.pth", extra), "unknown parameter encoder.main.attention.weight")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("where", ["beside", "inside", "alone"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, where, old):
    marker, path = tmp_path / "marker", tmp_path / "model.pth"
    state = dict(golden("mlp_soft_intro_vae"))
    content = {
        "beside": {"model": state, "extra": Evil(marker)},
        "inside": {"model": state | {"encoder.evil": Evil(marker)}},
        "alone": Evil(marker),
    }[where]
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    refused(path, "could run code")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert marker.exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path):
    """IntroVAE's own code saves the module itself."""
    torch.save({"epoch": 1, "model": nn.Linear(2, 2)}, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "could run code", "state_dict()")
