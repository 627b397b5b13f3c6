"""Encoded bytes to pixels, by the fastest decoder present; lossless formats give the same pixels in every library.

CPU per photograph of 1024x1024 in colour, one core (imagecodecs 2026.3, Pillow 13):

    format                size      decode: imagecodecs   Pillow    encode (see `encode`)
    png                   1683 KiB  17.5 ms               27.3 ms   296 ms
    qoi                   2318 KiB   5.9 ms               1180 ms    11 ms
    webp, lossless        1487 KiB  16.6 ms               18.8 ms   136 ms
    webp, quality 90       152 KiB  11.2 ms               12.1 ms    93 ms
    jpeg, quality 95       417 KiB   5.2 ms                6.2 ms     6 ms

The header is compared before anything is decoded, so that a small file which claims to be huge never is.
"""

import io
import logging
import struct
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from sivae.errors import UserError

logger = logging.getLogger(__name__)
PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
JPEG_COLOURS = {1: "grey", 3: "RGB"}  # by the number of components; 4 is CMYK
PILLOW_NAMES = {"png": "PNG", "qoi": "QOI", "webp": "WEBP", "jpeg": "JPEG"}
GREY_AS_RGB = ("qoi", "webp")  # these know no grey: it is stored as RGB, and one channel of it is taken
QOI_END = bytes(7) + b"\x01"
EXIF = {"png": b"eXIf", "webp": b"EXIF", "jpeg": b"Exif\0\0"}  # what stands before it in an image
UNDONE = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = dict(zip(range(2, 9), UNDONE.split()))  # EXIF's orientation -> what undoes it
AGAIN = "pack the set again (for shards made by others: `sivae pack URLS DEST --resolution R`)"


class Header(NamedTuple):
    """What the first bytes of an image say of it."""

    width: int
    height: int
    num_channels: int  # 1 or 3 as pack writes them: 8 bits, no palette, no alpha; 0 for anything else
    kind: str  # in words


def read_header(image_format: str, encoded: bytes) -> Header | None:
    """The header of an encoded image, or None when these are not the bytes of such an image."""
    try:
        return HEADERS[image_format](encoded)
    except (struct.error, IndexError):  # cut short
        return None


def _png_header(encoded: bytes) -> Header | None:
    header = encoded[:33]  # signature, then IHDR: length, type, width, height, depth, colour type, ..., crc
    if len(header) < 33 or header[:8] != b"\x89PNG\r\n\x1a\n" or header[12:16] != b"IHDR":
        return None
    width, height, depth, colour = struct.unpack(">IIBB", header[16:26])
    plain = {0: 1, 2: 3}.get(colour, 0) if depth == 8 else 0
    return Header(width, height, plain, f"{depth}-bit {PNG_COLOURS.get(colour, 'unknown')}")


def _qoi_header(encoded: bytes) -> Header | None:
    magic, width, height, channels = struct.unpack(">4sIIB", encoded[:13])
    if magic != b"qoif":
        return None
    return Header(width, height, 3 if channels == 3 else 0, "8-bit RGB" if channels == 3 else "8-bit RGBA")


def _webp_header(encoded: bytes) -> Header | None:
    if encoded[:4] != b"RIFF" or encoded[8:12] != b"WEBP":
        return None
    chunk, content = encoded[12:16], encoded[20:30]
    if len(content) < 10:
        return None
    alpha = animated = False
    if chunk == b"VP8L" and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        width, height, alpha = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    elif chunk == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        width, height = (size & 0x3FFF for size in struct.unpack("<HH", content[6:10]))
    elif chunk == b"VP8X":
        alpha, animated = bool(content[0] & 0x10), bool(content[0] & 0x02)
        width, height = (int.from_bytes(content[i : i + 3], "little") + 1 for i in (4, 7))
    else:
        return None
    kind = "animated" if animated else "8-bit RGBA" if alpha else "8-bit RGB"
    return Header(width, height, 0 if alpha or animated else 3, kind)


