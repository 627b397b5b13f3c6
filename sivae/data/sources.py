"""Where images come from before they are packed: `digits:`, a folder, a `.npy` or `.npz` array.

A source is a sequence: len(source), and source[i] = (name, image, label), image uint8 [H, W, 1 or 3], label
an int or None. The order is the same on every machine. Another source is one class and one line in
`open_source`. All raise UserError naming the image that is wrong.
"""

import io
import logging
import os
import re
from zipfile import BadZipFile

import fsspec
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from sivae.errors import UserError, shown

logger = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
KNOWN = "give `digits:`, a folder of images, or a .npy or .npz file"


def open_source(source, *, resolution: int, labels: bool | None = None, storage_options: dict | None = None):
    """The source that a name, path or fsspec URL stands for.

    resolution: for sources that render themselves at it (digits); the others keep their own size.
    labels: None takes what the source has (a folder has none unless asked), True asks for them (a folder
    takes its first-level subfolders as classes), False leaves them out.
    """
    source = os.fspath(source)
    if source == "digits:":
        return Digits(resolution, labels)
    try:
        fs, path = fsspec.core.url_to_fs(source, **(storage_options or {}))
        is_folder, exists = fs.isdir(path), fs.exists(path)
    except Exception as error:  # noqa: BLE001 - each filesystem has its own
        raise UserError(f"the source {shown(source)} cannot be opened: {shown(error)}") from None
    if not exists:
        raise UserError(f"there is no source {shown(source)}; {KNOWN}")
    if is_folder:
        return Folder(fs, path, bool(labels))
    if path.endswith((".npy", ".npz")):
        return Array(fs, path, labels)
    raise UserError(f"{shown(source)} is no source; {KNOWN}")


class Digits:
    """The 1,797 handwritten digits of scikit-learn: 8x8, grey, values 0..16, classes 0..9.

    Enlarged bilinearly (torch's interpolate, align_corners=False) on x / 16 and rounded to 0..255.
    """

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

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i: int):
        image = torch.from_numpy(self.images[i])[None, None]
        image = F.interpolate(image, (self.resolution,) * 2, mode="bilinear", align_corners=False)
        pixels = (image[0, 0] * 255).round().byte().numpy()[..., None]
        return f"digit {i}", pixels, None if self.labels is None else int(self.labels[i])


class Folder:
    """All images in a folder and those below it, in natural order (2 before 10), hidden ones left out."""

    licence = ""

    def __init__(self, fs, root: str, labels: bool = False):
        self.fs, self.description = fs, f"folder {os.path.basename(root.rstrip('/'))}"
        files = {path: path[len(root.rstrip("/")) + 1 :] for path in fs.find(root)}
        files = {path: name for path, name in files.items() if not re.search(r"(^|/)\.", name)}
        self.paths = sorted((p for p in files if p.lower().endswith(IMAGE_SUFFIXES)), key=natural_key)
        if not self.paths:
            raise UserError(f"there are no images in {shown(root)} (looked for {' '.join(IMAGE_SUFFIXES)})")
        others = sorted(set(files) - set(self.paths), key=natural_key)
        self.classes, self.num_classes = None, None
        if labels:
            wrong = others or [path for path in self.paths if "/" not in files[path]]
            if wrong:
                raise UserError(
                    f"labels are the names of subfolders that hold images only, and "
                    f"{shown(wrong[0])} is no image in one; move it, or pack without labels"
                )
            names = sorted({files[path].split("/")[0] for path in self.paths}, key=natural_key)
            self.classes = [names.index(files[path].split("/")[0]) for path in self.paths]
            self.num_classes = len(names)
        elif others:
            logger.warning(
                "%d files in %s are no images and were left out, the first is %s",
                len(others),
                shown(root),
                shown(others[0]),
            )
        self.num_channels = self[0][1].shape[2]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i: int):
        path = self.paths[i]
        try:
            with Image.open(io.BytesIO(self.fs.cat_file(path))) as image:
                pixels = to_uint8(image)
        except Exception as error:  # noqa: BLE001 - Pillow raises nearly anything on damaged files
            raise UserError(f"{shown(path)} cannot be read as an image ({shown(error)}); repair or remove it") from None
        return path, pixels, None if self.classes is None else self.classes[i]


class Array:
    """A `.npy` array, or a `.npz` with `images` (or a single array) and perhaps `labels`.

    Images are uint8, or float in [0, 1], as [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3. Nothing
    pickled is loaded.
    """

    licence = ""

    def __init__(self, fs, path: str, labels: bool | None = None):
        self.path, self.description, found = shown(path), f"array {os.path.basename(path)}", None
        try:
            # A local .npy is mapped rather than read, for it may be larger than memory.
            local = "file" in fs.protocol and path.endswith(".npy")
            with fs.open(path, "rb") as file:
                data = np.load(path if local else file, mmap_mode="r" if local else None, allow_pickle=False)
                if path.endswith(".npz"):
                    name = "images" if "images" in data.files or len(data.files) != 1 else data.files[0]
                    found = data["labels"] if "labels" in data.files else None
                    data = data[name]
        except (OSError, ValueError, EOFError, KeyError, SyntaxError, MemoryError, BadZipFile) as error:
            raise UserError(
                f"{self.path} cannot be read: {error}; save plain arrays, in a .npz `images` and `labels`"
            ) from None
        if data.ndim == 3:
            data = data[..., None]
        elif data.ndim == 4 and data.shape[3] not in (1, 3) and data.shape[1] in (1, 3):
            data = np.moveaxis(data, 1, 3)
        if data.ndim != 4 or data.shape[3] not in (1, 3) or 0 in data.shape[1:]:
            raise UserError(
                f"{self.path} has shape {data.shape}; give [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3"
            )
        if len(data) == 0:
            raise UserError(f"there are no images in {self.path}")
        if data.dtype != np.uint8 and data.dtype.kind != "f":
            raise UserError(f"{self.path} holds {data.dtype}; give uint8, or float in [0, 1]")
        self.images, self.num_channels = data, data.shape[3]
        if labels and found is None:
            raise UserError(f"{self.path} has no labels; save a .npz with `images` and `labels`")
        self.labels = None if labels is False else found
        if self.labels is not None:
            whole = self.labels.shape == (len(data),) and self.labels.dtype.kind in "iu"
            if not whole or self.labels.min() < 0:
                raise UserError(f"`labels` in {self.path} must be {len(data)} whole numbers from 0 on")
        self.num_classes = None if self.labels is None else int(self.labels.max()) + 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i: int):
        image = np.asarray(self.images[i])
        if image.dtype != np.uint8:
            if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
                raise UserError(
                    f"sample {i} of {self.path} holds NaN, infinity, or values outside [0, 1]; "
                    "float images must lie in [0, 1]"
                )
            image = (image.astype(np.float64) * 255).round().astype(np.uint8)
        return f"sample {i} of {self.path}", image, None if self.labels is None else int(self.labels[i])


def natural_key(path: str) -> tuple:
    """Sorts a/2.png before a/10.png, and whole folders together."""
    parts = [re.split(r"(\d+)", part.lower()) for part in path.split("/")]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts], path


def to_uint8(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 1] for grey images and [H, W, 3] for all others, upright.

    EXIF rotation is applied, palettes are looked up, alpha is laid over white, 16 bits become 8 by
    rounding. Raises ValueError on floating-point images, whose range nobody knows.
    """
    image = ImageOps.exif_transpose(image)
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
