"""Detectors are the files that they are said to be, get images as they expect them, and are fetched once.

python -m pytest tests/unit/test_detectors.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sivae.errors import UserError
from sivae.metrics import features
from tests.unit.judged import Floats, Net, save_script, sha256

SHAPE = (1, 16, 16)


def images(count=4, channels=1):
    return torch.randint(
        0, 256, (count, channels, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    torch.manual_seed(0)
    return save_script(Net(), tmp_path_factory.mktemp("net") / "net.pt")


def test_pixels():
    detector = features.open_detector("pixels", None, SHAPE)
    assert detector.dim == 256 and torch.equal(detector(images()), images().flatten(1) / 255)


def test_a_torchscript_file_gets_uint8_and_gives_features(net):
    detector = features.open_detector("mine", f"{net}#sha256={sha256(net)}", SHAPE)
    colour = images().expand(-1, 3, -1, -1)
    expected = torch.jit.load(net)(colour, return_features=True)
    assert detector.dim == 12 and torch.equal(detector(images()), expected)  # grey becomes colour
    assert detector.protocol["sha256"] == sha256(net) and detector.protocol["resize"] == "inside the file"


def test_dinov2_gets_what_imagenet_networks_expect(tmp_path):
    path = save_script(Floats(), tmp_path / "dinov2.pt")
    detector = features.open_detector("dinov2", path, SHAPE)
    found = detector(images())[:, :3]
    for image, ours in zip(images(), found):
        # Pillow's bicubic filter in float, then ImageNet's mean and deviation.
        large = Image.fromarray(image[0].numpy().astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC)
        expected = (np.asarray(large).mean() / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        np.testing.assert_allclose(ours, expected, atol=2e-3)
    assert "224" in detector.protocol["resize"]


def test_another_file_than_its_hash_says(net):
    wrong = sha256(net)[::-1]
    with pytest.raises(UserError, match=f"detector mine: .* has the sha256 {sha256(net)}, not {wrong}"):
        features.open_detector("mine", f"{net}#sha256={wrong}", SHAPE)
    with pytest.raises(UserError, match="is no sha256"):
        features.open_detector("mine", f"{net}#sha256=abc", SHAPE)


def test_no_other_file_is_taken_for_inception(net):
    with pytest.raises(UserError, match="detector inception: .* not f58cb9b6ec323ed6"):
        features.open_detector("inception", net, SHAPE)
    with pytest.raises(UserError, match="give another file another name"):
        features.open_detector("inception", f"{net}#sha256={sha256(net)}", SHAPE)


@pytest.mark.parametrize("content", [b"", b"not TorchScript"])
def test_a_file_that_is_no_torchscript(tmp_path, content):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(UserError, match="is no TorchScript file"):
        features.open_detector("mine", str(tmp_path / "net.pt"), SHAPE)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        features.open_detector("mine", str(tmp_path / "net.pt"), SHAPE)
    with pytest.raises(UserError, match="where is its file"):
        features.open_detector("mine", None, SHAPE)
    with pytest.raises(UserError, match="pixels: has no file"):
        features.open_detector("pixels", str(tmp_path / "net.pt"), SHAPE)


class Maps(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x.float()


class Large(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return torch.nn.functional.conv2d(x.float(), torch.ones(1, 3, 99, 99)).flatten(1)


@pytest.mark.parametrize("network, reason", [(Maps(), r"returns \(2, 3, 16, 16\)"), (Large(), "does not take images")])
def test_a_network_without_the_head_of_a_detector(tmp_path, network, reason):
    with pytest.raises(UserError, match=f"detector mine: {reason}"):
        features.open_detector("mine", save_script(network, tmp_path / "net.pt"), SHAPE)


def test_a_remote_file_is_fetched_once_and_again_when_damaged(net, tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/detectors/net.pt", Path(net).read_bytes())
    place, digest = "memory://detectors/net.pt", sha256(net)
    path, found = features.fetch(place, digest, "detector mine", str(tmp_path))
    assert found == digest and sha256(path) == digest and Path(path).is_relative_to(tmp_path)
    fs.pipe_file("/detectors/net.pt", b"another one")
    assert features.fetch(place, None, "detector mine", str(tmp_path)) == (path, digest)
    Path(path).write_bytes(b"damaged")
    with pytest.raises(UserError, match="has the sha256"):
        features.fetch(place, digest, "detector mine", str(tmp_path))
    fs.pipe_file("/detectors/net.pt", Path(net).read_bytes())
    assert features.fetch(place, digest, "detector mine", str(tmp_path)) == (path, digest)
