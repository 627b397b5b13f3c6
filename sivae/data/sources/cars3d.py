"""Cars3D (Reed et al., Deep Visual Analogy-Making, NIPS 2015): 183 car models from 24 x 4 directions, 128x128, RGB.

The folder data/cars of nips2015-analogy-data.tar.gz: one MATLAB 5 file for each car, whose `im` is uint8
[height, width, 3, 24 azimuths, 4 elevations]. The class is the car, the content the direction: image = car * 96 +
azimuth * 4 + elevation, cars in the order of their names.
"""

import numpy as np

from sivae.data.sources.base import BadImage, Sample, Source, fingerprint, natural_key
from sivae.data.sources.files import damage, find_files
from sivae.data.sources.svhn import read_mat
from sivae.storage import Folder

NUM_AZIMUTHS, NUM_ELEVATIONS = 24, 4
NUM_VIEWS = NUM_AZIMUTHS * NUM_ELEVATIONS
NUM_TEST_CARS = 20  # as many as LORD (arXiv 1906.11796) holds out; it draws them, here they are the last


class Cars3D(Source):
    """Splits: the last 20 cars are `test`; fewer than 21 cars have no splits. A file is read once for its 96 images."""

    licence = "Reed et al., Deep Visual Analogy-Making, NIPS 2015; published without a licence"
    num_channels = 3
    _last: tuple[int, np.ndarray] | None = None  # the car read last, and its views

    def __init__(self, folder: Folder, name: None = None, labels: bool | None = None):
        files = [file for file in find_files(folder) if file.name.lower().endswith(".mat")]
        self.files = sorted(files, key=lambda file: natural_key(file.name))
        self.with_labels = labels is not False
        self.num_classes = len(self.files) if self.with_labels else None
        self.names = [
            f"{file.name.removesuffix('.mat')} {view}" for file in self.files for view in map(_view, range(NUM_VIEWS))
        ]
        if len(self.files) > NUM_TEST_CARS:
            first = (len(self.files) - NUM_TEST_CARS) * NUM_VIEWS
            self.splits = {"train": range(first), "test": range(first, len(self))}
        self.description = f"Cars3D, {len(self.files)} cars"
        self.fingerprint = fingerprint("cars3d", self.num_classes, [file.identity for file in self.files])

    def __len__(self):
        return len(self.files) * NUM_VIEWS

    def __getstate__(self):
        return self.__dict__ | {"_last": None}

    def __getitem__(self, i: int) -> Sample:
        car, view = divmod(i, NUM_VIEWS)
        if self._last is None or self._last[0] != car:
            self._last = (car, self._read(car))
        return Sample(self.names[i], self._last[1][view], car if self.with_labels else None)

    def _read(self, car: int) -> np.ndarray:
        """uint8 [96, H, W, 3]."""
        file = self.files[car]
        with damage(file.where, "download it again", BadImage):
            views = read_mat(file.read(missing=BadImage)).get("im", np.empty(0))
            if views.dtype != np.uint8 or views.shape[2:] != (3, NUM_AZIMUTHS, NUM_ELEVATIONS) or 0 in views.shape:
                raise ValueError(f"its `im` is {views.dtype} of {views.shape}, not uint8 [H, W, 3, 24, 4]")
            return np.ascontiguousarray(views.transpose(3, 4, 0, 1, 2)).reshape(NUM_VIEWS, *views.shape[:3])


def _view(number: int) -> str:
    azimuth, elevation = divmod(number, NUM_ELEVATIONS)
    return f"azimuth {azimuth} elevation {elevation}"
