"""A set that `sivae pack` made, to pack it again: at another resolution, into other shards or another encoding."""

import json

import numpy as np

from sivae.data.decode import DECODERS
from sivae.data.index import Index
from sivae.data.names import read_names
from sivae.data.shards import Corrupt, ShardReader
from sivae.data.sources.base import BadImage, Sample, Source, consecutive, fingerprint, wanted_labels
from sivae.data.sources.files import base_name, damage, find_file
from sivae.data.sources.pictures import decode
from sivae.data.sources.tars import MAX_METADATA_BYTES, index_tar
from sivae.errors import UserError, shown
from sivae.storage import Folder


class Packed(Source):
    """Its images with labels, splits, licence, and the attribution of each image where its shards hold that."""

    def __init__(self, folder: Folder, labels: bool | None = None):
        self.index = Index.load(folder)
        self.folder = self.index.shard_folder(folder)
        self.where, self.licence = shown(folder.path), self.index.licence
        self.description = f"{self.index.source} (packed set {base_name(folder)})"
        held = read_names(folder)
        self.num_channels, self.names = self.index.num_channels, [held.get(key, key) for key in self.index.key]
        self.labels = wanted_labels(labels, self.index.label, self.where, "pack without labels")
        self.num_classes = None if self.labels is None else self.index.num_classes
        self.splits = consecutive(self.index.splits) if len(self.index.splits) > 1 else None
        self.fingerprint = fingerprint("packed", self.num_classes, self.index.digest)
        self._reader = None  # one a process
        self._attribution = None  # (shard, key -> (offset, size)) of the shard that was last read

    def __len__(self):
        return self.index.count

    def __getitem__(self, i: int) -> Sample:
        where = f"{self.index.name(i)} at {self.where}"
        self._reader = self._reader or ShardReader(self.folder, self.index)
        [data] = self._reader.read([i])
        if isinstance(data, Corrupt):
            raise BadImage(str(data))
        pixels, encoded = self._decode(data, where)
        label = None if self.labels is None else int(self.labels[i])
        return Sample(self.index.name(i), pixels, label, encoded, self._metadata(i, where))

    def _decode(self, data: bytes, where: str):
        if self.index.image_format == "png":
            return decode(data, where)
        try:
            pixels = DECODERS[self.index.image_format](data, self.index.resolution, self.index.num_channels, where)
        except UserError as error:
            raise BadImage(str(error)) from None
        return np.ascontiguousarray(pixels.transpose(1, 2, 0)), None

    def _metadata(self, i: int, where: str) -> dict | None:
        """The .json beside the image, which the index does not know of."""
        shard = int(self.index.shard[i])
        if self._attribution is None or self._attribution[0] != shard:
            self._attribution = shard, self._find_attribution(shard)
        start, size = self._attribution[1].get(self.index.key[i], (0, 0))
        if not 0 < size <= MAX_METADATA_BYTES:
            return None
        with damage(f"the .json of {where}", "pack the set again", BadImage):
            metadata = json.loads(find_file(self.folder, self.index.shards[shard].name).read(start, start + size))
        return metadata if isinstance(metadata, dict) else None

    def _find_attribution(self, shard: int) -> dict[str, tuple[int, int]]:
        """key -> (offset, size) of its .json; only shards whose first sample has one are looked through."""
        file = find_file(self.folder, self.index.shards[shard].name)
        first = int(self.index.shard_sizes[:shard].sum())
        gaps = [(0, int(self.index.offset[first]))]
        if first + 1 < self.index.count and self.index.shard[first + 1] == shard:
            gaps.append((gaps[0][1] + int(self.index.size[first]), int(self.index.offset[first + 1])))
        gaps = [(start, min(stop, start + 2 * MAX_METADATA_BYTES)) for start, stop in gaps]
        if not any(b".json" in data for data in file.read_many(gaps)):
            return {}
        return {key: places["json"] for key, places, _ in index_tar(file, labels=False) if "json" in places}

    def __getstate__(self):
        return self.__dict__ | {"_reader": None, "_attribution": None}
