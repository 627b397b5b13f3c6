"""Pixels: between uint8 and the range a family uses, picture grids, PNG files."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor


def to_float(images: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """uint8 [..., C, H, W] -> float32 in [low, high], contiguous. Batches come with channels last, and part here, on the device."""
    return images.contiguous().float() * ((high - low) / 255) + low


def to_uint8(images: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """float in [low, high], clamped -> uint8, rounded to the nearest."""
    return ((images.float() - low) * (255 / (high - low))).clamp(0, 255).round().to(torch.uint8)


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


def grid(images: Tensor, columns: int, padding: int = 2) -> np.ndarray:
    """uint8 [N, C, H, W] -> one uint8 [H', W', 3] picture, row by row. Small images are enlarged so that a person sees them."""
    enlarge = max(1, 64 // images.shape[2])
    tiles = [pixels(image).repeat(enlarge, axis=0).repeat(enlarge, axis=1) for image in images]
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    picture = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = padding + index // columns * (height + padding), padding + index % columns * (width + padding)
        picture[top : top + height, left : left + width] = tile
    return picture


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
