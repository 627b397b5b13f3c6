"""`shapes:`: drawn images with known factors, for image translation. The class is a shape and its colour, the content its
place and its rotation, so that the true image of any class with any content is there to compare with.

4 shapes x 4 colours = 16 classes, 5 x 5 places x 5 rotations = 125 contents: 2,000 images, image = class * 125 + content.
Rotations stay within 36 degrees of upright, where no shape looks like itself turned further. The split `test` holds every
fifth pair of class and content, so that training sees every class and every content, but not all pairs.
"""

import numpy as np

from sivae.data.sources.base import Sample, Source, fingerprint
from sivae.errors import UserError

SHAPES = ("square", "triangle", "bar", "cross")
COLOURS = {"red": (230, 60, 50), "green": (60, 190, 80), "blue": (70, 110, 240), "yellow": (240, 210, 60)}
PLACES = (-0.36, -0.18, 0.0, 0.18, 0.36)  # of the middle, from that of the image, which reaches from -1 to 1
DEGREES = (-36, -18, 0, 18, 36)
NUM_CLASSES, NUM_CONTENTS = len(SHAPES) * len(COLOURS), len(PLACES) ** 2 * len(DEGREES)
OVERSAMPLE = 4  # points a side of a pixel that are looked at
VERSION = 1  # of the drawing


class Shapes(Source):
    description = "shapes: (drawn)"
    licence = "CC0 1.0"
    num_channels = 3

    def __init__(self, resolution: int, labels: bool | None = None):
        if resolution < 8:
            raise UserError(f"shapes: cannot be told apart at {resolution} pixels; give a resolution of 8 or more")
        self.resolution, self.with_labels = resolution, labels is not False
        self.num_classes = NUM_CLASSES if self.with_labels else None
        classes, contents = np.divmod(np.arange(len(self)), NUM_CONTENTS)
        test = (classes + contents) % 5 == 0
        self.splits = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
        self.names = [self._name(i) for i in range(len(self))]
        self.fingerprint = fingerprint("shapes", VERSION, resolution, self.num_classes)

    def __len__(self):
        return NUM_CLASSES * NUM_CONTENTS

    def _name(self, i: int) -> str:
        (shape, colour), (row, column, turn) = _factors(i)
        return f"{list(COLOURS)[colour]} {SHAPES[shape]}, row {row}, column {column}, {DEGREES[turn]} degrees"

    def __getitem__(self, i: int) -> Sample:
        return Sample(self.names[i], draw(i, self.resolution), i // NUM_CONTENTS if self.with_labels else None)


def _factors(i: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """((shape, colour), (row, column, rotation)) of image i."""
    found = np.unravel_index(i, (len(SHAPES), len(COLOURS), len(PLACES), len(PLACES), len(DEGREES)))
    return tuple(map(int, found[:2])), tuple(map(int, found[2:]))


def draw(i: int, resolution: int) -> np.ndarray:
    """Image i, uint8 [resolution, resolution, 3]: a shape on black, smooth at its edges."""
    (shape, colour), (row, column, turn) = _factors(i)
    points = resolution * OVERSAMPLE
    at = (np.arange(points) + 0.5) * 2 / points - 1
    y, x = at[:, None] - PLACES[row], at[None, :] - PLACES[column]
    angle = np.deg2rad(DEGREES[turn])
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    inside = _inside(SHAPES[shape], x, y).reshape(resolution, OVERSAMPLE, resolution, OVERSAMPLE).mean(axis=(1, 3))
    return (inside[..., None] * list(COLOURS.values())[colour]).round().astype(np.uint8)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape about the origin; y points down."""
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.34
    if shape == "triangle":
        return (y < 0.3) & (2 * abs(x) - 0.5 < y)
    if shape == "bar":
        return (abs(x) < 0.5) & (abs(y) < 0.16)
    return ((abs(x) < 0.46) & (abs(y) < 0.14)) | ((abs(y) < 0.46) & (abs(x) < 0.14))
