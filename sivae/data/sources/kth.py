"""KTH Actions (Schuldt et al., Recognizing Human Actions, ICPR 2004): videos of 25 persons, 160x120, grey, 25 frames a second.

A folder with the .avi files of one or more of the published zips (handwaving.zip, ...), named
personNN_ACTION_dN_uncomp.avi; in spite of the name they are compressed (MPEG-4), and PyAV decodes them. Every frame is an
image; the class is the person, the content the pose. LORD (arXiv 1906.11796) takes handwaving in condition d4 alone: leave
only those files in the folder.
"""

import io
import re

import numpy as np

from sivae.data.sources.base import BadImage, Sample, Source, fingerprint, natural_key
from sivae.data.sources.files import File, damage, find_files
from sivae.errors import UserError, shown
from sivae.storage import Folder

NAME = re.compile(r"(.*/)?person(\d\d)_([a-z]+)_d\d_uncomp\.avi")


class KTH(Source):
    """Classes are the persons that are there, in order. A video is decoded whole, for all its frames."""

    licence = "Schuldt, Laptev and Caputo, Recognizing Human Actions: A Local SVM Approach, ICPR 2004; for research"
    num_channels = 1
    _last: tuple[int, np.ndarray] | None = None  # the video decoded last, and its frames

    def __init__(self, folder: Folder, name: None = None, labels: bool | None = None):
        try:
            import av  # noqa: F401
        except ImportError:
            raise UserError(
                f"{shown(folder.path)} holds videos, which PyAV decodes; `pip install 'sivae[video]'`"
            ) from None
        files = [file for file in find_files(folder) if NAME.fullmatch(file.name)]
        self.files = sorted(files, key=lambda file: natural_key(file.name))
        persons = [NAME.fullmatch(file.name)[2] for file in self.files]
        self.classes = [sorted(set(persons)).index(person) for person in persons]
        self.with_labels = labels is not False
        self.num_classes = max(self.classes) + 1 if self.with_labels else None
        # What headers say of the number of frames need not be so.
        self.counts = np.array([len(_frames(file, UserError)) for file in self.files])
        self.description = f"KTH actions, {len(self.files)} videos of {max(self.classes) + 1} persons"
        self.fingerprint = fingerprint("kth", self.num_classes, [file.identity for file in self.files])

    def __len__(self):
        return int(self.counts.sum())

    def __getstate__(self):
        return self.__dict__ | {"_last": None}

    def __getitem__(self, i: int) -> Sample:
        ends = self.counts.cumsum()
        video = int(np.searchsorted(ends, i, side="right"))
        frame = i - int(ends[video] - self.counts[video])
        if self._last is None or self._last[0] != video:
            frames = _frames(self.files[video], BadImage)
            if len(frames) != self.counts[video]:
                raise UserError(f"{self.files[video].where} changed since it was opened; start again")
            self._last = (video, frames)
        label = self.classes[video] if self.with_labels else None
        return Sample(f"{self.files[video].name} frame {frame}", self._last[1][frame], label)


def _frames(file: File, kind: type[UserError]) -> np.ndarray:
    """All frames, uint8 [N, H, W, 1]. Raises `kind` when there are none, or the video is damaged."""
    import av

    with damage(file.where, "download it again", kind):
        data = file.read(missing=kind)
        if int.from_bytes(data[4:8], "little") + 8 > len(data):  # AVI says so; decoders pass over it
            raise ValueError("it is cut short")
        with av.open(io.BytesIO(data)) as video:
            frames = [frame.to_ndarray(format="gray")[..., None] for frame in video.decode(video=0)]
        if not frames:
            raise ValueError("it has no frames")
        return np.stack(frames)
