"""Detectors: from images to feature vectors.

`pixels` are the image's own values. Every other detector is a TorchScript file, so that its code travels with its weights
and sivae needs no library of networks. Two are known by name:

`inception`: NVIDIA's `inception-2015-12-05.pt` (StyleGAN2-ADA), a translation of the TensorFlow network that FID is defined
with (Heusel et al., arXiv 1706.08500). It takes uint8 images of any size and resizes inside. Its sha256 is known: no other
file is taken for it, and no other detector's distance is called FID.

`dinov2`: an export of DINOv2 ViT-L/14 (Stein et al., arXiv 2306.04675, judge generated images by it), which takes normalised
floats: images are resized here to 224 pixels (bicubic, antialiased, not rounded) and normalised with ImageNet's mean and
deviation.

Any other name stands for a file that takes uint8 [B, 3, H, W] and returns [B, D], as Inception's does.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae.errors import UserError, shown
from sivae.progress import progress_bar
from sivae.storage import Folder

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
    "#sha256=f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_PIXELS = 224
MAX_DIM = 16_384  # of moments: their covariance takes 8 D^2 bytes, here 2 GiB
DOWNLOAD_SEC = 1800


@dataclass(frozen=True)
class Detector:
    """`name`; `protocol`, what its features depend on, as stored with every figure; `dim` of the features.

    Called with uint8 [B, C, H, W] on its device it returns float32 [B, dim].
    """

    name: str
    protocol: dict[str, Any]
    dim: int
    network: Any  # None: pixels
    return_features: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        if self.network is None:
            return images.contiguous().flatten(1).float() / 255
        images = images.contiguous()
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        if self.name == "dinov2":
            images = _normalised(images)
        extra = {"return_features": True} if self.return_features else {}
        with torch.no_grad(), exact_float32():
            features = self.network(images, **extra)
        if self.dim and features.shape != (len(images), self.dim):
            raise UserError(
                f"detector {self.name}: returns {tuple(features.shape)} for {len(images)} images, not [{len(images)}, {self.dim}]"
            )
        return features.float()


@dataclass(frozen=True)
class Lpips:
    """Perceptual distances (Zhang et al., arXiv 1801.03924) by the TorchScript file of this sha256."""

    network: Any
    sha256: str

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Of two batches [B, C, H, W] with values in [0, 1]: [B]."""
        pair = (images.expand(-1, 3, -1, -1) * 2 - 1 for images in (first, second))
        with torch.no_grad(), exact_float32():
            found = self.network(*pair)
        if found.numel() != len(first):
            raise UserError(
                f"lpips: returns {tuple(found.shape)} for {len(first)} pairs of images, not a distance for each"
            )
        return found.reshape(len(first))


def open_lpips(
    location: str, resolution: int, device: torch.device | str = "cpu", cache_dir: str | None = None
) -> Lpips:
    """location: PATH_OR_URL or PATH_OR_URL#sha256=HEX of a file that takes two batches [B, 3, H, W] in [-1, 1] and returns B
    distances. Raises UserError as `open_detector` does."""
    place, _, expected = location.partition("#")
    path, digest = fetch(place, expected.removeprefix("sha256=").lower() or None, "lpips", cache_dir)
    network = load_script(path, "lpips", device)
    blank = torch.zeros(2, 3, resolution, resolution, device=device)
    try:
        fits = all(network(blank[:n], blank[:n]).numel() == n for n in (2, 1))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 (a file of others can raise anything)
        fits = False
    if not fits:
        raise UserError(
            f"lpips: {path} does not return a distance for each of two images [2, 3, {resolution}, {resolution}] in [-1, 1]"
        )
    return Lpips(network, digest)


