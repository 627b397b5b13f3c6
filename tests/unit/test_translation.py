"""Proves that the translation family divides its latent into class and content and swaps them as it says: what each part can
and cannot change, the sum of both KL divergences, a training run through the trainer, the picture of `sivae translate` cell
by cell; that `shapes:` draws the factors that it names; that bad input is one sentence.

    python -m pytest tests/unit/test_translation.py
"""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sivae
from sivae import config, inference, models
from sivae.cli import main
from sivae.config import parse_model
from sivae.data import open_stream
from sivae.data.sources import open_source
from sivae.data.sources.shapes import DEGREES, NUM_CLASSES, NUM_CONTENTS, PLACES
from sivae.errors import UserError
from sivae.images import grid
from sivae.objectives import kl

SETTINGS = {
    "family": "translation", "num_channels": 3, "resolution": 16, "channels": [8, 8], "latent_dim": 7, "class_dim": 3,
    "style_dim": 8,
}  # fmt: skip


def build(seed=0, **fields):
    return models.build(seed=seed, **parse_model(SETTINGS | fields).model_dump())


def noise(count, seed=0, channels=3):
    return torch.rand(count, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def latents(count, seed=1):
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An untrained model of the family, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    conv = {"family": "conv", "num_channels": 3, "resolution": 16, "channels": [8, 8], "latent_dim": 4}
    for name, tree in {"translation": SETTINGS, "conv": conv}.items():
        inference.export(inference.Model(parse_model(tree).model_dump()), str(folder / name))
    return {name: str(folder / name) for name in ("translation", "conv")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where `shapes:` is packed, once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIVAE_DEBUG", "")
    monkeypatch.setenv("SIVAE_CACHE", str(cache))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


# The networks


def test_the_divergence_is_the_sum_of_both_encoders():
    encoder, _ = build()
    mu, logvar = encoder(noise(4))
    assert mu.shape == logvar.shape == (4, 7)
    of_class, of_content = kl(mu[:, :3], logvar[:, :3]), kl(mu[:, 3:], logvar[:, 3:])
    assert of_class.min() > 0 and of_content.min() > 0
    assert torch.allclose(kl(mu, logvar), of_class + of_content)  # the same sum in another order


def test_each_encoder_has_its_own_features():
    encoder, _ = build()
    mu, _ = encoder(noise(2))
    parameters = dict(encoder.named_parameters())
    for part, own, other in (
        (mu[:, :3], "class_", "content_"),
        (mu[:, 3:], "content_", "class_"),
    ):
        gradients = torch.autograd.grad(part.square().sum(), parameters.values(), retain_graph=True)
        reached = {name for name, gradient in zip(parameters, gradients) if gradient.any()}
        assert any(name.startswith(own) for name in reached)
        assert not any(name.startswith(other) for name in reached)


def test_the_content_encoder_sees_no_levels_of_features():
    """Instance norm takes away what scales a channel of the first features; the class encoder's groups of channels keep it."""
    encoder, _ = build()
    x, scales = noise(2), torch.linspace(0.5, 2, 8)[:, None, None, None]
    before = encoder(x)[0]
    for features in (encoder.class_features, encoder.content_features):
        features.stem.weight.data *= scales
    after = encoder(x)[0]
    # What is left is the epsilon of the norm, 1e-5 beside variances of 0.007 and more.
    assert torch.allclose(before[:, 3:], after[:, 3:], atol=2e-3)
    assert (before[:, :3] - after[:, :3]).abs().max() > 1e-2


def test_class_sets_no_place_and_content_no_level():
    """Before the last layers: maps of one class have the same mean and deviation in every image, whatever the content."""
    _, decoder = build()
    maps = []
    decoder.blocks[0].norm2.register_forward_hook(lambda module, inputs, output: maps.append(output.clone()))
    z = latents(5)
    z[:, :3] = z[0, :3]
    decoder(z)
    mean, deviation = maps[0].mean(dim=(2, 3)), maps[0].std(dim=(2, 3))
    assert torch.allclose(mean, mean[:1].expand(5, -1), atol=1e-4)
    assert torch.allclose(deviation, deviation[:1].expand(5, -1), rtol=1e-2, atol=1e-3)  # the norm's epsilon
    assert (maps[0][0] - maps[0][1]).abs().max() > 0.1  # the contents differ
    z[:, :3] = latents(5, seed=2)[:, :3]
    decoder(z)
    assert (maps[1].mean(dim=(2, 3)) - mean).abs().max() > 1e-2


def test_an_image_does_not_depend_on_its_batch():
    encoder, decoder = build()
    x, y, z, w = noise(3), noise(3, seed=5), latents(3), latents(3, seed=5)
    y[0], w[0] = x[0], z[0]
    assert torch.equal(encoder(x)[0][0], encoder(y)[0][0]) and torch.equal(decoder(z)[0], decoder(w)[0])


@pytest.mark.parametrize(
    "fields, part",
    [
        ({"class_dim": 7}, "class_dim: 7 leaves nothing of latent_dim 7 for the content; give at most 6"),
        ({"channels": [8] * 4}, "4 levels divide the resolution by 16"),
        ({"channels": [12, 12]}, "group_size: 8 does not divide"),
        ({"num_classes": 3}, "num_classes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, part):
    with pytest.raises(config.ConfigError) as caught:
        parse_model(SETTINGS | fields)
    assert part in str(caught.value)


# Translating


def test_translate_swaps_class_and_content(exported):
    model = sivae.load(exported["translation"])
    content, class_ = noise(3), noise(2, seed=4)
    found = model.translate(content, class_)
    assert found.shape == (3, 2, 3, 16, 16)
    mu_content, mu_class = model.encode(content)[0], model.encode(class_)[0]
    for i in range(3):
        for j in range(2):
            z = torch.cat([mu_class[j, :3], mu_content[i, 3:]])
            assert torch.allclose(found[i, j], model.decode(z[None])[0], atol=1e-5)  # another batch, other kernels
    assert torch.allclose(found, model.translate(content, class_, batch_size=1), atol=1e-5)
    itself = model.translate(content, content)
    assert torch.allclose(itself.diagonal().permute(3, 0, 1, 2), model.reconstruct(content), atol=1e-5)


def test_the_picture_has_contents_at_the_left_and_classes_at_the_top(exported, here):
    source, chosen = open_source("shapes:", resolution=16), [0, 999, 1999]  # all over the set
    for i in range(2):
        Image.fromarray(np.full((20, 30, 3), 90 * (i + 1), np.uint8)).save(here / f"{i}.png")
    os.mkdir("classes"), os.rename("0.png", "classes/0.png"), os.rename("1.png", "classes/1.png")
    assert main(["translate", exported["translation"], "shapes:", "classes", "--count", "3"]) == 0
    model = sivae.load(exported["translation"])
    content = torch.stack([torch.from_numpy(source[i].pixels).permute(2, 0, 1) for i in chosen])
    class_ = torch.stack([torch.full((3, 16, 16), 90 * (i + 1), dtype=torch.uint8) for i in range(2)])
    cells = model.to_uint8(model.translate(content, class_))
    tiles = [torch.full((3, 16, 16), 255, dtype=torch.uint8), *class_]
    for image, row in zip(content, cells):
        tiles += [image, *row]
    with Image.open("translation.png") as picture:
        assert np.array_equal(np.asarray(picture), grid(torch.stack(tiles), columns=3))


def test_one_content_and_one_class_of_a_set(exported, here):
    command = ["translate", exported["translation"], "shapes:#57", "shapes:#300", "--output", "one.png"]
    assert main(command) == 0
    with Image.open("one.png") as picture:
        assert picture.size == (2 * 66 + 2, 2 * 66 + 2)


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["CONV", "shapes:", "shapes:"], "a model of the conv family, whose latents have no class and no content"),
        (["TRANSLATION", "empty", "shapes:"], "no images in"),
        (["TRANSLATION", "shapes:", "nowhere"], "there is no source"),
        (["TRANSLATION", "shapes:#2000", "shapes:"], "images 0 to 1999"),
        (["TRANSLATION", "shapes:", "broken.png"], "broken.png: cannot be read as an image"),
        (["TRANSLATION", "shapes:", "shapes:", "--count", "0"], "--count: 0"),
        (["nowhere", "shapes:", "shapes:"], "nowhere: holds no model"),
    ],
)
def test_bad_input_is_one_sentence(exported, here, capsys, arguments, part):
    os.mkdir("empty")
    (here / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(["translate", *(exported.get(a.lower(), a) if a.isupper() else a for a in arguments)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sivae: error: ") and part in lines[0], lines
    assert not os.path.exists("translation.png")


def test_images_of_another_size_are_refused(exported):
    model = sivae.load(exported["translation"])
    with pytest.raises(UserError, match="do not fit this model"):
        model.translate(noise(1), torch.rand(1, 3, 32, 32))


# shapes:


def test_shapes_are_a_source_with_known_factors():
    source = open_source("shapes:", resolution=16)
    copy = pickle.loads(pickle.dumps(source))
    assert len(source) == len(copy) == NUM_CLASSES * NUM_CONTENTS == 2000 and source.num_classes == NUM_CLASSES == 16
    samples = [source[i] for i in range(2000)]
    assert [sample.label for sample in samples] == [i // NUM_CONTENTS for i in range(2000)]
    assert np.array_equal(copy[1234].pixels, samples[1234].pixels) and samples[0].pixels.shape == (16, 16, 3)
    assert len({sample.pixels.tobytes() for sample in samples}) == 2000  # no two factors look alike
    assert len(set(source.names)) == 2000
    assert source.fingerprint == copy.fingerprint != open_source("shapes:", resolution=32).fingerprint
    assert open_source("shapes:", resolution=16, labels=False)[7].label is None


def test_each_factor_of_shapes_does_what_it_says():
    """Colour: the ratio of channels. Place: the middle of what is lit. Rotation: the axis of a bar."""
    source = open_source("shapes:", resolution=64)
    at = (np.arange(64) + 0.5) / 32 - 1
    for i in range(0, 2000, 7):
        shape, colour, row, column, turn = np.unravel_index(i, (4, 4, 5, 5, 5))
        image = source[i].pixels.astype(float)
        total = image.sum(axis=(0, 1))
        assert total.argmax() == [0, 1, 2, 0][colour] and (colour != 3 or total[1] > 0.8 * total[0])
        light = image.sum(axis=2) / image.sum()
        y, x = (light.sum(axis=1) * at).sum(), (light.sum(axis=0) * at).sum()
        # the middle of a triangle's area is not quite that of its height
        assert abs(x - PLACES[column]) < 0.06 and abs(y - PLACES[row]) < 0.06
        if shape == 2:
            covariance = (light * np.outer(at - y, at - x)).sum()
            spread = (light.sum(axis=0) * (at - x) ** 2).sum() - (light.sum(axis=1) * (at - y) ** 2).sum()
            assert np.rad2deg(np.arctan2(2 * covariance, spread) / 2) == pytest.approx(DEGREES[turn], abs=1)


def test_training_sees_every_class_and_content_but_not_all_pairs():
    splits = open_source("shapes:", resolution=8).splits
    train, test = splits["train"], splits["test"]
    assert len(train) == 1600 and len(test) == 400 and not set(train) & set(test)
    for split in (train, test):
        assert set(split // NUM_CONTENTS) == set(range(NUM_CLASSES))
        assert set(split % NUM_CONTENTS) == set(range(NUM_CONTENTS))


def test_shapes_that_are_too_small_are_refused():
    with pytest.raises(UserError, match="cannot be told apart at 4 pixels"):
        open_source("shapes:", resolution=4)


def test_shapes_are_packed_on_first_use(here):
    stream = open_stream("shapes:", resolution=16, batch_size=4, split="test", progress=False)
    assert len(stream) == 400 and stream.num_classes == NUM_CLASSES
    batch, source = stream.sample([3]), open_source("shapes:", resolution=16)
    number = source.splits["test"][3]
    assert np.array_equal(batch.images[0].permute(1, 2, 0), source[number].pixels)
    assert batch.labels.tolist() == [number // NUM_CONTENTS]


# Training


def test_a_run_trains_and_translates(here):
    from sivae import trainer

    settings = config.load(
        str(Path(sivae.__file__).parents[1] / "configs" / "shapes_translation.yaml"),
        ["run.directory=run", "schedule.total_images=128", "schedule.batch_size=32", "data.num_workers=0", "tracking.tensorboard=false",
         "tracking.progress=false", "tracking.picture_images=128", "tracking.picture_count=4", "model.channels=[8,8]"],
    )  # fmt: skip
    trainer.train(settings)
    model = sivae.load("run")
    assert model.settings["family"] == "translation" and model.num_classes == 0
    fresh = inference.Model(model.settings)
    for trained, untrained in zip(model.encoder.parameters(), fresh.encoder.parameters()):
        assert not torch.equal(trained, untrained)  # every parameter of both encoders has a gradient
    assert model.sample(3).shape == (3, 3, 16, 16)
    assert main(["translate", "run", "shapes:#1", "shapes:#900"]) == 0 and os.path.exists("translation.png")
