"""Proves that every decoder gives the same pixels, that lossless formats give back what was encoded and lossy ones
nearly, and that an image of another size or kind, or one cut short, is refused before it is decoded.

    python -m pytest tests/unit/test_data_codecs.py
"""

import builtins
import io
import tracemalloc

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from sivae.data import decode
from sivae.data.decode import DECODERS, library, pillow_decoder, read_header
from sivae.data.encode import check_format, encode
from sivae.data.index import IMAGE_FORMATS
from sivae.errors import UserError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(size, channels):
    """An image that lossy encoding likes."""
    y, x = np.mgrid[:size, :size]
    waves = [127 + 60 * np.sin(x / (9 + c)) + 60 * np.cos(y / (13 - c)) for c in range(channels)]
    return np.stack(waves, axis=-1).round().astype(np.uint8)


@pytest.fixture(params=["imagecodecs", "pillow"])
def codec(request, monkeypatch):
    if request.param == "imagecodecs":
        pytest.importorskip("imagecodecs")
    else:
        monkeypatch.setattr(decode, "library", pillow_decoder)
    return request.param


def saved(image, image_format, **settings):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 9, 64])
@pytest.mark.parametrize("image_format", ["png", "qoi", "webp"])
def test_lossless(codec, image_format, size, channels):
    for image in (noise(size, size, channels), smooth(size, channels), np.zeros((size, size, channels), np.uint8)):
        encoded = encode(image, image_format, None)
        again = DECODERS[image_format](encoded, size, channels, "x")
        assert np.array_equal(again, image.transpose(2, 0, 1)) and again.dtype == np.uint8
        header = read_header(image_format, encoded)
        stored = channels if image_format == "png" else 3  # grey is stored as RGB
        assert (header.width, header.height, header.num_channels) == (size, size, stored)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_format, quality", [("jpeg", 95), ("jpeg", 60), ("webp", 95), ("webp", 60)])
def test_lossy(codec, image_format, quality, channels):
    image = smooth(64, channels)
    again = DECODERS[image_format](encode(image, image_format, quality), 64, channels, "x")
    error = np.square(again.astype(float) - image.transpose(2, 0, 1)).mean()
    assert again.shape == (channels, 64, 64) and 0 < error < (3 if quality == 95 else 30)


def test_jpeg_keeps_the_colour_of_every_pixel():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255  # red and blue columns: 4:2:0 would make them one purple
    again = DECODERS["jpeg"](encode(stripes, "jpeg", 95), 64, 3, "x")
    assert np.abs(again.transpose(1, 2, 0).astype(int) - stripes).max() < 40


def test_both_libraries_decode_jpeg_alike():
    pytest.importorskip("imagecodecs")
    encoded = encode(smooth(64, 3), "jpeg", 80)
    assert library("jpeg") is not pillow_decoder("jpeg")
    assert np.array_equal(library("jpeg")(encoded), pillow_decoder("jpeg")(encoded))


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 2}, {"restart_marker_rows": 1}])
def test_jpeg_of_others(codec, settings):
    image = smooth(64, 3)
    encoded = saved(Image.fromarray(image), "JPEG", quality=95, **settings)
    assert DECODERS["jpeg"](encoded, 64, 3, "x").shape == (3, 64, 64)
    filled = encoded[:2] + b"\xff\xff\xfe\x00\x04ab" + encoded[2:]  # a fill byte and a comment before the rest
    assert np.array_equal(DECODERS["jpeg"](filled, 64, 3, "x"), DECODERS["jpeg"](encoded, 64, 3, "x"))


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_of_others_are_upright(codec, image_format, orientation):
    image, exif = Image.fromarray(smooth(16, 3)), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    settings = {"lossless": True} if image_format == "webp" else {}
    stored = saved(image, image_format, exif=exif, **settings)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(stored))))
    assert np.array_equal(DECODERS[image_format](stored, 16, 3, "x"), expected.transpose(2, 0, 1))


