"""Models of densities in the plane: `sivae toy2d CONFIG` trains one model for each seed, all at once, and judges them.

Source: Daniel and Tamar, Soft-IntroVAE (arXiv 2012.13253), the 2D experiments. This is a trainer of its own and not `sivae train`:
its samples are drawn, not streamed, they are no images, and its models are so small that one process steps all seeds
together (`sivae.stacked_step`). Ranks, ZeRO stages, shards, averages and picture grids mean nothing here, and the settings
that mean nothing are not there.

What a model draws is a function of its seed and the images seen: restarts change nothing, the seeds beside it but rounding.
"""

from __future__ import annotations

import io
import json
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sivae import inference, models, objectives, randomness, schedule
from sivae.config.model import MlpModel
from sivae.config.objective import IntroVaeObjective, SoftIntroVaeObjective, VaeObjective
from sivae.config.run import LearningRateSchedule
from sivae.config.section import Section
from sivae.data.toy2d import DENSITIES, Density
from sivae.distributed import pick_device
from sivae.errors import UserError, require_matplotlib
from sivae.metrics import toy2d as metrics
from sivae.objectives import Draws
from sivae.progress import progress_bar
from sivae.signals import StopSignals
from sivae.stacked_step import StackedModels
from sivae.storage import Folder

STATE_FILE, FIGURES_FILE, PICTURE_FILE = "state.safetensors", "figures.json", "density.png"
NUM_POINTS = 5000  # real and generated ones, for the published figures
NUM_POINTS_FINE = 100_000  # for the textbook's, which want full bins
GRID_SIDE, NUM_ELBO_POINTS = 1024, 12_800  # of gnELBO, as published
LOOK_STEPS = 50  # between looks at the losses


class Toy2dRun(Section):
    directory: str = Field(min_length=1)
    """Where the state, the models, the figures and the picture go: a folder or any fsspec URL."""
    seeds: list[int] = Field([0, 1, 2, 3, 4], min_length=1)
    """One model for each; its weights, points and draws are a function of its seed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU when there is one."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16 is for the products of the hidden layers alone; weights, coordinates and losses are float32."""
    checkpoint_images: int = Field(512_000, gt=0)
    """Save the state every so many images of each model, to go on from."""

    @model_validator(mode="after")
    def _check(self):
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: {self.seeds} must be different, and none negative")
        return self


class Toy2dObjectives(Section):
    """The recipe of each method for one density."""

    vae: VaeObjective
    intro_vae: IntroVaeObjective
    soft_intro_vae: SoftIntroVaeObjective

    @model_validator(mode="after")
    def _check(self):
        for name, objective in (
            ("vae", self.vae),
            ("intro_vae", self.intro_vae),
            ("soft_intro_vae", self.soft_intro_vae),
        ):
            if getattr(objective, "style_mixing", 0) or objective.augment:
                raise ValueError(f"{name}: points have no style_mixing and no augment; remove them")
            if objective.reconstruction == "bce":
                raise ValueError(
                    f"{name}.reconstruction: bce needs values in [0, 1], which points have not; set mse or l1"
                )
        if self.soft_intro_vae.gamma_r:
            raise ValueError("soft_intro_vae.gamma_r: must be 0; the published 1e-8 is the same to rounding")
        return self


class Toy2dSchedule(Section):
    total_images: int = Field(15_360_000, gt=0)
    """Points that each model sees; published 30,000 steps."""
    batch_size: int = Field(512, gt=0)
    """Points of each model in one step."""
    lr: float = Field(2e-4, gt=0)
    """Learning rate of both Adams."""
    lr_schedule: LearningRateSchedule = LearningRateSchedule()
    """How it goes over the images of the run."""


