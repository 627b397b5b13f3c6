"""A folder of images of any kind and size, also in folders below it.

When its subfolders are `train` and at least one of `val`, `validation`, `valid`, `test`, and nothing else,
they are its splits; so CelebA-HQ is read as StarGAN v2 (Choi et al., CVPR 2020) released it:
celeba_hq/{train,val}/{male,female}/*.jpg.
"""

import logging

import numpy as np

from sivae.data.sources.base import BadImage, Sample, Source, fingerprint, natural_key
from sivae.data.sources.files import File, base_name, find_files
from sivae.data.sources.pictures import IMAGE_SUFFIXES, decode
from sivae.errors import UserError, shown
from sivae.storage import Folder

logger = logging.getLogger(__name__)
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


class ImageFolder(Source):
    """All images in natural order (2 before 10), hidden ones left out.

    labels: True takes the first-level subfolders as classes, in a folder of splits the second-level ones;
    there are none otherwise.
    """

    def __init__(self, folder: Folder, labels: bool | None = None):
        self.folder, self.description = folder, f"folder {base_name(folder)}"
        files = {file.name: file for file in find_files(folder)}
        self.names = sorted((n for n in files if n.lower().endswith(IMAGE_SUFFIXES)), key=natural_key)
        where = shown(folder.path)
        if not self.names:
            raise UserError(f"there are no images in {where} (looked for {' '.join(IMAGE_SUFFIXES)})")
        others = sorted(set(files) - set(self.names), key=natural_key)
        parts = _split_names(self.names)
        if parts is not None:
            # sorted() is stable and puts the training images first, wherever their name falls
            order = {name: i for i, name in enumerate(dict.fromkeys(SPLITS.values()))}
            self.names.sort(key=lambda name: order[parts[name.split("/")[0]]])
            found = np.array([parts[name.split("/")[0]] for name in self.names])
            self.splits = {name: np.flatnonzero(found == name) for name in order if name in found}
        self.classes = None
        if labels:
            self.classes = self._classes(others, where, level=0 if parts is None else 1)
            self.num_classes = int(self.classes.max()) + 1
        elif others:
            logger.warning(
                "%d files in %s are no images and were left out, the first is %s", len(others), where, shown(others[0])
            )
        self.fingerprint = fingerprint("folder", bool(labels), [files[name].identity for name in self.names])

    def _classes(self, others: list[str], where: str, level: int) -> np.ndarray:
        """The class of each image, int32 [N], from the subfolder at this level of its path."""
        wrong = others or [name for name in self.names if name.count("/") <= level]
        if wrong:
            raise UserError(
                f"labels are the names of subfolders that hold images only, and "
                f"{where}/{shown(wrong[0])} is no image in one; move it, or pack without labels"
            )
        owner = [name.split("/")[level] for name in self.names]
        classes = sorted(set(owner), key=natural_key)
        if level:
            for split in sorted({name.split("/")[0] for name in self.names}):
                here = {name.split("/")[level] for name in self.names if name.startswith(f"{split}/")}
                missing = sorted(set(classes) - here, key=natural_key)
                if missing:
                    raise UserError(
                        f"{where}/{split} has no class {missing[0]!r}, which another split has; every split "
                        "needs the same subfolders, or pack without labels"
                    )
        number = {name: i for i, name in enumerate(classes)}
        return np.array([number[name] for name in owner], np.int32)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        file = File(self.folder, self.names[i], 0, "")
        pixels, encoded = decode(file.read(missing=BadImage), file.where)
        return Sample(self.names[i], pixels, None if self.classes is None else int(self.classes[i]), encoded)


def _split_names(names: list[str]) -> dict[str, str] | None:
    """First-level folder -> its split's name, when all images lie in folders that are known splits, else None."""
    if any("/" not in name for name in names):
        return None
    first = {name.split("/")[0] for name in names}
    found = {name: SPLITS.get(name) for name in first}
    known = None not in found.values() and len(set(found.values())) == len(first)
    return found if known and "train" in first and len(first) > 1 else None