def test_webp_with_a_long_header(codec):
    image = noise(9, 9, 3)
    encoded = saved(Image.fromarray(image), "WEBP", lossless=True, exif=Image.Exif().tobytes() + bytes(9))
    assert encoded[12:16] == b"VP8X"
    assert np.array_equal(DECODERS["webp"](encoded, 9, 3, "x"), image.transpose(2, 0, 1))


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_what_does_not_fit_is_refused(codec, image_format):
    data = encode(noise(9, 9, 3), image_format, 90 if image_format == "jpeg" else None)
    for encoded, resolution, message in [
        (data, 8, "is 9x9 pixels where the index says 8x8"),
        (b"", 9, "is no"),
        (b"x" * 99, 9, "is no"),
        (data[:12], 9, "is no"),
        (data[: -30 if image_format == "png" else -1], 9, "cannot be decoded"),  # 30: into the pixels
        (data[: len(data) // 2], 9, "(is no|cannot be decoded)"),
    ]:
        with pytest.raises(UserError, match=f"sample 7 {message}.*sivae pack URLS DEST"):
            DECODERS[image_format](encoded, resolution, 3, "sample 7")


@pytest.mark.parametrize(
    "image_format, mode, settings, message",
    [
        ("png", "RGBA", {}, "8-bit RGBA"),
        ("png", "LA", {}, "8-bit grey with alpha"),
        ("png", "P", {}, "8-bit palette"),
        ("png", "I;16", {}, "16-bit grey"),
        ("png", "1", {}, "1-bit grey"),
        ("png", "L", {}, "8-bit grey image where the index says 8 bits and 3 channels"),
        ("qoi", "RGBA", {}, "8-bit RGBA"),
        ("webp", "RGBA", {"lossless": True}, "8-bit RGBA"),
        ("webp", "RGBA", {"quality": 80}, "8-bit RGBA"),
        ("webp", "RGB", {"save_all": True, "append_images": True}, "animated"),
        ("jpeg", "L", {}, "8-bit grey"),
        ("jpeg", "CMYK", {}, "8-bit 4-component"),
    ],
)
def test_other_kinds_are_refused(codec, image_format, mode, settings, message):
    if mode == "I;16":
        image = Image.fromarray(noise(9, 9).astype(np.uint16) * 257)
    elif mode == "RGBA":
        image = Image.fromarray(noise(9, 9, 4))
    elif mode == "CMYK":
        image = Image.frombytes("CMYK", (9, 9), noise(9, 9, 4).tobytes())
    else:
        image = Image.fromarray(noise(9, 9, 3)).convert(mode)
    if "append_images" in settings:
        settings = settings | {"append_images": [Image.fromarray(noise(9, 9, 3, seed=1))]}
    with pytest.raises(UserError, match=f"x (is a |is an )?.*{message}"):
        DECODERS[image_format](saved(image, decode.PILLOW_NAMES[image_format], **settings), 9, 3, "x")


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_a_small_file_that_claims_to_be_huge_is_not_decoded(codec, image_format):
    data = bytearray(encode(noise(9, 9, 3), image_format, None if image_format != "jpeg" else 90))
    if image_format in ("png", "qoi"):
        at = 16 if image_format == "png" else 4
        data[at : at + 8] = b"\x00\x00\xff\xff" * 2
    elif image_format == "webp":
        data[21:25] = (0x3FFF | 0x3FFF << 14).to_bytes(4, "little")
    else:
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = b"\xff\xff" * 2
    tracemalloc.start()
    with pytest.raises(UserError, match="(65535x65535|16384x16384) pixels where the index says 9x9"):
        DECODERS[image_format](bytes(data), 9, 3, "x")
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_any_damage_is_pixels_or_a_user_error(codec, image_format):
    whole = encode(noise(9, 9, 3), image_format, None if image_format != "jpeg" else 90)
    draw = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.integers(1, 4)):
            data[draw.integers(len(data))] = draw.integers(256)
        try:
            pixels = DECODERS[image_format](bytes(data[: draw.integers(1, len(data) + 100)]), 9, 3, "x")
        except UserError as error:
            assert str(error).startswith("x ")
        else:
            assert pixels.shape == (3, 9, 9) and pixels.dtype == np.uint8


def test_formats_and_qualities():
    assert check_format("jpeg", None, 8) == 95 and check_format("webp", None, 8) is None
    assert check_format("webp", 0, 8) == 0 and check_format("png", None, 8) is None
    for settings, message in [
        (("gif", None, 8), "no image format 'gif'"),
        (("png", 90, 8), "takes no quality"),
        (("jpeg", 0, 8), "1..100"),
        (("webp", 101, 8), "0..100"),
        (("webp", None, 16384), "16383"),
    ]:
        with pytest.raises(UserError, match=message):
            check_format(*settings)


def test_without_imagecodecs(monkeypatch, caplog):
    real = builtins.__import__

    def without(name, *rest):
        if name == "imagecodecs":
            raise ImportError(name)
        return real(name, *rest)

    encoded = encode(noise(5, 5, 3), "qoi", None)
    monkeypatch.setattr(builtins, "__import__", without)
    library.cache_clear()
    try:
        assert np.array_equal(DECODERS["qoi"](encoded, 5, 3, "x"), noise(5, 5, 3).transpose(2, 0, 1))
        assert "pip install imagecodecs" in caplog.text
        with pytest.raises(UserError, match="pip install imagecodecs"):
            check_format("qoi", None, 8)
    finally:
        monkeypatch.undo()
        library.cache_clear()
