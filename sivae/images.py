"""Pixels: between uint8 and the range a family uses, picture grids, PNG files."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_float(images: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """uint8 [..., C, H, W] -> float32 in [low, high], contiguous. Batches come with channels last, and part here, on the device."""
    return images.contiguous().float() * ((high - low) / 255) + low


def to_uint8(images: Tensor, low: float = 0.0, high: float = 1.0, *, truncate: bool = False) -> Tensor:
    """float in [low, high], clamped -> uint8, rounded to the nearest, or down where `truncate`, as published figures were."""
    scaled = ((images.float() - low) * (255 / (high - low))).clamp(0, 255)
    return (scaled if truncate else scaled.round()).to(torch.uint8)


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
