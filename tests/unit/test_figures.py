"""Proves what the figures of a model show: tiles where they belong, equal to what the model makes of the same latents, and the
pictures and the GIF that the commands write of them.

    python -m pytest tests/unit/test_figures.py
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sivae
from sivae import config, figures, images, inference, trainer
from sivae.cli import main
from sivae.config import parse_model
from sivae.errors import UserError
from sivae.randomness import fixed_latents
from tests.processes import ROOT

SIZE = 16
TREES = {
    "style": {"family": "style", "num_channels": 1, "resolution": SIZE, "base_channels": 4, "max_channels": 8, "latent_dim": 6, "num_mapping_layers": 2},
    "conv": {"family": "conv", "num_channels": 1, "resolution": SIZE, "channels": [8, 8], "latent_dim": 6},
    "classes": {"family": "style", "num_channels": 1, "resolution": SIZE, "base_channels": 4, "max_channels": 8, "latent_dim": 6, "num_mapping_layers": 2, "num_classes": 10},
    "mlp": {"family": "mlp", "sample_shape": [1, SIZE, SIZE], "latent_dim": 6, "num_hidden": 8},
    "conditional": {"family": "conv", "num_channels": 1, "resolution": SIZE, "channels": [8, 8], "latent_dim": 6, "num_classes": 10},
}  # fmt: skip


def model_of(name):
    model = inference.Model(parse_model(TREES[name]).model_dump())
    if name in ("style", "classes"):
        model.decoder.average_style.copy_(torch.randn(6, generator=torch.Generator().manual_seed(1)))
        for head in model.decoder.to_rgb:  # random weights alone make images that are grey to a value or two
            head.weight.mul_(30)
    return model


@pytest.fixture
def real():
    return torch.randint(0, 256, (5, 1, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tiles_of(figure):
    return figure.tiles.unflatten(0, (len(figure.rows), len(figure.columns)))


def close(a, b):
    """Batches of another size round differently: one level of 256 at most."""
    return (a.int() - b.int()).abs().max() <= 1


@pytest.mark.parametrize("num_coarse", [0, 2, 6])
def test_style_mixing_has_coarse_sources_left_and_fine_ones_on_top(num_coarse):
    model, z = model_of("style"), fixed_latents(0, 5, 6)
    coarse, fine = z[:3], z[3:]
    found = tiles_of(figures.style_mixing(model, coarse, fine, num_coarse))
    assert found.shape == (4, 3, 1, SIZE, SIZE) and found.dtype == torch.uint8 and (found[0, 0] == 255).all()
    assert close(found[1:, 0], model.to_uint8(model.decode(coarse))) and close(
        found[0, 1:], model.to_uint8(model.decode(fine))
    )
    for row in range(3):
        for column in range(2):
            mixed = model.to_uint8(model.mix(coarse[row : row + 1], fine[column : column + 1], num_coarse))[0]
            assert close(found[1 + row, 1 + column], mixed)
            assert close(mixed, found[1 + row, 0]) == (num_coarse == 6)  # all layers follow the row, or
            assert close(mixed, found[0, 1 + column]) == (num_coarse == 0)  # none does


def test_truncation_meets_at_the_average_and_ends_at_the_samples():
    model = model_of("style")
    figure = figures.truncation_sweep(model, count=4, seed=3, num_steps=5)
    found = tiles_of(figure)
    assert figure.columns == ["psi -1", "psi -0.5", "psi 0", "psi 0.5", "psi 1"] and len(figure.rows) == 4
    assert (found[:, 2] == found[:1, 2]).all()  # the average style, whatever the seed
    assert close(found[:, 4], model.to_uint8(model.sample(4, seed=3)))
    assert close(found[:, 3], model.to_uint8(model.sample(4, seed=3, truncation=0.5)))
    assert not close(found[:, 0], found[:, 4]) and not close(found[0, 4], found[1, 4])


def test_levels_show_each_size_of_the_same_images(real):
    model = model_of("style")
    figure = figures.levels(model, real)
    found = tiles_of(figure)
    assert figure.rows == ["real", "4 px", "8 px", "16 px"] and found.shape[:2] == (4, 5)
    assert torch.equal(found[0], real)
    assert close(found[3], model.to_uint8(model.reconstruct(real)))
    for row, cell in ((1, 4), (2, 2)):  # enlarged by repeating pixels, and not of fewer
        assert torch.equal(
            found[row], found[row, ..., ::cell, ::cell].repeat_interleave(cell, -1).repeat_interleave(cell, -2)
        )
        assert len(found[row, 0, 0, ::cell, ::cell].unique()) > 1
    # What the encoder sees there is the mean of each square.
    small = real.float().unflatten(-1, (4, 4)).unflatten(-3, (4, 4)).mean((-1, -3)) / 127.5 - 1
    assert close(found[1, ..., ::4, ::4], model.to_uint8(model.reconstruct_level(small, 0)))


def test_the_level_that_fades_in_is_shown_as_far_as_it_has(real):
    model = model_of("style")
    model.info["stage"] = model.stage = {"level": 1, "blend": 0.25}
    small = real[..., :8, :8]
    found = tiles_of(figures.levels(model, small))
    assert len(found) == 3 and close(found[2], model.to_uint8(model.reconstruct(small)))


def test_levels_that_were_not_trained_are_not_shown(real):
    model = model_of("style")
    model.info["stage"] = {}
    with pytest.raises(UserError, match="levels of detail: this model did not grow"):
        figures.levels(model, real)


@pytest.mark.parametrize("name", TREES)
def test_traversals_move_one_dimension_of_the_first_image(name, real):
    model = model_of(name)
    labels = torch.arange(5) + 3 if model.num_classes else None
    figure = figures.traversals(model, real, num_dims=4, num_steps=3, labels=labels, reach=2.0)
    found = tiles_of(figure)
    assert found.shape == (4, 3, 1, SIZE, SIZE) and figure.columns == ["-2", "0", "2"]
    mu, logvar = model.encode(real, labels)
    divergence = (0.5 * (mu**2 + logvar.exp() - logvar - 1)).mean(0)
    dims = divergence.argsort(descending=True)[:4].tolist()
    assert figure.rows == [f"z{dim}\n{divergence[dim]:.2g} nats" for dim in dims]
    for row, dim in enumerate(dims):
        for column, value in enumerate((-2.0, 0.0, 2.0)):
            z = mu[:1].clone()
            z[0, dim] = value
            assert close(found[row, column], model.to_uint8(model.decode(z, None if labels is None else labels[:1]))[0])
    assert not torch.equal(found[0, 0], found[0, 2])


def test_more_images_than_a_batch_are_decoded_in_parts(real, monkeypatch):
    model = model_of("style")
    whole = figures.levels(model, real), figures.traversals(model, real, 6, 3), figures.style_mixing(model, *fixed_latents(0, 6, 6).split(3), 2)  # fmt: skip
    monkeypatch.setattr(figures, "BATCH", 2)
    parts = figures.levels(model, real), figures.traversals(model, real, 6, 3), figures.style_mixing(model, *fixed_latents(0, 6, 6).split(3), 2)  # fmt: skip
    for a, b in zip(whole, parts):
        assert (a.rows, a.columns) == (b.rows, b.columns) and close(a.tiles, b.tiles)


def test_other_families_have_no_styles(real):
    model, z = model_of("conv"), fixed_latents(0, 2, 6)
    for draw in (
        lambda: figures.style_mixing(model, z, z, 1),
        lambda: figures.truncation_sweep(model, 2, 0, 3),
        lambda: figures.levels(model, real),
    ):
        with pytest.raises(UserError, match="only the style family has it"):
            draw()


def test_a_table_has_names_beside_its_tiles(real):
    bare = images.grid(real[:4], 2)
    found = images.table(real[:4], ["one", "two\nlines"], ["a", "b"])
    assert np.array_equal(found[-bare.shape[0] :, -bare.shape[1] :], bare)
    assert found.shape == (bare.shape[0] + images.NAME_HEIGHT, bare.shape[1] + images.NAME_WIDTH, 3)
    for part in (found[: images.NAME_HEIGHT, -bare.shape[1] :], found[-bare.shape[0] :, : images.NAME_WIDTH]):
        halves = np.array_split(part, 2, axis=int(part.shape[1] > part.shape[0]))
        assert all(half.min() < 128 for half in halves)
    assert np.array_equal(images.table(real[:4], ["", ""], ["", ""]), bare)


def frames_of(data):
    with Image.open(io.BytesIO(data)) as gif:
        found = []
        for index in range(gif.n_frames):
            gif.seek(index)
            found.append(np.asarray(gif.convert("RGB")))
        return found, gif.info


def test_a_gif_goes_there_and_back(real):
    frames, info = frames_of(images.gif_bytes(real, frames_per_sec=20))
    assert len(frames) == 2 * len(real) - 2 and info["loop"] == 0 and info["duration"] == 50
    for frame, number in zip(frames, (0, 1, 2, 3, 4, 3, 2, 1)):  # grey needs no more than 256 colours
        assert np.array_equal(frame, images.tile(real[number]))


@pytest.fixture
def folder(tmp_path, monkeypatch, real):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIVAE_DEBUG", "")
    for name in TREES:
        inference.export(model_of(name), name)
    np.save("real.npy", real.permute(0, 2, 3, 1).numpy())
    return tmp_path


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def drawn(figure):
    return images.table(figure.tiles, figure.rows, figure.columns)


def test_the_commands_draw_the_figures(folder, real):
    model = sivae.load("style")
    z = fixed_latents(7, 4, 6)
    assert main(["stylemix", "style", "--count", "2", "--seed", "7", "--coarse-layers", "3"]) == 0
    assert np.array_equal(picture("stylemix.png"), drawn(figures.style_mixing(model, z[:2], z[2:], 3)))
    assert main(["stylemix", "style", "--count", "2", "--rows", "real.npy", "--columns", "real.npy#4"]) == 0
    mu, _ = model.encode(real)
    assert (
        np.abs(picture("stylemix.png").astype(int) - drawn(figures.style_mixing(model, mu[:2], mu[4:], 3))).max() <= 1
    )
    assert main(["sample", "style", "--truncation-sweep", "3"]) == 0
    assert np.array_equal(picture("samples.png"), drawn(figures.truncation_sweep(model, 8, 0, 3)))
    assert main(["reconstruct", "style", "real.npy", "--levels", "--count", "3"]) == 0
    assert np.array_equal(picture("reconstructions.png"), drawn(figures.levels(model, real[:3])))
    assert main(["traverse", "conv", "real.npy", "--dims", "2", "--steps", "3"]) == 0
    assert np.array_equal(picture("traversals.png"), drawn(figures.traversals(sivae.load("conv"), real, 2, 3)))


def test_a_conditional_models_styles(folder, real):
    """Samples of a sweep are of all classes, as those of `sample`; images are encoded as their own class and mixed in one."""
    model, classes = sivae.load("classes"), torch.arange(5) + 3
    sweep = tiles_of(figures.truncation_sweep(model, 4, 0, 3))
    assert close(sweep[:, 2], model.to_uint8(model.sample(4, seed=0)))
    assert close(sweep[:, 0], model.to_uint8(model.sample(4, seed=0, truncation=-1)))
    np.savez("labelled.npz", images=np.load("real.npy"), labels=classes.numpy())
    assert main(["stylemix", "classes", "--rows", "labelled.npz", "--columns", "real.npy", "--label", "2"]) == 0
    rows, columns = model.encode(real, classes)[0], model.encode(real, torch.full((5,), 2))[0]
    expected = drawn(figures.style_mixing(model, rows, columns, 3, 2))
    assert np.abs(picture("stylemix.png").astype(int) - expected).max() <= 1


def test_the_ends_of_an_interpolation_are_the_reconstructions(folder, real):
    assert main(["interpolate", "style", "real.npy#1", "real.npy#3", "--gif", "new/path.gif", "--frames", "7"]) == 0
    frames, _ = frames_of(Path("new/path.gif").read_bytes())
    assert len(frames) == 12
    model = sivae.load("style")
    ends = model.to_uint8(model.reconstruct(real[[1, 3]]))
    for frame, end in ((frames[0], ends[0]), (frames[6], ends[1])):
        assert np.abs(frame.astype(int) - images.tile(end)).max() <= 1
    assert not np.array_equal(frames[0], frames[6])
    strip = picture("interpolation.png")
    assert strip.shape == images.grid(real[[0] * 12], 12).shape


def test_each_end_of_trainings_interpolation_is_encoded_as_its_own_class(real):
    model, labels = model_of("conditional"), torch.tensor([1, 2, 3, 4, 5])
    ends = tiles_of(figures.of_training(model, real, labels, seed=0)["interpolation"])[0, [1, -2]]
    assert close(ends, model.to_uint8(model.reconstruct(real[:2], labels[:2])))
    assert not close(ends[1:], model.to_uint8(model.reconstruct(real[1:2], labels[:1])))


def test_training_draws_them_of_its_average(tmp_path, cache_dir):
    settings = config.load(str(ROOT / "configs" / "digits.yaml")).model_dump()
    settings["model"] = TREES["style"]
    settings["run"]["directory"] = str(tmp_path)
    settings["data"] |= {"cache_dir": cache_dir, "num_workers": 0}
    settings["schedule"] |= {"total_images": 16, "batch_size": 16}
    settings["tracking"] |= {"progress": False, "picture_images": 16, "picture_count": 5}
    trainer.train(config.parse(settings))
    names = {path.name.partition("-")[0]: path for path in (tmp_path / "pictures").iterdir()}
    assert set(names) == {"samples", "traversals", "interpolation", "stylemix", "truncation"}
    model, z = sivae.load(str(tmp_path)), fixed_latents(0, 8, 6)
    assert (
        np.abs(picture(names["stylemix"]).astype(int) - drawn(figures.style_mixing(model, z[:4], z[4:], 3))).max() <= 1
    )
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert all(name.encode() in events for name in names)


def test_figures_of_training_stay_small():
    model = inference.Model(parse_model(TREES["mlp"] | {"sample_shape": [1, 256, 256]}).model_dump())
    found = figures.of_training(model, torch.zeros(2, 1, 256, 256, dtype=torch.uint8), None, seed=0)
    assert list(found) == ["traversals", "interpolation"] and found["traversals"].tiles.shape == (42, 1, 128, 128)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["stylemix", "conv"], "layers of styles: this is a model of the conv family; only the style family has it"),
        (["stylemix", "style", "--coarse-layers", "7"], "--coarse-layers: 7 is not in 0 .. 6, the layers of this model"),
        (["stylemix", "style", "--count", "0"], "--count: 0 is not a number of rows and columns"),
        (["stylemix", "style", "--label", "1"], "--label: this model is not conditional on classes"),
        (["stylemix", "classes", "--rows", "real.npy"], "--label: this model is conditional on classes"),
        (["sample", "conv", "--truncation-sweep", "3"], "truncation: this is a model of the conv family"),
        (["sample", "style", "--truncation-sweep", "3", "--folder", "f"], "--folder: goes without --truncation-sweep"),
        (["sample", "style", "--truncation-sweep", "1"], "--truncation-sweep: 1 is too few, both ends make 2"),
        (["reconstruct", "mlp", "real.npy", "--levels"], "layers of styles: this is a model of the mlp family"),
        (["traverse", "conv", "real.npy", "--dims", "0"], "--dims: 0 is too few, give 1 or more"),
        (["traverse", "conv", "real.npy", "--reach", "-1"], "--reach: -1.0 is not a distance above 0"),
        (["traverse", "conv", "real.npy#9"], "real.npy: has images 0 to 4, not 9"),
        (["interpolate", "conv", "real.npy#0", "real.npy#1", "--gif", "a.gif", "--frames", "1"], "--frames: 1 is too few, both ends make 2"),
    ],
)  # fmt: skip
def test_wrong_questions_get_one_sentence(folder, arguments, sentence, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sivae: error: {sentence}") and error.count("\n") == 1
    assert not list(folder.glob("*.png"))