def open_detector(
    name: str, location: str | None, shape: tuple[int, ...], device: torch.device | str = "cpu", cache_dir: str | None = None
) -> Detector:  # fmt: skip
    """A detector by name, for images of shape [C, H, W].

    location: PATH_OR_URL or PATH_OR_URL#sha256=HEX of its TorchScript file; a remote one is kept in cache_dir/detectors
    (None: $SIVAE_CACHE, else ~/.cache/sivae). None: `pixels`, and `inception` from NVIDIA. Raises UserError when there is no
    such file, when its sha256 is not the one given, or when it is no detector.
    """
    if name == "pixels":
        if location is not None:
            raise UserError("detector pixels: has no file; give the file another name")
        dim = shape[0] * shape[1] * shape[2]
        return Detector(name, {"name": name, "sha256": None, "input": "values in [0, 1]", "resize": None}, dim, None)
    known = INCEPTION_URL.partition("#sha256=") if name == "inception" else None
    if location is None:
        if known is None:
            raise UserError(f"detector {name}: where is its file? give it as {name}=PATH_OR_URL#sha256=HEX")
        location = INCEPTION_URL
    place, _, expected = location.partition("#")
    expected = expected.removeprefix("sha256=").lower() or None
    if expected and not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise UserError(f"detector {name}: {expected!r} is no sha256, which has 64 hexadecimal digits")
    if known and expected not in (None, known[2]):
        raise UserError(f"detector inception: is known by its sha256 {known[2]}; give another file another name")
    path, digest = fetch(place, known[2] if known else expected, f"detector {name}", cache_dir)
    network = load_script(path, f"detector {name}", device)
    try:
        arguments = {argument.name for argument in network.forward.schema.arguments}
    except (AttributeError, RuntimeError):
        arguments = set()
    resize = f"bicubic, antialiased, to {DINOV2_PIXELS} pixels" if name == "dinov2" else "inside the file"
    takes = "ImageNet's mean and deviation" if name == "dinov2" else "uint8"
    protocol = {"name": name, "sha256": digest, "input": takes, "resize": resize}
    detector = Detector(name, protocol, 0, network, "return_features" in arguments)
    dim = _probe(detector, shape, device)
    return Detector(name, protocol, dim, network, detector.return_features)


def fetch(place: str, expected: str | None, what: str, cache_dir: str | None = None) -> tuple[str, str]:
    """A local path of the file at a path or URL, and its sha256; a remote one is downloaded once.

    Raises UserError when the sha256 is not the expected one. Safe with several processes: a file appears whole.
    """
    url, _, name = place.rpartition("/")
    folder = Folder(url or ("/" if place.startswith("/") else "."), timeout_sec=DOWNLOAD_SEC)
    if folder.is_local:
        path = folder.join(name)
        digest = _sha256(path, what)
    else:
        cache = os.path.expanduser(cache_dir or os.environ.get("SIVAE_CACHE") or "~/.cache/sivae")
        kept = Folder(os.path.join(cache, "detectors", hashlib.sha256(place.encode()).hexdigest()[:16]))
        path = kept.join(name.partition("?")[0])
        digest = _sha256(path, what) if os.path.exists(path) else None
        if digest is None or (expected and digest != expected):
            with progress_bar(1, f"fetching {what}", " files") as bar:
                kept.write(folder.read(name), name.partition("?")[0])
                bar.update()
            digest = _sha256(path, what)
    if expected and digest != expected:
        raise UserError(
            f"{what}: {shown(place)} has the sha256 {digest}, not {expected}; it is another file or a damaged one"
        )
    return path, digest


def load_script(path: str, what: str, device: torch.device | str) -> Any:
    """A TorchScript file in eval mode. Raises UserError when it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # detectors are published in this format
        try:
            return torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{what}: {path} is no TorchScript file ({str(error).splitlines()[0]})") from None


def _probe(detector: Detector, shape: tuple[int, ...], device: torch.device | str) -> int:
    """The size of the features, found by asking for those of two images and of one: a traced file may know one number alone."""
    what = f"detector {detector.name}"
    for count in (2, 1):
        try:
            features = detector(torch.zeros(count, *shape, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (a file of others can raise anything)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(
                f"{what}: does not take images of shape {(count, *shape)} as detectors do ({lines[-1][:200]});"
                " see docs/evaluation.md for what a file must take and return"
            ) from None
        if features.ndim != 2 or len(features) != count:
            raise UserError(
                f"{what}: returns {tuple(features.shape)} for images {(count, *shape)}, not features [{count}, D]"
            )
    return features.shape[1]


def _normalised(images: Tensor) -> Tensor:
    size = (DINOV2_PIXELS, DINOV2_PIXELS)
    x = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False) / 255
    mean, deviation = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (x - mean) / deviation


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TensorFloat-32, whose rounding would be seen in the figures."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _sha256(path: str, what: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror})") from None