class Toy2dConfig(Section):
    """One run: some seeds of one method on one density."""

    run: Toy2dRun
    density: Literal["8gaussians", "2spirals", "checkerboard", "rings", "25gaussians"]
    """What the points are drawn from."""
    method: Literal["vae", "intro_vae", "soft_intro_vae"] = "soft_intro_vae"
    """Which of the objectives to train with."""
    objectives: Toy2dObjectives
    model: MlpModel = MlpModel()
    schedule: Toy2dSchedule = Toy2dSchedule()

    @model_validator(mode="after")
    def _check(self):
        if self.model.sample_shape != [2] or self.model.num_classes or self.model.output != "linear":
            raise ValueError("model: points in the plane need sample_shape=[2], num_classes=0 and output=linear")
        return self

    @property
    def objective(self):
        return getattr(self.objectives, self.method)


class Stopped(Exception):
    """A signal asked to stop; the state is saved."""


def train(settings: Toy2dConfig, description: str = "train") -> list[dict[str, Any]]:
    """Train all seeds, or go on where the run directory's state stands; judge, draw, write everything. Returns the figures
    of each seed, in their order; see `judge`. Raises Stopped on a signal, UserError on what a user can mend."""
    folder = Folder(settings.run.directory)
    require_matplotlib("the pictures of densities")
    networks, images_seen = train_networks(settings, folder, description)
    density, found = DENSITIES[settings.density], []
    with progress_bar(len(networks), "judge", " models") as bar:
        for seed, model in zip(settings.run.seeds, networks):
            known = {"seed": seed, "images_seen": images_seen}
            found.append({**known, **judge(model, density, seed)})
            inference.export(model, f"{folder.url}/models/{seed}")
            bar.update()
    folder.write(json.dumps(found, indent=1).encode(), FIGURES_FILE)
    titled = {f"seed {seed}": model for seed, model in zip(settings.run.seeds, networks)}
    folder.write(draw(density, titled), PICTURE_FILE)
    return found


def train_networks(settings: Toy2dConfig, folder: Folder, description: str) -> tuple[list[inference.Model], int]:
    """One trained model for each seed, in eval mode on the run's device, and the images that each has seen."""
    seeds, rates, device = settings.run.seeds, settings.schedule, pick_device(settings.run.device)
    fields = settings.model.model_dump()
    stack = StackedModels(
        [models.build(seed=seed, **fields) for seed in seeds], rates.lr, getattr(torch, settings.run.precision), device
    )
    images_seen = _restore(stack, settings, folder)
    folder.write(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False).encode(), "config.yaml")
    objective = objectives.build(num_values=2, **settings.objective.loss_fields())
    warm_up = objectives.Vae(objective.beta_rec, objective.beta_kl, objective.reconstruction)
    size, density = rates.batch_size, DENSITIES[settings.density]
    with StopSignals() as stop, progress_bar(rates.total_images, description, " images", initial=images_seen) as bar:
        while images_seen < rates.total_images:
            x, draws = step_draws(density, seeds, images_seen, size, settings.model.latent_dim, device)
            now = warm_up if images_seen < getattr(settings.objective, "vae_images", 0) else objective
            images_seen += size
            factor = schedule.lr_factor(images_seen, rates.total_images, **rates.lr_schedule.model_dump())
            stack.set_lr(rates.lr * factor)
            terms = stack.step(now, x, draws)
            last = images_seen >= rates.total_images
            if last or schedule.due(images_seen, size, LOOK_STEPS * size):
                bar.update(min(images_seen, rates.total_images) - bar.n)
                shown = {"enc": "loss_encoder", "dec": "loss_decoder", "rec": "rec", "kl": "kl_real"}
                bar.set_postfix({name: f"{terms[term].mean().item():.4g}" for name, term in shown.items()}, refresh=False)  # fmt: skip
            if last or stop.requested or schedule.due(images_seen, size, settings.run.checkpoint_images):
                _save(stack, seeds, images_seen, folder)
            if stop.requested and not last:
                raise Stopped(f"stopped at {images_seen:,} images; run the same command to go on")
    return _models(stack, settings, device), images_seen


