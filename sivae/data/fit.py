"""Images of any size to the squares of one resolution that a set holds; and the smaller levels of a pyramid."""

import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sivae.data.sources.base import BadImage
from sivae.errors import UserError

FILTERS = {name: Image.Resampling[name.upper()] for name in ("lanczos", "bicubic", "bilinear", "box", "nearest")}
CROPS = (
    "give `center` (the central square), `none`, SIZE (the central square of so many pixels) or "
    "LEFT,TOP,SIZE, all in pixels"
)
SMALLEST_LEVEL = 4  # of a pyramid: where progressive growing starts


def check_fit(crop: str, filter: str):
    """Raises UserError on a crop or filter that there is not."""
    if filter not in FILTERS:
        raise UserError(f"there is no filter {filter!r}; take one of {', '.join(FILTERS)}")
    if crop not in ("center", "none") and not re.fullmatch(r"(\d{1,6},\d{1,6},)?0*[1-9]\d{0,5}", crop, re.ASCII):
        raise UserError(f"{crop!r} is no crop; {CROPS}")


def crop_box(width: int, height: int, crop: str, name: str) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the square that is kept.

    Raises BadImage when it does not lie inside the image, and UserError for crop `none` when that is no square.
    """
    if crop == "none" and width != height:
        raise UserError(f"{name} is {width}x{height} pixels, which is no square; choose a crop ({CROPS})")
    if "," in crop:
        left, top, side = map(int, crop.split(","))
    else:
        side = min(width, height) if crop in ("center", "none") else int(crop)
        left, top = (width - side) // 2, (height - side) // 2
    if left < 0 or top < 0 or left + side > width or top + side > height:
        raise BadImage(f"{name} is {width}x{height} pixels, too small for the crop {crop}; take a smaller crop")
    return left, top, left + side, top + side


def fit(
    image: np.ndarray,
    resolution: int,
    num_channels: int,
    crop: str = "center",
    filter: str = "lanczos",
    name: str = "the image",
) -> Image.Image:
    """uint8 [H, W, 1 or 3] cut to a square (see `crop_box`) and resized to resolution x resolution, grey or RGB."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    box = crop_box(picture.width, picture.height, crop, name)
    picture = picture.crop(box)
    if picture.width != resolution:
        picture = picture.resize((resolution, resolution), FILTERS[filter])
    return picture.convert("L" if num_channels == 1 else "RGB")


def pyramid_levels(resolution: int) -> tuple[int, ...]:
    """The resolutions of a pyramid, the full one first. Raises UserError when it is no power of two."""
    if resolution < SMALLEST_LEVEL or resolution & (resolution - 1):
        raise UserError(f"a pyramid needs a resolution that is a power of two from 4 on, not {resolution}")
    return tuple(resolution >> i for i in range(resolution.bit_length() - SMALLEST_LEVEL.bit_length() + 1))


def pyramid(pixels: np.ndarray, num_levels: int) -> Iterator[np.ndarray]:
    """uint8 [R, R, C] at R, R / 2, ...: each pixel the average of a square of the first, rounded half to even.

    As the exporters of ProGAN and StyleGAN do (dataset_tool.py, TFRecordExporter.add_image), which halve a
    float32 copy again and again. Here the sums are whole numbers, so that no resolution is too large to be exact.
    """
    yield pixels
    total = pixels.astype(np.uint32)  # 255 * 16384**2 / 4**2 < 2**32
    for level in range(1, num_levels):
        total = total[0::2, 0::2] + total[0::2, 1::2] + total[1::2, 0::2] + total[1::2, 1::2]
        yield np.rint(total / 4.0**level).astype(np.uint8)
