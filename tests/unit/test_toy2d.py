"""Densities in the plane: samplers draw from the densities that they name, the figures are the published ones, and `sivae
toy2d` trains, goes on where it stopped, judges and draws.

    pytest tests/unit/test_toy2d.py
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sivae
from sivae import config, models, objectives, randomness, signals, toy2d
from sivae.cli import EXIT_ERROR, EXIT_INTERRUPTED, main
from sivae.data.toy2d import DENSITIES
from sivae.errors import UserError
from sivae.metrics import toy2d as metrics
from sivae.models import published
from tests.numerics.test_golden import FOLDER

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "toy2d"


# Densities


@pytest.mark.parametrize("name", DENSITIES)
def test_points_are_distributed_as_the_density_says(name):
    density, count = DENSITIES[name], 40_000
    bins, fine = (32, 12) if density.std else (32, 4)  # modes are narrow
    side = bins * fine
    axis = ((torch.arange(side) + 0.5) / side * 2 - 1) * density.limit
    cell = (2 * density.limit / side) ** 2
    values = density.density(torch.cartesian_prod(axis, axis)) * cell
    # The square holds all of it but the tails of the outer ring and arm.
    assert values.sum().item() == pytest.approx(1, abs=2e-3)
    shares = values.view(bins, fine, bins, fine).sum((1, 3)).numpy()
    points = density.sample(count, torch.Generator().manual_seed(0))
    assert points.dtype == torch.float32 and points.shape == (count, 2)
    edges = [[-density.limit, density.limit]] * 2
    counts = np.histogram2d(*points.double().numpy().T, bins=bins, range=edges)[0] / count
    # Total variation that chance alone gives: half the sum of the mean absolute deviations of the counts.
    chance = 0.5 * np.sqrt(shares * (1 - shares) / count * 2 / math.pi).sum()
    assert 0.5 * abs(counts - shares).sum() < 1.5 * chance


def test_samplers_are_the_published_ones():
    """Numbers of the published samplers: the radius and width of modes, corners of the board, radii of the rings, the arms."""
    generator = torch.Generator().manual_seed(0)
    eight = DENSITIES["8gaussians"].sample(20_000, generator)
    assert eight.norm(dim=1).mean().item() == pytest.approx(2 / 1.414, abs=1e-3)
    assert eight.norm(dim=1).std().item() == pytest.approx(0.02 / 1.414, rel=0.03)
    board = DENSITIES["checkerboard"].sample(20_000, generator)
    assert board.abs().max() <= 4 and ((board / 2).floor().sum(1) % 2 == 0).all()
    rings = DENSITIES["rings"].sample(20_000, generator).norm(dim=1)
    nearest = (rings[:, None] - torch.tensor([0.75, 1.5, 2.25, 3.0])).abs().min(1).values
    assert nearest.max() < 0.5 and nearest.mean().item() == pytest.approx(0.08 * math.sqrt(2 / math.pi), rel=0.05)
    spirals = DENSITIES["2spirals"].sample(20_000, generator)
    # The turn is 3 pi sqrt(u), the radius a third of it; noises and their mean along the arm add 0.06.
    assert spirals.square().sum(1).mean().item() == pytest.approx(math.pi**2 / 2 + 0.06, rel=0.02)
    assert spirals.mean(0).abs().max() < 0.05  # two arms, each the other's mirror
    many = DENSITIES["25gaussians"]
    assert len(many.centers) == 25 and many.centers.max().item() == pytest.approx(8 / 2.828)


# Figures


@pytest.fixture(scope="module")
def golden():
    return np.load(FOLDER / "toy_metrics.npz")


@pytest.mark.parametrize("limit", [2, 4])
def test_kl_and_jsd_are_the_published_ones(golden, limit):
    real, fake = golden["real"], golden["fake"]
    assert metrics.published_kl(real, fake, limit) == pytest.approx(float(golden[f"kl_range{limit}"]), rel=1e-6)
    assert metrics.published_jsd(real, fake, limit) == pytest.approx(float(golden[f"jsd_range{limit}"]), rel=1e-6)


def test_the_grid_normalized_elbo_is_the_published_one(golden):
    state = {name.removeprefix("init/"): torch.from_numpy(golden[name]) for name in golden.files if "init/" in name}
    found = published.convert(state)
    model = sivae.inference.Model(config.parse_model(found.settings).model_dump())
    for name in ("encoder", "decoder"):
        getattr(model, name).load_state_dict(found.networks[name])
    axis = torch.linspace(-2, 2, 64)
    grid = toy2d.negative_elbo(model, torch.cartesian_prod(axis, axis))
    points = toy2d.negative_elbo(model, torch.from_numpy(golden["gnelbo_batches"]).flatten(0, 1))
    # Recorded with sums in float32
    expected = float(golden["gnelbo_range2_pts64"])
    assert metrics.grid_normalized_elbo(grid, points) == pytest.approx(expected, rel=1e-6)


def test_the_textbook_figures_by_hand():
    """Two bins a side: shares (1/2, 1/2, 0, 0) and (1/4, 3/4, 0, 0)."""
    corner, other = [-0.5, -0.5], [-0.5, 0.5]
    real, fake = np.array([corner, other] * 2), np.array([corner, other, other, other])
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert metrics.histogram_kl(real, fake, 1.0, 2) == pytest.approx(kl)
    middle = [3 / 8, 5 / 8]
    jsd = 0.5 * sum(p * math.log(p / m) for p, m in zip([0.5, 0.5], middle))
    jsd += 0.5 * sum(p * math.log(p / m) for p, m in zip([0.25, 0.75], middle))
    assert metrics.histogram_jsd(real, fake, 1.0, 2) == pytest.approx(jsd)
    # The published ones are others: shares over a bin's area of 1, over 2 rows; the mixture first.
    assert metrics.published_kl(real, fake, 1.0, 2) == pytest.approx(kl / 2)
    reverse = sum(m * math.log(m / p) for m, p in zip(middle, [0.5, 0.5]))
    reverse += sum(m * math.log(m / p) for m, p in zip(middle, [0.25, 0.75]))
    assert metrics.published_jsd(real, fake, 1.0, 2) == pytest.approx(0.5 * reverse / 2)
    apart = np.array([[0.5, 0.5]])
    assert metrics.histogram_jsd(real, apart, 1.0, 2) == pytest.approx(math.log(2))
    assert metrics.histogram_kl(real, real, 1.0, 2) == 0
    with pytest.raises(ValueError, match="none of the 1 points"):
        metrics.histogram_kl(real, np.array([[5.0, 5.0]]), 1.0, 2)


def test_modes_that_are_covered_are_counted():
    density, generator = DENSITIES["8gaussians"], torch.Generator().manual_seed(0)
    points = density.sample(4000, generator).numpy()
    centers = density.centers.numpy()
    covered, on_mode = metrics.mode_coverage(points, centers, density.std)
    assert covered == 8 and on_mode == pytest.approx(1 - math.exp(-4.5), abs=0.005)
    some = points[np.linalg.norm(points[:, None] - centers[:3], axis=2).min(1) < 0.2]
    assert metrics.mode_coverage(some, centers, density.std)[0] == 3
    stray = np.concatenate([some, centers[3:4]])  # one point makes no mode
    assert metrics.mode_coverage(stray, centers, density.std)[0] == 3
    assert metrics.mode_coverage(points * 1.2, centers, density.std) == (0, 0.0)
    # A mode's fair share is of the points that are on modes, however few.
    mostly_off = np.concatenate([points * 1.2, points[:400]])
    assert metrics.mode_coverage(mostly_off, centers, density.std)[0] == 8


# Training


def settings(folder, *overrides):
    small = [
        f"run.directory={folder}", "run.seeds=[1,4]", "run.precision=float32", "model.num_hidden=16", "model.num_layers=1",
        "schedule.total_images=1280", "schedule.batch_size=64", "schedule.lr_schedule.milestones_images=[640,960]",
        "objectives.soft_intro_vae.vae_images=320", "run.checkpoint_images=640",
    ]  # fmt: skip
    return config.load(str(CONFIGS / "8gaussians.yaml"), [*small, *overrides], toy2d.Toy2dConfig)


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    """Figures of few points: what is tested is that they are there, and which."""
    monkeypatch.setattr(toy2d, "NUM_POINTS_FINE", 6000)
    monkeypatch.setattr(toy2d, "GRID_SIDE", 64)
    monkeypatch.setattr(toy2d, "NUM_ELBO_POINTS", 256)


def weights(folder, seed):
    model = sivae.load(f"{folder}/models/{seed}")
    return {**model.encoder.state_dict(), **{f"d.{key}": value for key, value in model.decoder.state_dict().items()}}


def same(first, second) -> bool:
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_run_leaves_models_figures_and_a_picture(tmp_path):
    found = toy2d.train(settings(tmp_path))
    assert [entry["seed"] for entry in found] == [1, 4] and all(entry["finite"] for entry in found)
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    assert all(entry["images_seen"] == 1280 for entry in found)
    assert {"kl", "jsd", "gnelbo", "histogram_kl", "histogram_jsd", "modes", "on_mode"} < set(found[0])
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    assert not same(weights(tmp_path, 1), weights(tmp_path, 4))
    again = toy2d.train(settings(tmp_path))  # nothing left to train; judged the same
    assert again == found


def test_figures_say_how_many_images_the_models_have_seen(tmp_path):
    """Whole steps of 64; and a shorter run in the same directory does not undo the longer one."""
    assert toy2d.train(settings(tmp_path, "schedule.total_images=200"))[0]["images_seen"] == 256
    assert toy2d.train(settings(tmp_path, "schedule.total_images=64"))[0]["images_seen"] == 256


def test_the_models_are_those_of_the_pure_objectives(tmp_path):
    """The whole run by hand: plain networks and Adam, the warm-up, the milestones, the draws."""
    toy2d.train(settings(tmp_path))
    encoder, decoder = models.build("mlp", seed=4, sample_shape=[2], latent_dim=2, num_hidden=16, num_layers=1)
    adams = [torch.optim.Adam(network.parameters(), lr=2e-4) for network in (encoder, decoder)]
    soft = objectives.SoftIntroVae(0.2, 0.3, "mse", beta_neg=0.9, scale=0.5)
    for step in range(20):
        x, draws = toy2d.step_draws(DENSITIES["8gaussians"], [4], step * 64, 64, 2)
        x = x[0]
        own = objectives.Draws(
            draws.z_prior[0], draws.eps_real[0], draws.eps_rec[0], draws.eps_fake[0], eps_rec_d=None, eps_fake_d=None
        )
        objective = objectives.Vae(0.2, 0.3) if step < 5 else soft
        for adam in adams:
            adam.param_groups[0]["lr"] = 2e-4 * (1 if step < 10 else 0.1 if step < 15 else 0.01)
        decoder.requires_grad_(False)
        first = objective.encoder_phase(encoder, decoder, x, own)
        adams[0].zero_grad()
        first.loss.backward()
        adams[0].step()
        decoder.requires_grad_(True)
        second = objective.decoder_phase(encoder, decoder, x, first.z, own)
        adams[1].zero_grad()
        second.loss.backward()
        adams[1].step()
    ours = {**encoder.state_dict(), **{f"d.{key}": value for key, value in decoder.state_dict().items()}}
    for key, value in weights(tmp_path, 4).items():
        # Adam divides by gradients that are nearly zero: rounding shows in units of the learning rate.
        torch.testing.assert_close(value, ours[key], rtol=0, atol=2e-5, msg=key)


def test_stopped_and_run_again_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    toy2d.train(settings(tmp_path / "whole"))
    steps = 0
    step_draws = toy2d.step_draws

    def asks_to_stop(*arguments):
        nonlocal steps
        steps += 1
        if steps == 7:
            signals.ask()
        return step_draws(*arguments)

    monkeypatch.setattr(toy2d, "step_draws", asks_to_stop)
    with pytest.raises(toy2d.Stopped, match="448 images"):
        toy2d.train(settings(tmp_path / "parts"))
    toy2d.train(settings(tmp_path / "parts"))
    assert steps == 20
    for seed in (1, 4):
        assert same(weights(tmp_path / "whole", seed), weights(tmp_path / "parts", seed))


def test_a_seed_does_not_depend_on_those_beside_it(tmp_path):
    toy2d.train(settings(tmp_path / "both"))
    toy2d.train(settings(tmp_path / "alone", "run.seeds=[4]"))
    for key, value in weights(tmp_path / "alone", 4).items():
        torch.testing.assert_close(value, weights(tmp_path / "both", 4)[key], rtol=0, atol=2e-5, msg=key)


def test_a_model_is_judged_by_other_draws_than_it_began_with(monkeypatch):
    monkeypatch.setattr(toy2d, "GRID_SIDE", 8)
    density, seeds = DENSITIES["8gaussians"], []

    def sample(count, generator):
        seeds.append(generator.initial_seed())
        return density.sample(count, generator)

    model = sivae.inference.Model(config.parse_model({"family": "mlp", "num_hidden": 8}).model_dump())
    assert toy2d.judge(model, replace(density, sample=sample), 3)["finite"]
    assert seeds and randomness.generator(3, 0).initial_seed() not in seeds


def test_a_model_all_of_whose_samples_are_far_away_has_no_figures(monkeypatch):
    monkeypatch.setattr(toy2d, "GRID_SIDE", 8)
    model = sivae.inference.Model(config.parse_model({"family": "mlp", "num_hidden": 8}).model_dump())
    model.decoder.layers[-1].bias.fill_(100.0)
    figures = toy2d.judge(model, DENSITIES["rings"], 0)
    assert not figures["finite"] and figures["histogram_kl"] is None


def test_a_model_that_diverged_is_told_from_one_that_did_not():
    model = sivae.inference.Model(config.parse_model({"family": "mlp", "num_hidden": 8}).model_dump())
    assert toy2d.judge(model, DENSITIES["rings"], 0)["finite"]
    model.decoder.layers[0].weight.fill_(math.nan)
    figures = toy2d.judge(model, DENSITIES["8gaussians"], 0)
    assert not figures["finite"] and figures["kl"] is None and figures["modes"] is None
    toy2d.table([{"seed": 1, **figures}])


def test_the_command(tmp_path, capsys):
    overrides = [
        f"run.directory={tmp_path}", "run.seeds=[0,1]", "method=intro_vae", "model.num_hidden=8", "schedule.total_images=1024",
    ]  # fmt: skip
    assert main(["toy2d", str(CONFIGS / "25gaussians.yaml"), *overrides]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["seed", "finite", "kl"] and [line.split()[0] for line in printed[1:3]] == [
        "0",
        "1",
    ]
    assert f"picture: {tmp_path}/density.png" in printed[3]
    signals.ask()
    stopped = main(["toy2d", str(CONFIGS / "25gaussians.yaml"), *overrides, f"run.directory={tmp_path}/other"])
    assert stopped == EXIT_INTERRUPTED


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("density=9gaussians", "density: input should be '8gaussians'"),
        ("run.seeds=[1,1]", "run.seeds: [1, 1] must be different"),
        ("run.seedz=[1]", "run.seedz: unknown setting; did you mean `seeds`?"),
        ("objectives.soft_intro_vae.gamma_r=1.0", "objectives.soft_intro_vae.gamma_r: must be 0"),
        ("objectives.vae.margin=1.0", "objectives.vae.margin: unknown setting"),
        ("objectives.intro_vae.style_mixing=0.5", "objectives.intro_vae: points have no style_mixing"),
        ("objectives.vae.augment=[cutout]", "objectives.vae: points have no style_mixing and no augment"),
        (
            "objectives.soft_intro_vae.reconstruction=bce",
            "objectives.soft_intro_vae.reconstruction: bce needs values in",
        ),
        ("model.sample_shape=[3]", "model: points in the plane need sample_shape=[2]"),
        ("data.url=digits:", "data: unknown setting"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, capsys, override, sentence):
    code = main(["toy2d", str(CONFIGS / "rings.yaml"), f"run.directory={tmp_path}/run", override])
    told = capsys.readouterr().err
    assert code == EXIT_ERROR and sentence in told and len(told.splitlines()) == 1, told
    assert not (tmp_path / "run").exists()


def test_a_file_for_the_other_command_is_told(capsys):
    for command, path, other in (
        ("toy2d", ROOT / "configs" / "digits.yaml", "train"),
        ("train", CONFIGS / "rings.yaml", "toy2d"),
    ):
        assert main([command, str(path)]) == EXIT_ERROR
        assert f"{path}: is for `sivae {other}`" in capsys.readouterr().err


def test_a_directory_of_another_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    toy2d.train(settings(folder))
    before = (folder / "config.yaml").read_text()
    for override, told in {
        "run.seeds=[2]": r"another run.seeds \(\[1, 4\]\)", "density=rings": "another density \\('8gaussians'\\)",
        "method=vae": "another method", "run.precision=bfloat16": "another run.precision", "model.num_hidden=8": "another model.num_hidden",
        "schedule.batch_size=32": "another schedule.batch_size",
        "objectives.soft_intro_vae.beta_neg=0.1": "another objectives.soft_intro_vae.beta_neg",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=told):
            toy2d.train(settings(folder, override))
    assert (folder / "config.yaml").read_text() == before
    # What another method would take does not matter, and a longer run goes on.
    longer = toy2d.train(settings(folder, "objectives.vae.beta_kl=9.0", "schedule.total_images=1344"))
    assert longer[0]["images_seen"] == 1344


def test_a_damaged_state_is_told(tmp_path):
    toy2d.train(settings(tmp_path))
    whole = (tmp_path / "state.safetensors").read_bytes()
    for bad in (b"", whole[:100], whole[:-8]):
        (tmp_path / "state.safetensors").write_bytes(bad)
        with pytest.raises(UserError, match="state.safetensors: is damaged, of another run or of another version"):
            toy2d.train(settings(tmp_path))


def test_without_matplotlib_nothing_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib"):
        toy2d.train(settings(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_the_published_one(path):
    found = config.load(str(path), schema=toy2d.Toy2dConfig)
    assert found.density == path.stem and found.schedule.batch_size == 512 and found.schedule.lr == 2e-4
    assert found.schedule.total_images == 30_000 * 512
    assert found.schedule.lr_schedule.milestones_images == [10_000 * 512, 15_000 * 512]
    assert found.model == config.MlpModel(num_hidden=256, num_layers=3)
    # Of the README: beta_kl, beta_neg; beta_rec is 0.2 everywhere, and 25 Gaussians are not in it.
    betas = {"8gaussians": (0.3, 0.9), "2spirals": (0.5, 1.0), "checkerboard": (0.1, 0.2), "rings": (0.2, 1.0)}
    soft = found.objectives.soft_intro_vae
    assert (soft.beta_kl, soft.beta_neg) == betas.get(path.stem, (soft.beta_kl, soft.beta_neg))
    for objective in (soft, found.objectives.vae, found.objectives.intro_vae):
        assert (objective.beta_rec, objective.beta_kl) == (0.2, soft.beta_kl)
    assert soft.vae_images == found.objectives.intro_vae.vae_images == 2000 * 512
