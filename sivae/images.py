"""Pixels: between uint8 and the range a family uses, picture grids, PNG and GIF files."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

NAME_WIDTH, NAME_HEIGHT = 64, 18  # pixels of the margins that hold names


def to_float(images: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """uint8 [..., C, H, W] -> float32 in [low, high], contiguous. Batches come with channels last, and part here, on the device."""
    return images.contiguous().float() * ((high - low) / 255) + low


def to_uint8(images: Tensor, low: float = 0.0, high: float = 1.0, *, truncate: bool = False) -> Tensor:
    """float in [low, high], clamped -> uint8, rounded to the nearest, or down where `truncate`, as published figures were."""
    scaled = ((images.float() - low) * (255 / (high - low))).clamp(0, 255)
    return (scaled if truncate else scaled.round()).to(torch.uint8)


def at_level(images: Tensor, resolution: int, blend: float = 1.0) -> Tensor:
    """Float [B, C, H, W] -> [B, C, resolution, resolution] as a level of progressive growing takes them.

    Shrunk by the mean of each square of pixels. While the level fades in (blend below 1) also mixed with their own half size,
    enlarged again, so that detail arrives at the rate of the layers that are to make it.
    """
    factor = images.shape[-1] // resolution
    if factor > 1:
        images = F.avg_pool2d(images, factor)
    if blend < 1:
        coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")
        images = torch.lerp(coarse, images, blend)
    return images


def pixels(image: Tensor) -> np.ndarray:
    """uint8 [C, H, W] -> [H, W, 3]; grey becomes colour."""
    found = image.cpu().numpy().transpose(1, 2, 0)
    return found if found.shape[-1] == 3 else np.repeat(found[..., :1], 3, axis=-1)


def tile(image: Tensor) -> np.ndarray:
    """uint8 [C, H, W] -> uint8 [H', W', 3]; small images are enlarged so that a person sees them."""
    enlarge = max(1, 64 // image.shape[1])
    return pixels(image).repeat(enlarge, axis=0).repeat(enlarge, axis=1)


def grid(images: Tensor, columns: int, padding: int = 2) -> np.ndarray:
    """uint8 [N, C, H, W] -> one uint8 [H', W', 3] picture, row by row."""
    tiles = [tile(image) for image in images]
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    picture = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8)
    for index, found in enumerate(tiles):
        top, left = padding + index // columns * (height + padding), padding + index % columns * (width + padding)
        picture[top : top + height, left : left + width] = found
    return picture


def table(images: Tensor, rows: list[str], columns: list[str], padding: int = 2) -> np.ndarray:
    """A grid of uint8 [rows * columns, C, H, W] with the names of rows at the left and of columns at the top, where there are any."""
    body = grid(images, len(columns), padding)
    left, top = NAME_WIDTH * any(rows), NAME_HEIGHT * any(columns) * max(1 + name.count("\n") for name in columns)
    canvas = Image.new("RGB", (left + body.shape[1], top + body.shape[0]), "white")
    canvas.paste(Image.fromarray(body), (left, top))
    draw, (height, width) = ImageDraw.Draw(canvas), tile(images[0]).shape[:2]
    for index, name in enumerate(rows):
        draw.text((4, top + padding + (index + 0.5) * (height + padding)), name, fill="black", anchor="lm")
    for index, name in enumerate(columns):
        draw.text(
            (left + padding + (index + 0.5) * (width + padding), top / 2),
            name,
            fill="black",
            anchor="mm",
            align="center",
        )
    return np.asarray(canvas)


def with_margins(cells: Tensor, left: Tensor, top: Tensor) -> Tensor:
    """Tiles of a grid with `left` [N, C, H, W] in its first column, `top` [M, C, H, W] in its first row, `cells`
    [N, M, C, H, W] inside and a white corner: [(N + 1) * (M + 1), C, H, W]. All uint8."""
    corner = torch.full_like(top[:1], 255)
    rows = [torch.cat([corner, top]), *(torch.cat([image[None], row]) for image, row in zip(left, cells))]
    return torch.cat(rows)


def panels(parts: dict[str, Tensor], columns: int) -> np.ndarray:
    """Grids under each other, each with its title: {title: uint8 [N, C, H, W]} -> uint8 [H', W', 3]."""
    pieces = []
    for title, images in parts.items():
        body = grid(images, columns)
        head = Image.new("RGB", (body.shape[1], 18), "white")
        ImageDraw.Draw(head).text((4, 3), title, fill="black")
        pieces += [np.asarray(head), body]
    return np.concatenate(pieces)


def png_bytes(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def gif_bytes(images: Tensor, frames_per_sec: float = 15.0) -> bytes:
    """uint8 [N, C, H, W] -> a GIF that goes from the first image to the last and back, for ever. Colours are reduced to 256 a frame."""
    frames = [Image.fromarray(tile(image)).quantize(256, dither=Image.Dither.NONE) for image in images]
    there_and_back = [*frames, *frames[-2:0:-1]]
    buffer = io.BytesIO()
    there_and_back[0].save(
        buffer, "GIF", save_all=True, append_images=there_and_back[1:], duration=round(1000 / frames_per_sec), loop=0
    )
    return buffer.getvalue()
