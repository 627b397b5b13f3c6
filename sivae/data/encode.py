"""Pixels to encoded bytes.

PNG, WebP and JPEG are always written by Pillow, whatever else is installed: it is always there, its bytes do
not depend on what else is, and imagecodecs binds the same libraries and is no faster (measured; see the
table in `decode`). QOI is written by imagecodecs alone, for Pillow's encoder is Python and takes a second an
image. JPEG keeps its colour at full resolution (4:4:4): at equal size that is closer to the original than
4:2:0 with a higher quality (of 1024x1024 photographs, quality 92 at 4:4:4 is 305 KiB and 40.9 dB, quality 95
at 4:2:0 is 309 KiB and 39.8 dB). Lossless WebP is made with less effort than the default: 136 ms instead of
239 ms for 0.4 % more bytes.
"""

import io

import numpy as np
from PIL import Image

from sivae.data.index import IMAGE_FORMATS
from sivae.errors import UserError

SUFFIXES = {"png": "png", "qoi": "qoi", "webp": "webp", "jpeg": "jpg"}  # of the member in the tar
JPEG_QUALITY = 95
MAX_WEBP_RESOLUTION = 16383


def check_format(image_format: str, quality: int | None, resolution: int) -> int | None:
    """The quality to use: None is lossless. Raises UserError on a format or quality that cannot be written."""
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"there is no image format {image_format!r}; take one of {', '.join(IMAGE_FORMATS)}")
    if image_format in ("png", "qoi") and quality is not None:
        raise UserError(f"{image_format} is lossless and takes no quality; leave it out, or take webp or jpeg")
    lowest = 1 if image_format == "jpeg" else 0
    if quality is not None and not lowest <= quality <= 100:
        raise UserError(f"a quality of {quality} is not in {lowest}..100")
    if image_format == "webp" and resolution > MAX_WEBP_RESOLUTION:
        raise UserError(f"WebP images have at most {MAX_WEBP_RESOLUTION} pixels a side, not {resolution}; take png")
    if image_format == "qoi":
        _qoi_encode()
    return JPEG_QUALITY if image_format == "jpeg" and quality is None else quality


def encode(pixels: np.ndarray, image_format: str, quality: int | None) -> bytes:
    """uint8 [H, W, 1 or 3] as png, qoi, webp (quality None: lossless) or jpeg. QOI and WebP store grey as RGB."""
    if image_format == "qoi":
        return _qoi_encode()(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))
    picture, buffer = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), io.BytesIO()
    if image_format == "png":
        picture.save(buffer, format="PNG")
    elif image_format == "jpeg":
        picture.save(buffer, format="JPEG", quality=quality, subsampling=0)
    elif quality is None:  # there quality is effort
        picture.convert("RGB").save(buffer, format="WEBP", lossless=True, method=2, quality=20)
    else:
        picture.convert("RGB").save(buffer, format="WEBP", quality=quality)
    return buffer.getvalue()


def _qoi_encode():
    try:
        from imagecodecs import QOI, qoi_encode
    except ImportError:
        QOI = None
    if QOI is None or not QOI.available:
        raise UserError("qoi images are written by imagecodecs, which is not installed; `pip install imagecodecs`")
    return qoi_encode
