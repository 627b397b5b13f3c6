"""Proves that no pixel changes on its way into a network and back, the layout of picture grids, and that PNG files read back.

python -m pytest tests/unit/test_images.py
"""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sivae.images import at_level, grid, panels, pixels, png_bytes, to_float, to_uint8


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0)])
def test_all_256_values_survive_the_round_trip(low, high):
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    inside = to_float(values, low, high)
    assert inside.dtype == torch.float32
    assert float(inside.min()) == low and float(inside.max()) == pytest.approx(high, abs=1e-6)
    # The closed form in float64; float32 rounding of values of size one.
    expected = values.double() / 255 * (high - low) + low
    assert torch.allclose(inside.double(), expected, atol=2e-7)
    assert torch.equal(to_uint8(inside, low, high), values)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0)])
def test_values_outside_are_clamped_and_others_rounded_to_the_nearest(low, high):
    width = high - low
    values = torch.tensor([low - 5, high + 5, low + width * 0.6 / 255, low + width * 0.4 / 255])
    assert to_uint8(values, low, high).tolist() == [0, 255, 1, 0]


def test_bfloat16_images_are_rounded_in_float32():
    assert to_uint8(torch.tensor([1.0, 0.5], dtype=torch.bfloat16)).tolist() == [255, 128]


def test_pixels_makes_grey_colour():
    grey = torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
    assert pixels(grey).shape == (2, 2, 3) and (pixels(grey) == pixels(grey)[..., :1]).all()
    colour = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    assert np.array_equal(pixels(colour)[0, 1], [1, 5, 9])


@pytest.mark.parametrize(
    "count, channels, size, columns, expected",
    [
        (5, 1, 16, 3, (2 * (64 + 2) + 2, 3 * (64 + 2) + 2, 3)),  # enlarged four times
        (1, 3, 64, 1, (68, 68, 3)),
        (4, 3, 128, 4, (132, 4 * 130 + 2, 3)),
        (2, 1, 28, 4, (60, 4 * 58 + 2, 3)),  # enlarged twice, two places empty
    ],
)
def test_grid_shapes(count, channels, size, columns, expected):
    picture = grid(torch.zeros(count, channels, size, size, dtype=torch.uint8), columns)
    assert picture.shape == expected and picture.dtype == np.uint8


def test_grid_puts_every_image_in_its_place():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 64, 64) * 10
    picture = grid(images, columns=2, padding=3)
    for index in range(5):
        top, left = 3 + index // 2 * 67, 3 + index % 2 * 67
        assert (picture[top : top + 64, left : left + 64] == index * 10).all()
    assert (picture[3 + 2 * 67 :, 3 + 67 :] == 255).all()  # the empty place
    assert (picture[:3] == 255).all() and (picture[:, :3] == 255).all()


def test_panels_stand_under_each_other_with_titles():
    images = torch.zeros(4, 1, 64, 64, dtype=torch.uint8)
    picture = panels({"real": images, "reconstructed": images}, columns=4)
    one = grid(images, 4)
    assert picture.shape == (2 * (18 + one.shape[0]), one.shape[1], 3)
    assert np.array_equal(picture[18 : 18 + len(one)], one) and np.array_equal(picture[-len(one) :], one)
    assert picture[:18].min() < 128 and not np.array_equal(picture[:18], picture[18 + len(one) :][:18])


def test_png_reads_back():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    data = png_bytes(picture)
    assert data.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)


def test_a_level_of_detail_takes_means_of_squares_and_fades_in_its_detail():
    x = torch.arange(64, dtype=torch.float32).view(1, 1, 8, 8)
    assert torch.equal(at_level(x, 8), x)
    half = at_level(x, 4)
    assert half.shape == (1, 1, 4, 4) and half[0, 0, 0, 0] == (0 + 1 + 8 + 9) / 4
    assert torch.allclose(at_level(x, 2), F.avg_pool2d(half, 2))
    coarse = at_level(x, 8, blend=0.0)
    assert torch.equal(coarse, half.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.allclose(at_level(x, 8, blend=0.25), 0.25 * x + 0.75 * coarse)