def _jpeg_header(encoded: bytes) -> Header | None:
    if encoded[:2] != b"\xff\xd8":
        return None
    at = 2
    while encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame; the three are tables
            depth, height, width, components = struct.unpack(">BHHB", encoded[at + 4 : at + 10])
            kind = f"{depth}-bit {JPEG_COLOURS.get(components, f'{components}-component')}"
            plain = depth == 8 and components in JPEG_COLOURS and marker in (0xC0, 0xC1, 0xC2)
            return Header(width, height, components if plain else 0, kind)
        elif marker == 0x01 or 0xD0 <= marker <= 0xDA:  # none of these comes before the frame
            return None
        else:
            at += 2 + struct.unpack(">H", encoded[at + 2 : at + 4])[0]
    return None


HEADERS = {"png": _png_header, "qoi": _qoi_header, "webp": _webp_header, "jpeg": _jpeg_header}


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF says; one whose EXIF cannot be read stays as it is."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 - Pillow raises nearly anything on what cameras write there
        turn = None
    return image if turn is None else image.transpose(Image.Transpose[turn])


def pillow_decoder(image_format: str) -> Callable[[bytes], np.ndarray]:
    """Encoded bytes to uint8 [H, W] or [H, W, C], upright; raises whatever Pillow does."""
    formats = [PILLOW_NAMES[image_format]]
    # An array that can be written
    return lambda encoded: np.array(upright(Image.open(io.BytesIO(encoded), formats=formats)))


@cache
def library(image_format: str) -> Callable[[bytes], np.ndarray]:
    """imagecodecs' decoder where it is installed with that codec, else Pillow's."""
    pillow = pillow_decoder(image_format)
    try:
        import imagecodecs

        codec = {"png": "SPNG", "qoi": "QOI", "webp": "WEBP", "jpeg": "JPEG8"}[image_format]
        if getattr(imagecodecs, codec).available:
            fast = getattr(imagecodecs, f"{codec.lower()}_decode")
            return fast if image_format == "qoi" else partial(_fast_or_pillow, image_format, fast, pillow)
    except (ImportError, AttributeError):
        pass
    if image_format == "qoi":
        logger.warning("QOI images are decoded very slowly without imagecodecs; `pip install imagecodecs`")
    return pillow


def _fast_or_pillow(image_format: str, fast: Callable, pillow: Callable, encoded: bytes) -> np.ndarray:
    """imagecodecs turns nothing upright, and makes grey areas of what is cut off a JPEG; Pillow, asked where there is EXIF or
    the end is missing, turns or raises."""
    cut = image_format == "jpeg" and not encoded.endswith(b"\xff\xd9")
    return (pillow if cut or EXIF[image_format] in encoded else fast)(encoded)


def _decode(image_format: str, encoded: bytes, resolution: int, num_channels: int, name: str) -> np.ndarray:
    """uint8 [C, H, W] (a view of [H, W, C]) of one image, H = W = resolution. `name` stands for it in errors.

    Raises UserError when it is no such image, or one of another size or kind.
    """
    header = read_header(image_format, encoded)
    if header is None:
        raise UserError(f"{name} is no {PILLOW_NAMES[image_format]} image; {AGAIN}")
    if header.width != resolution or header.height != resolution:
        raise UserError(
            f"{name} is {header.width}x{header.height} pixels where the index says {resolution}x{resolution}; {AGAIN}"
        )
    stored_channels = 3 if image_format in GREY_AS_RGB else num_channels
    if header.num_channels != stored_channels:
        raise UserError(
            f"{name} is a {header.kind} image where the index says 8 bits and {num_channels} channels; {AGAIN}"
        )
    try:
        if image_format == "qoi" and not encoded.endswith(QOI_END):
            raise ValueError("it is cut short")  # the decoders do not tell
        pixels = library(image_format)(encoded)
    except Exception as error:  # noqa: BLE001 - a decoder raises nearly anything
        raise UserError(f"{name} cannot be decoded ({error}); {AGAIN}") from None
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if pixels.shape != (stored_channels, resolution, resolution):  # a header that its decoder reads otherwise
        raise UserError(
            f"{name} decodes to {pixels.shape} where the index says {(num_channels, resolution, resolution)}; {AGAIN}"
        )
    return pixels[:num_channels]


# image_format of the index -> decode(encoded, resolution, num_channels, name)
DECODERS = {image_format: partial(_decode, image_format) for image_format in HEADERS}
