"""What the tests of judging share: a small model, a packed set of small images, a detector, an LPIPS of a kind."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sivae import inference
from sivae.config import parse_model
from sivae.data.pack import pack
from sivae.distributed import Group

SIZE = 8
ALONE = Group(0, 1, torch.device("cpu"), None)


def make_model(seed: int = 0, **fields) -> inference.Model:
    tree = {
        "family": "conv", "num_channels": 1, "resolution": SIZE, "channels": [8], "latent_dim": 4,
    } | fields  # fmt: skip
    if tree["family"] == "mlp":
        tree = fields
    model = inference.Model(parse_model(tree).model_dump())
    torch.manual_seed(seed)
    with torch.no_grad():
        for network in (model.encoder, model.decoder):
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def export_model(folder: Path, seed: int = 0, weights: str | None = "average", **fields) -> str:
    model = make_model(seed, **fields)
    model.weights = weights
    model.info = {"images_seen": 1234}
    inference.export(model, str(folder))
    return str(folder)


def pack_images(folder: Path, count: int = 1100, seed: int = 0, **settings) -> str:
    """Random blobs, uint8; half of them in the split `test` when `splits` says so."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (count, SIZE // 2, SIZE // 2, 1)).repeat(2, axis=1).repeat(2, axis=2)
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", pixels.astype(np.uint8))
    settings = {"resolution": SIZE, "num_workers": 0, "progress": False} | settings
    pack(str(folder / "images.npy"), str(folder / "set"), **settings)
    return str(folder / "set")


class Net(nn.Module):
    """uint8 [B, 3, H, W] -> features [B, 12]; class scores [B, 5] where no features are asked for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor, return_features: bool = False):
        y = self.conv(x.float() / 255).relu().mean(dim=(2, 3))
        return y if return_features else self.head(y)


class Floats(nn.Module):
    """Normalised floats [B, 3, 224, 224] -> [B, 6], as a DINOv2 export."""

    def forward(self, x: Tensor):
        if x.dtype != torch.float32 or x.shape[2] != 224:
            raise RuntimeError("not as DINOv2 takes them")
        return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


class Lpips(nn.Module):
    """A distance of images in [-1, 1], of the shape that lpips returns."""

    def forward(self, a: Tensor, b: Tensor):
        return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)


class NanLpips(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x - y) / 0 * 0).flatten(1).sum(dim=1)


def save_script(network: nn.Module, path: Path) -> str:
    torch.manual_seed(0)
    torch.jit.script(network.eval()).save(str(path))
    return str(path)


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
