"""Where images come from before they are packed: each kind of source is a class in its own file, named in the tables
below, and `open_source` finds the one that a path or URL is.

A source is a sequence of `Sample`s, the same on every machine; see `base`.
"""

import os
import re

from sivae.data.sources.arrays import Array
from sivae.data.sources.base import BadImage, Sample, Source, natural_key
from sivae.data.sources.cars3d import Cars3D
from sivae.data.sources.cifar import CIFAR10
from sivae.data.sources.digits import Digits
from sivae.data.sources.ffhq import FFHQ
from sivae.data.sources.files import ask, damage, expand_braces, split_url
from sivae.data.sources.folder import ImageFolder
from sivae.data.sources.idx import Idx
from sivae.data.sources.kth import KTH
from sivae.data.sources.packed import Packed
from sivae.data.sources.pictures import IMAGE_SUFFIXES, to_uint8
from sivae.data.sources.shapes import Shapes
from sivae.data.sources.svhn import SVHN
from sivae.data.sources.tars import Tars
from sivae.data.sources.tfrecords import TFRecords
from sivae.data.sources.zips import Zip
from sivae.errors import UserError, query_start, shown
from sivae.storage import Folder

__all__ = ["DRAWN", "IMAGE_SUFFIXES", "BadImage", "Sample", "Source", "natural_key", "open_source", "to_uint8"]

IDX = r"(train|t10k)-images[-.]idx3-ubyte(\.gz)?"
# Sources that need no file, and draw themselves at the resolution asked for.
DRAWN = {"digits:": Digits, "shapes:": Shapes}
# A folder is the first kind whose pattern the name of something in it matches, else a folder of images.
FOLDERS = (
    (r"index\.json", Packed),
    (r"ffhq-dataset-v2\.json", FFHQ),
    (r".*\.tfrecords", TFRecords),
    (r"data_batch_1(\.bin)?", CIFAR10),
    (IDX, Idx),
    (r"(train|test|extra)_32x32\.mat", SVHN),
    (r".*\.mat", Cars3D),
    (r"person\d\d_[a-z]+_d\d_uncomp\.avi", KTH),
    (r".*\.tar", Tars),
)
# A file is the first kind whose pattern its name matches.
FILES = (
    (r".*\.np[yz]", Array),
    (r".*\.zip", Zip),
    (r".*\.tfrecords", TFRecords),
    (r"cifar-10-(python|binary)\.tar\.gz", CIFAR10),
    (rf"{IDX}|.*idx3-ubyte(\.gz)?", Idx),
    (r".*\.mat", SVHN),
    (r".*\.tar", Tars),
)
KNOWN = (
    "give `digits:`, `shapes:`, a folder of images, FFHQ's folder, a StyleGAN .zip or its .tfrecords, CIFAR-10, MNIST, SVHN, "
    "Cars3D or KTH as published, a .npy or .npz file, a packed set, or WebDataset .tar shards (also shards-{000000..000069}.tar)"
)


def open_source(
    source,
    *,
    resolution: int,
    labels: bool | None = None,
    storage_options: dict | None = None,
    verify: str | None = None,
) -> Source:
    """The source that a name, path or fsspec URL stands for.

    resolution: for sources that draw themselves at it (digits, shapes) or hold several (TFRecords); the others keep
    their own size. labels: None takes what the source has (a folder of images has none unless asked), True
    asks for them, False leaves them out. verify: compare published checksums of each "file" or its "pixels";
    only FFHQ has them. Raises UserError: no such source, one of no known kind, or one that is not whole.
    """
    source = os.fspath(source)
    if verify not in (None, "file", "pixels"):
        raise UserError(f"verify is {verify!r}; give file or pixels, or leave it out")
    kind, opened = _find(source, storage_options)
    if verify and kind is not FFHQ:
        raise UserError(f"{shown(source)} comes without published checksums, only FFHQ has them; leave out verify")
    if source in DRAWN:
        return kind(resolution, labels)
    if kind is FFHQ:
        return FFHQ(*opened, labels, verify)
    if kind is TFRecords:
        return TFRecords(*opened, labels, resolution)
    return kind(*opened, labels)


def _find(source: str, storage_options: dict | None) -> tuple[type, tuple]:
    """(the class, what its constructor takes first: the folder, and for kinds that are also files the name or None)."""
    if source in DRAWN:
        return DRAWN[source], ()
    if "{" in source and source.endswith(".tar"):
        url, names = expand_braces(source)
        return Tars, (Folder(url, storage_options), names)
    url, name = split_url(source)
    parent, folder = Folder(url, storage_options), Folder(source, storage_options)
    with damage(f"the source {shown(source)}", "check its address and credentials"):
        path, fs = folder.path, folder.fs
        if not ask(folder, lambda: fs.isdir(path)):
            if not ask(folder, lambda: fs.exists(path)):
                raise UserError(f"there is no source {shown(source)}; {KNOWN}")
            without_query = name if query_start(source) == len(source) else name.split("?", 1)[0]
            kind = _match([without_query], FILES)
            if kind is None:
                raise UserError(f"{shown(source)} is no source; {KNOWN}")
            return kind, (parent, name)
        entries = ask(folder, lambda: fs.ls(path, detail=True))
    names = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] for entry in entries}
    kind = _match(names, FOLDERS)
    if kind in (Cars3D, Tars) and any(n.lower().endswith(IMAGE_SUFFIXES) or t == "directory" for n, t in names.items()):
        kind = None  # photographs with an archive or notes among them
    if kind in (None, Packed, FFHQ):
        return kind or ImageFolder, (folder,)
    return kind, (folder, None)


def _match(names, kinds) -> type | None:
    return next((kind for pattern, kind in kinds if any(re.fullmatch(pattern, name) for name in names)), None)