def step_draws(
    density: Density, seeds: list[int], images_seen: int, size: int, latent_dim: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Draws]:
    """Points [S, size, 2] and the draws [S, size, latent_dim] of the step that begins at `images_seen`."""
    generators = [randomness.generator(seed, images_seen) for seed in seeds]
    points = torch.stack([density.sample(size, generator) for generator in generators])
    return points.to(device), normals(generators, size, latent_dim, device)


def normals(generators: list[torch.Generator], size: int, latent_dim: int, device: torch.device | str = "cpu") -> Draws:
    """Draws [S, size, latent_dim] of one step, each model's from its generator."""
    drawn = torch.stack([torch.randn(4, size, latent_dim, generator=generator) for generator in generators], 1)
    # Those of the decoder phase would be for gamma_r, which is 0.
    return Draws(*drawn.to(device).unbind(0), eps_rec_d=None, eps_fake_d=None)


def judge(model: inference.Model, density: Density, seed: int) -> dict[str, Any]:
    """Figures of one model.

    finite: whether all samples and ELBOs are; without it the others are None. kl, jsd, gnelbo: as published.
    histogram_kl, histogram_jsd: the textbook's. modes, on_mode: covered ones and share of points, where there are modes.
    """
    generator = randomness.generator(seed, 0, judging=True)
    fake = _decode(model, torch.randn(NUM_POINTS_FINE, model.latent_dim, generator=generator)).numpy()
    real = density.sample(NUM_POINTS_FINE, generator).numpy()
    axis = torch.linspace(-density.limit, density.limit, GRID_SIDE)
    grid = negative_elbo(model, torch.cartesian_prod(axis, axis))
    points = negative_elbo(model, density.sample(NUM_ELBO_POINTS, generator))
    inside = (np.abs(fake[:NUM_POINTS]) <= density.limit).all(1).any()
    finite = bool(np.isfinite(fake).all() and torch.cat([grid, points]).isfinite().all() and inside)
    names = ["kl", "jsd", "gnelbo", "histogram_kl", "histogram_jsd"]
    figures: dict[str, Any] = {"finite": finite} | dict.fromkeys(names)
    if density.centers is not None:
        figures |= {"modes": None, "num_modes": len(density.centers), "on_mode": None}
    if finite:
        figures |= divergences(real, fake, density.limit)
        figures["gnelbo"] = metrics.grid_normalized_elbo(grid, points)
        if density.centers is not None:
            figures["modes"], figures["on_mode"] = metrics.mode_coverage(fake, density.centers.numpy(), density.std)
    return figures


