"""Encoded images of any kind to uint8 grey or RGB, by Pillow, and whether a PNG can be copied as it is."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from sivae.data.decode import upright
from sivae.data.sources.base import BadImage
from sivae.errors import shown

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_IMAGE_BYTES = 2**30  # no sane encoding of an image that Pillow agrees to open is longer
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB = 0, 2  # PNG's colour types without palette and alpha


def decode(data: bytes, where: str) -> tuple[np.ndarray, bytes | None]:
    """(pixels uint8 [H, W, 1 or 3], `data` when it is a PNG that can be copied, else None).

    Raises BadImage: damaged, cut short, no image, or larger than Pillow's decompression-bomb limit.
    """
    try:
        plain = data.startswith(PNG_SIGNATURE) and _check_png(data)
        with Image.open(io.BytesIO(data)) as image:
            plain = plain and upright(image) is image
            pixels = to_uint8(image)
    except UnidentifiedImageError:  # its text has an address in memory
        raise BadImage(
            f"{where} cannot be read as an image (its bytes are of no known kind); repair or remove it"
        ) from None
    except Exception as error:  # noqa: BLE001 - Pillow raises nearly anything on damaged files
        raise BadImage(f"{where} cannot be read as an image ({shown(error)}); repair or remove it") from None
    return pixels, data if plain else None


def _check_png(data: bytes) -> bool:
    """Whether a PNG is plain: 8-bit grey or RGB, not interlaced, no transparency, no animation, and over at its end.

    Raises ValueError when a chunk is cut or damaged. Pillow compares no checksum of image data, and takes a
    file without an end; both would pass for whole.
    """
    position, plain = len(PNG_SIGNATURE), True
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        stop = position + 12 + length
        if stop > len(data):
            break
        (crc32,) = struct.unpack_from(">I", data, stop - 4)
        if zlib.crc32(memoryview(data)[position + 4 : stop - 4]) != crc32:
            raise ValueError(f"its {kind.decode('latin1')!r} part is damaged")
        if kind == b"IHDR" and length == 13:
            depth, colour, _, _, interlace = data[position + 16 : position + 21]
            plain = plain and depth == 8 and colour in (GREY, RGB) and not interlace
        plain = plain and kind not in (b"tRNS", b"acTL", b"fcTL", b"fdAT")
        position = stop
        if kind == b"IEND":
            return plain and position == len(data)
    raise ValueError("it is cut short")


def to_uint8(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 1] for grey images and [H, W, 3] for all others, upright.

    EXIF rotation is applied, palettes are looked up, alpha is laid over white. 16-bit grey is rounded to 8 bits. Of 16-bit
    colour Pillow gives the upper 8 bits alone, and 16-bit grey with alpha is colour to it. Raises ValueError on
    floating-point and 32-bit images, whose range nobody knows.
    """
    if image.mode == "I" and image.format not in (None, "PNG", "PPM"):  # of which Pillow gives 16 bits so too
        raise ValueError("a 32-bit image, whose range nobody knows; save it with 8 or 16 bits")
    image = upright(image)
    if image.mode == "F":
        raise ValueError("a floating-point image; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow itself would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return ((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None]
    if "A" in image.getbands() or "transparency" in image.info:
        grey, image = image.mode in ("L", "LA"), image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    return np.asarray(image).reshape(image.height, image.width, -1)
