"""Image sets: packed once into shards with an index, then streamed from anywhere, resumable exactly."""

import os

from sivae.data.index import Index
from sivae.data.reader import Batch, ImageStream
from sivae.errors import UserError

__all__ = ["Batch", "ImageStream", "Index", "open_stream"]


def open_stream(
    url, *, resolution: int | None = None, cache_dir=None, progress: bool = True, **settings
) -> ImageStream:
    """The stream of a packed set, or of `digits:`, which is packed on first use.

    url: a local folder or fsspec URL that holds an index.json, or `digits:`, packed at `resolution` into
    cache_dir/digits-{resolution}. cache_dir: None means $SIVAE_CACHE, else ~/.cache/sivae. progress: show a
    bar while packing. The other settings are ImageStream's. Raises UserError where it does.
    """
    if url == "digits:":
        from sivae.data.pack import pack_once  # webdataset takes a second to import

        if resolution is None:
            raise UserError("digits: is drawn at the resolution asked for; set model.resolution")
        cache_dir = cache_dir or os.environ.get("SIVAE_CACHE") or "~/.cache/sivae"
        folder = os.path.join(cache_dir, f"digits-{resolution}")
        url = pack_once(url, folder, resolution=resolution, progress=progress)
    return ImageStream(url, resolution=resolution, **settings)