def divergences(real: np.ndarray, fake: np.ndarray, limit: float) -> dict[str, float]:
    """Of two sets of NUM_POINTS_FINE points [N, 2]: the published figures, from the first NUM_POINTS of each, and the textbook's
    from all. Two sets of one density are not at 0, the published figures far from it: bins of few points differ by chance."""
    few = real[:NUM_POINTS], fake[:NUM_POINTS], limit
    return {
        "kl": metrics.published_kl(*few), "jsd": metrics.published_jsd(*few),
        "histogram_kl": metrics.histogram_kl(real, fake, limit), "histogram_jsd": metrics.histogram_jsd(real, fake, limit),
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> list[str]:
    """The figures of all seeds as lines of text, a column for each figure."""
    names = [name for name in found[0] if name not in ("images_seen", "num_modes")]
    cells = [names, *([_shown(entry[name]) for name in names] for entry in found)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    return ["  ".join(value.rjust(width) for value, width in zip(row, widths)) for row in cells]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.4g}"


@torch.no_grad()
def negative_elbo(model: inference.Model, points: Tensor) -> Tensor:
    """Squared error plus KL at the encoder's mean, both with weight 1 as gnELBO takes them: [N, 2] -> float32 [N]."""
    found = []
    for part in points.split(8192):
        mu, logvar = model.encode(part)
        error = objectives.reconstruction_error(part.to(mu.device), model.decode(mu), "mse")
        found.append((error + objectives.kl(mu, logvar)).cpu())
    return torch.cat(found)


def _decode(model: inference.Model, z: Tensor) -> Tensor:
    return torch.cat([model.decode(part).cpu() for part in z.split(8192)])


def draw(density: Density, titled: dict[str, inference.Model]) -> bytes:
    """PNG: the true density above real points, and for each model exp(ELBO) above samples; each density by its own scale."""
    from matplotlib.figure import Figure

    limit = density.limit
    axis = (torch.arange(300) + 0.5) / 300 * 2 * limit - limit
    grid = torch.cartesian_prod(axis, axis)
    generator = torch.Generator().manual_seed(0)
    columns = {"real": (density.density(grid), density.sample(2000, generator))}
    for title, model in titled.items():
        z = torch.randn(2000, model.latent_dim, generator=generator)
        columns[title] = (-negative_elbo(model, grid)).exp(), _decode(model, z)
    figure = Figure(figsize=(2.6 * len(columns), 5.4), layout="constrained")
    for index, (title, (heights, points)) in enumerate(columns.items()):
        above = figure.add_subplot(2, len(columns), 1 + index, title=title)
        above.imshow(heights.view(300, 300).T, origin="lower", extent=(-limit, limit, -limit, limit), cmap="magma")
        below = figure.add_subplot(2, len(columns), 1 + index + len(columns))
        below.scatter(*points.T, s=1.5, linewidths=0, color="tab:blue" if index else "black")
        below.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        for axes in (above, below):
            axes.set(xticks=[], yticks=[])
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _models(stack: StackedModels, settings: Toy2dConfig, device: torch.device) -> list[inference.Model]:
    info = {"density": settings.density, "objective": settings.objective.model_dump(mode="json")}
    found = [
        inference.Model(settings.model.model_dump(), device, {**info, "seed": seed}, "plain")
        for seed in settings.run.seeds
    ]
    stack.encoder.write_to([model.encoder for model in found])
    stack.decoder.write_to([model.decoder for model in found])
    return found


def _save(stack: StackedModels, seeds: list[int], images_seen: int, folder: Folder) -> None:
    where = {"images_seen": torch.tensor(images_seen), "seeds": torch.tensor(seeds)}
    folder.write(save_tensors({**where, **stack.tensors()}), STATE_FILE)


def _restore(stack: StackedModels, settings: Toy2dConfig, folder: Folder) -> int:
    """Images seen so far; 0 where nothing is saved. Raises UserError when it is damaged, or of other settings."""
    if not folder.exists(STATE_FILE):
        return 0
    if folder.exists("config.yaml"):
        before, now = _lasting(yaml.safe_load(folder.read("config.yaml"))), _lasting(settings.model_dump(mode="json"))
        different = [key for key in now if before.get(key) != now[key]]
        if different:
            raise UserError(
                f"run.directory: {folder.url} holds a run with another {different[0]} ({before.get(different[0])!r});"
                " take another directory"
            )
    try:
        tensors = load_tensors(folder.read(STATE_FILE))
        images_seen = int(tensors.pop("images_seen"))
        assert tensors.pop("seeds").tolist() == settings.run.seeds and stack.fits(tensors)
    except (SafetensorError, KeyError, AssertionError):
        raise UserError(
            f"{folder.url}/{STATE_FILE}: is damaged, of another run or of another version of sivae; delete it to start anew"
        ) from None
    stack.load(tensors)
    return images_seen


def _lasting(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run must keep to its end, by their paths; not those of methods that it does not train with."""
    schedule = {f"schedule.{key}": value for key, value in tree["schedule"].items() if key != "total_images"}
    model = {f"model.{key}": value for key, value in tree["model"].items()}
    objective = {
        f"objectives.{tree['method']}.{key}": value for key, value in tree["objectives"][tree["method"]].items()
    }
    kept = {
        "run.seeds": tree["run"]["seeds"],
        "run.precision": tree["run"]["precision"],
        "density": tree["density"],
        "method": tree["method"],
    }
    return kept | schedule | model | objective
