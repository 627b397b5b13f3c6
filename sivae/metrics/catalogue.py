"""The figures that a model is judged by: their names, what they are computed from, and how many images they need.

A figure of features is named KIND_DETECTOR, such as `frechet_pixels`. Two have names of their own, which say that the
features are Inception's and which nothing else may carry: `fid` (the Fréchet distance) and `kid` (the kernel distance).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from sivae.errors import UserError
from sivae.metrics import kid, precision_recall
from sivae.metrics.reconstruction import MIN_PIXELS

INCEPTION, INCEPTION_DIM = "inception", 2048
OF_FEATURES = ("frechet", "kernel", "precision", "recall", "density", "coverage")
OF_RECONSTRUCTIONS = ("mse", "psnr", "ssim", "ms_ssim", "lpips")
OWN_NAMES = {"fid": "frechet", "kid": "kernel"}  # of Inception's features alone
HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage", "psnr", "ssim", "ms_ssim")
_KNOWN = ", ".join(
    [*OWN_NAMES, *OF_RECONSTRUCTIONS, "and of a detector " + ", ".join(f"{kind}_DETECTOR" for kind in OF_FEATURES)]
)


@dataclass(frozen=True)
class Figure:
    """`kind` is one of OF_FEATURES, computed from the features of `detector`, or of OF_RECONSTRUCTIONS."""

    name: str
    kind: str
    detector: str | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.kind in HIGHER_IS_BETTER

    @property
    def needs_features(self) -> bool:
        """All feature vectors, not their moments alone."""
        return self.detector is not None and self.kind != "frechet"

    def check_images(self, num_reals: int, num_fakes: int, dim: int | None) -> None:
        """Raises UserError when there are fewer images than the figure needs; `dim`: of its detector's features, if known."""
        if self.detector is None:
            return
        if self.kind == "frechet":
            dim = dim or (INCEPTION_DIM if self.detector == INCEPTION else 1)
            least, why = dim + 1, f"more images than the {dim:,} features whose covariance it takes"
        elif self.kind == "kernel":
            least, why = kid.SUBSET_SIZE, f"subsets of {kid.SUBSET_SIZE:,} images"
        else:
            least, why = _neighbours(self.kind) + 1, f"{_neighbours(self.kind)} neighbours of each image"
        for count, what in ((num_reals, "real"), (num_fakes, "generated")):
            if count < least:
                raise UserError(
                    f"{self.name}: needs {why}, so at least {least:,}; there are {count:,} {what} ones;"
                    " give more, or take another figure"
                )

    def check_size(self, resolution: int) -> None:
        """Raises UserError when images of so many pixels are too small for the figure."""
        if resolution < MIN_PIXELS.get(self.kind, 1):
            raise UserError(
                f"{self.name}: needs images of at least {MIN_PIXELS[self.kind]} pixels, these have {resolution}; leave it out"
            )


def parse(names: Iterable[str]) -> tuple[Figure, ...]:
    """Figures by their names, each once. Raises UserError for an unknown name, or none."""
    figures = {name.strip(): _figure(name.strip()) for name in names if name.strip()}
    if not figures:
        raise UserError(f"metrics: none is named; known are {_KNOWN}")
    return tuple(figures.values())


def _figure(name: str) -> Figure:
    if name in OWN_NAMES:
        return Figure(name, OWN_NAMES[name], INCEPTION)
    if name in OF_RECONSTRUCTIONS:
        return Figure(name, name)
    kind, _, detector = name.partition("_")
    if kind in OF_FEATURES and detector:
        own = {kind: own for own, kind in OWN_NAMES.items()}.get(kind)
        if detector == INCEPTION and own:
            raise UserError(f"metrics: {name} has the name {own}")
        return Figure(name, kind, detector)
    close = difflib.get_close_matches(name, [*OWN_NAMES, *OF_RECONSTRUCTIONS, "frechet_pixels"], n=1, cutoff=0.7)
    raise UserError(f"metrics: {name!r} is unknown; " + (f"did you mean {close[0]}?" if close else f"known: {_KNOWN}"))


def _neighbours(kind: str) -> int:
    return precision_recall.PR_NEIGHBOURS if kind in ("precision", "recall") else precision_recall.DC_NEIGHBOURS
