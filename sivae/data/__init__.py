"""Image sets: packed once into shards with an index, then streamed from anywhere, resumable exactly."""

import os

from sivae.data.cache import BlockCache
from sivae.data.index import Index, NoIndex
from sivae.data.reader import Batch, ImageStream
from sivae.errors import UserError, shown
from sivae.storage import Folder

__all__ = ["Batch", "ImageStream", "Index", "open_stream"]


def open_stream(
    url, *, resolution: int | None = None, shrunk_from: int | None = None, cache_dir=None, cache_bytes: int = 0,
    progress: bool = True, **settings,
) -> ImageStream:  # fmt: skip
    """The stream of a packed set, of one level of a pyramid, or of `digits:` or `shapes:`, which are packed on first use.

    url: a local folder or fsspec URL that holds an index.json, or a folder of them for each resolution (`sivae pack
    --pyramid`), or `digits:` or `shapes:`, packed at `resolution` into cache_dir/digits-{resolution}. shrunk_from: read a
    set that is no pyramid at this resolution instead, for a caller who shrinks the images. cache_dir: None means
    $SIVAE_CACHE, else ~/.cache/sivae. cache_bytes: of remote shards, kept in cache_dir/blocks for all processes of the node;
    0 keeps none. progress: show a bar while packing. The other settings are ImageStream's. Raises UserError where it does.
    """
    from sivae.data.sources import DRAWN  # sources read packed sets too

    cache_dir = cache_dir or os.environ.get("SIVAE_CACHE") or "~/.cache/sivae"
    if url in DRAWN:
        from sivae.data.pack import pack_once  # webdataset takes a second to import

        if resolution is None:
            raise UserError(f"{url} is drawn at the resolution asked for; set model.resolution")
        folder = os.path.join(cache_dir, f"{url[:-1]}-{resolution}")
        url = pack_once(url, folder, resolution=resolution, progress=progress)
        shrunk_from = None
    cache = BlockCache(os.path.join(cache_dir, "blocks"), cache_bytes) if cache_bytes else None
    try:
        return ImageStream(url, resolution=shrunk_from or resolution, cache=cache, **settings)
    except NoIndex:
        reading = {name: settings[name] for name in ("storage_options", "timeout_sec", "retries") if name in settings}
        level = pyramid_level(url, resolution, **reading)
        return ImageStream(level, resolution=resolution, cache=cache, **settings)


def pyramid_level(url, resolution: int | None, **reading) -> str:
    """The set of one resolution in a folder made by `sivae pack --pyramid`.

    reading: settings of its Folder. Raises NoIndex when the folder is none, and UserError when it has no such level.
    """
    folder = Folder(url, **reading)
    if resolution is not None and folder.exists(str(resolution), "index.json"):
        return folder.folder(str(resolution)).url
    levels = sorted(int(name) for name in folder.names() if name.isdecimal() and folder.exists(name, "index.json"))
    if not levels:
        Index.load(folder)  # says that there is none
    have = ", ".join(map(str, levels))
    raise UserError(
        f"{shown(url)} has the resolutions {have}, and not {resolution}; pack it with that one, or train at one of these"
    )
