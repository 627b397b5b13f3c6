"""Use a trained model: encode, decode, sample, reconstruct, interpolate, translate.

`load` opens a run directory (its newest whole checkpoint), one checkpoint of it (RUN/checkpoints/best is the best one, where
the run was evaluated), or an exported folder, at any fsspec URL.
It takes the averaged weights and eval mode, which is what the training's pictures show.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from typing import Any

import torch
from torch import Tensor

from sivae import __version__, checkpoint, models
from sivae.config import ConfigError, parse_model
from sivae.errors import UserError, shown
from sivae.images import to_float, to_uint8
from sivae.latents import slerp
from sivae.objectives import reparameterize
from sivae.randomness import fixed_latents
from sivae.storage import Folder

FORMAT = 1  # of an exported folder
SETTINGS_FILE, WEIGHTS_FILE, TARGET_FILE = "sivae.json", "model.safetensors", "target_decoder.safetensors"
CARD_FILE, CARD_HEAD = "README.md", "library_name: sivae"


class Model:
    """Encoder and decoder in eval mode on `device`. Images go in as uint8 or as floats in `value_range`, [B, C, H, W].

    A conditional model wants int64 `labels` [B]; only `sample` does without them, and draws classes evenly. `weights` says which it has:
    the running "average", "plain" ones, or None where nobody knows.
    """

    def __init__(
        self, settings: dict[str, Any], device: str | torch.device = "cpu", info: dict[str, Any] | None = None,
        weights: str | None = None,
    ):  # fmt: skip
        self.settings, self.device, self.info, self.weights = settings, torch.device(device), info or {}, weights
        self.encoder, self.decoder = (
            network.to(self.device).eval().requires_grad_(False) for network in models.build(**settings)
        )
        self.value_range = models.VALUE_RANGES[settings["family"]]
        self.latent_dim, self.num_classes = settings["latent_dim"], settings.get("num_classes", 0)
        # Of a run that was still growing: the level and blend that its networks were trained at.
        self.stage = self.info.get("stage", {})

    @property
    def sample_shape(self) -> tuple[int, ...]:
        if "sample_shape" in self.settings:
            return tuple(self.settings["sample_shape"])
        resolution = 4 << self.stage["level"] if self.stage else self.settings["resolution"]
        return (self.settings["num_channels"], resolution, resolution)

    @property
    def random_crop(self) -> bool | None:
        """For `open_stream`: a model that was trained on pieces of larger images takes such sets, cut from the middle."""
        # While it grows it has seen them shrunk.
        return None if self.info.get("data", {}).get("random_crop") and not self.stage else False

    @torch.no_grad()
    def encode(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mu, logvar of q(z | x), each [B, latent_dim]. Raises UserError for images or labels that are not this model's."""
        if tuple(images.shape[1:]) != self.sample_shape:
            raise UserError(
                f"images of shape {tuple(images.shape[1:])} do not fit this model, which takes {self.sample_shape}"
            )
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = to_float(images, *self.value_range)
        elif not images.is_floating_point():
            raise UserError(f"images are {images.dtype}; give uint8, or floats from {self.value_range[0]:g} to 1")
        return self.encoder(images, self._labels(labels, len(images)), **self.stage)

    @torch.no_grad()
    def decode(
        self, z: Tensor, labels: Tensor | None = None, *, truncation: float = 1.0, truncation_layers: int | None = None
    ) -> Tensor:
        """z [B, latent_dim] -> images, float in `value_range` but not clamped.

        A style model also takes z [B, num_layers, latent_dim], a latent for each layer; and `truncation` (psi, published 0.7)
        pulls the styles of its first `truncation_layers` layers (published 8; None: of all) to the average style: less
        variety, fewer bad images. Raises UserError for latents of another shape.
        """
        shapes = [(self.latent_dim,)]
        if self.settings["family"] == "style":
            shapes.append((self.num_layers, self.latent_dim))
        if tuple(z.shape[1:]) not in shapes:
            raise UserError(
                f"latents of shape {tuple(z.shape[1:])} do not fit this model, which takes {' or '.join(map(str, shapes))}"
            )
        extra = dict(self.stage)
        check_truncation(truncation, truncation_layers)
        if truncation != 1:
            self._require_style("truncation")
            extra |= {"truncation": truncation, "truncation_layers": truncation_layers}
        return self.decoder(z.to(self.device), self._labels(labels, len(z)), **extra)

    def sample(
        self, count: int, *, seed: int = 0, labels: Tensor | None = None, batch_size: int = 64, truncation: float = 1.0,
        truncation_layers: int | None = None, first: int = 0,
    ) -> Tensor:  # fmt: skip
        """Images `first` to `first + count - 1` of a seed, from the prior: each the same whatever `count` and `batch_size`.

        See `decode` for truncation.
        """
        for name, value, least in (("count", count, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"{name}: {value} is too few, give {least} or more")
        z = fixed_latents(seed, count, self.latent_dim, first)
        if labels is None and self.num_classes:
            labels = torch.arange(first, first + count) % self.num_classes
        labels = self._labels(labels, count)
        return torch.cat(
            [
                self.decode(
                    z[i : i + batch_size], None if labels is None else labels[i : i + batch_size],
                    truncation=truncation, truncation_layers=truncation_layers,
                )
                for i in range(0, count, batch_size)
            ]
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Layers of a style model that take a style: two for each level of detail."""
        self._require_style("layers of styles")
        return models.style.num_layers(self.sample_shape[-1])

    def mix(
        self, coarse: Tensor, fine: Tensor, num_coarse: int, labels: Tensor | None = None, *, truncation: float = 1.0,
        truncation_layers: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Images of a style model whose first `num_coarse` layers follow `coarse` and the others `fine`, each z [B, latent_dim].

        Raises UserError when the model has not so many layers, or is of another family.
        """
        num_layers = self.num_layers
        if not 0 <= num_coarse <= num_layers:
            raise UserError(f"num_coarse: {num_coarse} is not in 0 .. {num_layers}, the layers of this model")
        first = torch.arange(num_layers, device=self.device)[:, None] < num_coarse
        z = torch.where(first, coarse.to(self.device)[:, None], fine.to(self.device)[:, None])
        return self.decode(z, labels, truncation=truncation, truncation_layers=truncation_layers)

    def reconstruct(self, images: Tensor, labels: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        """Decode the mean of q(z | x), or a draw of it when `eps` [B, latent_dim] is given."""
        mu, logvar = self.encode(images, labels)
        return self.decode(mu if eps is None else reparameterize(mu, logvar, eps.to(self.device)), labels)

    @torch.no_grad()
    def reconstruct_level(self, images: Tensor, level: int, labels: Tensor | None = None) -> Tensor:
        """Reconstruct floats [B, C, 4 * 2^level, ...] at a level of detail of a style model, the one that fades in as far as it has.

        Raises UserError for a model that did not grow, which knows only the highest.
        """
        self._require_style("levels of detail")
        # Of an imported model it is not known; published ones grew.
        if "stage" in self.info and not self.stage:
            raise UserError("levels of detail: this model did not grow, and learned only the highest")
        labels = self._labels(labels, len(images))
        stage = self.stage if self.stage.get("level") == level else {"level": level}
        mu, _ = self.encoder(images.to(self.device), labels, **stage)
        return self.decoder(mu, labels, **stage)

    def interpolate(
        self, first: Tensor, second: Tensor, steps: int = 8, labels: Tensor | None = None,
        second_labels: Tensor | None = None, *, spherical: bool = False, batch_size: int = 64,
    ) -> Tensor:  # fmt: skip
        """Images [B, steps, C, H, W] between the latent means of two batches of images: along the straight line, or `spherical`.

        A Gaussian prior has nearly all its mass at a distance of sqrt(latent_dim) from the origin. Half way between two of its
        draws the straight line comes as near as 0.7 of that, where the prior puts next to nothing; the spherical path stays
        at the distance of its ends. So spherical suits draws of the prior and means as long as they are; between means that
        are short, as of a model that leaves many dimensions unused, both look the same. Of a conditional model the first half
        of a path has the first image's label, the rest the second's (None: the same): a class has nothing between it and another.
        `batch_size` images are decoded at once.
        """
        second_labels = labels if second_labels is None else second_labels
        ends = self.encode(first, labels)[0], self.encode(second, second_labels)[0]
        weights = torch.linspace(0, 1, steps, device=self.device)[None, :, None]
        between = slerp if spherical else torch.lerp
        path = between(ends[0][:, None], ends[1][:, None], weights).flatten(0, 1)
        if labels is not None:
            is_first = torch.arange(steps) < (steps + 1) // 2
            labels = torch.where(is_first, labels.cpu()[:, None], second_labels.cpu()[:, None]).flatten()
        parts = path.split(batch_size)
        own = [None] * len(parts) if labels is None else labels.split(batch_size)
        return torch.cat(list(map(self.decode, parts, own))).unflatten(0, (len(first), steps))

    def translate(self, content: Tensor, class_: Tensor, batch_size: int = 64) -> Tensor:
        """The content of each image in `content` [N, C, H, W] with the class of each in `class_` [M, C, H, W]: [N, M, C, H, W].

        Floats in `value_range`, not clamped; means of q(z | x), no draws. Raises UserError when the model's family has no
        class and content, and for images of another shape.
        """
        if self.settings["family"] != "translation":
            raise UserError(
                f"translate: this is a model of the {self.settings['family']} family, whose latents have no class and no"
                " content; train one of the translation family, as configs/shapes_translation.yaml does"
            )
        dim = self.settings["class_dim"]
        contents, classes = (
            torch.cat([self.encode(part)[0] for part in images.split(batch_size)]) for images in (content, class_)
        )
        z = torch.cat(
            [
                classes[None, :, :dim].expand(len(contents), -1, -1),
                contents[:, None, dim:].expand(-1, len(classes), -1),
            ],
            dim=2,
        )
        decoded = torch.cat([self.decode(part) for part in z.flatten(0, 1).split(batch_size)])
        return decoded.unflatten(0, (len(contents), len(classes)))

    def _require_style(self, what: str) -> None:
        if self.settings["family"] != "style":
            raise UserError(
                f"{what}: this is a model of the {self.settings['family']} family; only the style family has it"
            )

    def to_uint8(self, images: Tensor, *, truncate: bool = False) -> Tensor:
        return to_uint8(images, *self.value_range, truncate=truncate)

    def _labels(self, labels: Tensor | None, count: int) -> Tensor | None:
        if not self.num_classes:
            return None
        if labels is None:
            raise UserError(f"this model is conditional on {self.num_classes} classes: give the images' labels")
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise UserError(
                f"labels must be int64 of shape ({count},), not {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise UserError(
                f"labels must lie in 0 .. {self.num_classes - 1}; got {int(labels.min())} .. {int(labels.max())}"
            )
        return labels.to(self.device)


def load(
    path: str,
    *,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    storage_options: dict[str, Any] | None = None,
) -> Model:
    """A ready model. Of a run the running average of the weights, or with `weights="plain"` those that were trained; an exported
    folder holds one of the two.

    A run's newest checkpoint; a damaged one is told on stderr and the one before it taken. Raises UserError when there is no model
    at `path`, a damaged one, or one of other weights than asked for.
    """
    if weights not in ("average", "plain", None):
        raise UserError(f"weights: {weights!r} is neither 'average' nor 'plain'")
    folder = Folder(path, storage_options)
    if folder.exists(SETTINGS_FILE):
        model = _load_exported(folder, device)
        if weights is not None and model.weights not in (weights, None):
            raise UserError(f"{shown(path)}: holds {model.weights} weights alone, and {weights} ones are asked for")
        return model
    file = "weights" if weights == "plain" else "average"
    owner, name = run_of(path)
    run = Folder(owner, storage_options)
    if name == "best" and (best := checkpoint.best(run)):
        name = best["name"]
    if name is not None and run.exists("checkpoints", name, "manifest.json"):
        found = checkpoint.read(run, name, (file,))
    else:
        found = checkpoint.read_newest(folder, report=_tell, files=(file,))
    if found is None and name == "best":
        raise UserError(
            f"{shown(path)}: there is no best checkpoint; training notes one where evaluate.every_images has it judge them"
        )
    if found is None:
        raise UserError(
            f"{shown(path)}: holds no model; give a run directory with checkpoints or a folder made by `sivae export` or `sivae import`"
        )
    averaged = found.state.get("averaged", True)
    if weights == "average" and not averaged:
        raise UserError(
            f"{shown(path)}: keeps no average of its weights (ema.halflife_images is 0), and average ones are asked for"
        )
    model = Model(
        _model_settings(found.state["model"], path),
        device,
        {k: found.state[k] for k in ("images_seen", "objective", "data", "stage") if k in found.state},
        "average" if file == "average" and averaged else "plain",
    )
    fill(model, next(iter(found.tensors.values())), path)
    return model


def tensors_of(model: Model) -> dict[str, Tensor]:
    """`encoder.*` and `decoder.*`: what `fill` takes."""
    return {
        f"{name}.{key}": value
        for name in ("encoder", "decoder")
        for key, value in getattr(model, name).state_dict().items()
    }


def _tell(line: str) -> None:
    print(f"sivae: {line}", file=sys.stderr)


def check_truncation(truncation: float, truncation_layers: int | None) -> None:
    """Raises UserError."""
    if not math.isfinite(truncation):
        raise UserError(f"truncation: {truncation} is not a number")
    if truncation_layers is not None and truncation_layers < 0:
        raise UserError(f"truncation_layers: {truncation_layers} is negative")
    if truncation_layers is not None and truncation == 1:
        raise UserError("truncation_layers: without a truncation none is truncated; give a truncation, such as 0.7")


def run_of(path: str) -> tuple[str, str | None]:
    """The run directory that a checkpoint lies in, and the checkpoint's name; another model's own folder, and None."""
    path = os.fspath(path)
    if "://" not in path:
        path = os.path.abspath(os.path.expanduser(path))
    match = re.fullmatch(r"(.*[^/])/checkpoints/(best|\d{12}(?:\.\d+)?)/*", path)
    return (match[1], match[2]) if match else (path, None)


def weights_digest(model: Model) -> str:
    """sha256 of both networks' weights: what belongs to a model's latents is kept with it."""
    digest = hashlib.sha256()
    for network in (model.encoder, model.decoder):
        for name, value in network.state_dict().items():
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fill(model: Model, tensors: dict[str, Tensor], where: str) -> None:
    """Load `encoder.*` and `decoder.*` tensors strictly."""
    for name in ("encoder", "decoder"):
        part = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        try:
            getattr(model, name).load_state_dict(part)
        except RuntimeError as error:
            raise UserError(
                f"{shown(where)}: the {name}'s weights do not fit its settings ({' '.join(str(error).split())[:300]})"
            ) from None


def _load_exported(folder: Folder, device: str | torch.device) -> Model:
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    try:
        settings = json.loads(folder.read(SETTINGS_FILE))
        if settings["format"] != FORMAT:
            raise ValueError(f"it is of the format {settings['format']!r}, and this version reads {FORMAT}")
        weights = folder.read(WEIGHTS_FILE)
        if hashlib.sha256(weights).hexdigest() != settings["sha256"]:
            raise ValueError(f"{WEIGHTS_FILE} does not match its checksum")
        tensors = load_tensors(weights)
        described = settings.get("info", {}), settings.get("weights")
        model = Model(_model_settings(settings["model"], folder.url), device, *described)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{shown(folder.url)}: is not a model that sivae can read ({type(error).__name__}: {error})"
        ) from None
    fill(model, tensors, folder.url)
    return model


def _model_settings(tree: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return parse_model(tree).model_dump()
    except ConfigError as error:
        raise UserError(f"{shown(where)}: holds model settings that this version does not know ({error})") from None


def read_target(path: str, storage_options: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """The target decoder of an imported bootstrap model, or of an export of one; empty when there is none.

    Raises UserError for a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    folder = Folder(path, storage_options)
    try:
        return load_tensors(folder.read(TARGET_FILE)) if folder.exists(TARGET_FILE) else {}
    except SafetensorError as error:
        raise UserError(f"{shown(folder.url)}/{TARGET_FILE}: is damaged ({error}); import the model again") from None


def export(model: Model, dest: str, target_decoder: dict[str, Tensor] | None = None) -> None:
    """Write a model card, weights and settings into a folder (path or URL), the settings last: without them it is no model.

    An earlier export there, whole or not, is replaced. Raises UserError for a folder with files of these names that are of none,
    and for a run's, where `load` would find this model in place of its checkpoints.
    """
    from safetensors.torch import save as save_tensors

    folder = Folder(dest)
    present = [name for name in (CARD_FILE, WEIGHTS_FILE, TARGET_FILE) if folder.exists(name)]
    begun = CARD_FILE in present and CARD_HEAD.encode() in folder.read(CARD_FILE)
    if present and not begun and not folder.exists(SETTINGS_FILE):
        raise UserError(f"{shown(folder.url)}: holds a {present[0]} that is of no exported model; give another folder")
    if folder.names("checkpoints"):
        raise UserError(
            f"{shown(folder.url)}: holds a run, whose checkpoints this model would hide; give another folder"
        )
    folder.write(_model_card(model).encode(), CARD_FILE)
    tensors = {name: value.cpu().contiguous() for name, value in tensors_of(model).items()}
    if target_decoder:
        folder.write(save_tensors({key: value.contiguous() for key, value in target_decoder.items()}), TARGET_FILE)
    else:
        folder.remove(TARGET_FILE)
    weights = save_tensors(tensors)
    folder.write(weights, WEIGHTS_FILE)
    settings = {
        "format": FORMAT,
        "version": __version__,
        "model": model.settings,
        "info": model.info,
        "weights": model.weights,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    folder.write(json.dumps(settings, indent=1).encode(), SETTINGS_FILE)


def _model_card(model: Model) -> str:
    given = ", labels" if model.num_classes else ""
    imports = "import torch\n\n" if model.num_classes else ""
    labels = f"labels = torch.arange(16) % {model.num_classes}\n" if model.num_classes else ""
    shape = " x ".join(map(str, model.sample_shape))
    facts = "\n".join(
        f"- {key}: `{json.dumps(value)}`"
        for key, value in {**model.settings, **model.info, "weights": model.weights}.items()
    )
    return f"""---
{CARD_HEAD}
tags: [soft-introvae, vae, image-generation]
---
# Soft-IntroVAE model

An introspective variational autoencoder: an encoder and a decoder for samples of shape {shape}, latent size {model.latent_dim}.

```python
{imports}import sivae

model = sivae.load("PATH_OR_URL_OF_THIS_FOLDER")
images = model.sample(16)                  # [16, {", ".join(map(str, model.sample_shape))}], values about {list(model.value_range)}
{labels}mu, logvar = model.encode(images{given})
again = model.decode(mu{given})
```

{facts}

Method: Daniel and Tamar, Soft-IntroVAE, CVPR 2021, arXiv 2012.13253.
"""
