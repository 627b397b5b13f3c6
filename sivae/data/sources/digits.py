"""`digits:`: the 1,797 handwritten digits of scikit-learn (Alpaydin and Kaynak, UCI, 1998), 8x8, grey, classes 0..9."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F

from sivae.data.sources.base import Sample, Source, fingerprint
from sivae.errors import UserError


class Digits(Source):
    """Values 0..16, enlarged bilinearly (torch's interpolate, align_corners=False) on x / 16 and rounded to 0..255."""

    description = "digits: (scikit-learn load_digits)"
    licence = (
        "Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
        "Repository, doi 10.24432/C50P49, CC BY 4.0"
    )
    num_channels = 1

    def __init__(self, resolution: int, labels: bool | None = None):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("digits: comes with scikit-learn; `pip install scikit-learn`") from None
        digits = load_digits()
        self.resolution, self.images = resolution, digits.images.astype(np.float32) / 16
        self.labels = None if labels is False else digits.target
        self.num_classes = None if labels is False else 10
        content = hashlib.sha256(digits.images.tobytes() + digits.target.tobytes()).hexdigest()
        self.fingerprint = fingerprint("digits", content, resolution, self.num_classes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i: int) -> Sample:
        image = torch.from_numpy(self.images[i])[None, None]
        image = F.interpolate(image, (self.resolution,) * 2, mode="bilinear", align_corners=False)
        pixels = (image[0, 0] * 255).round().byte().numpy()[..., None]
        return Sample(f"digit {i}", pixels, None if self.labels is None else int(self.labels[i]))
