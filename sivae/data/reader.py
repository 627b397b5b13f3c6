"""The stream of training batches: position in, images out; the same ones on any number of ranks and workers.

All that changes between runs is who reads a sample. What is read, in which order and whether mirrored
follows from (seed, position) alone (see `order`), so resuming is starting at another position.
"""

import atexit
import dataclasses
import logging
import math
import operator
import os
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import multiprocessing
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sivae.data.cache import BlockCache
from sivae.data.decode import DECODERS
from sivae.data.index import Index
from sivae.data.names import read_names
from sivae.data.order import Order, flip_at, mixed_shards, rank_positions, substitute_at, window_at
from sivae.data.shards import Corrupt, ShardReader
from sivae.errors import UserError, shown
from sivae.storage import Folder

logger = logging.getLogger(__name__)
END_SEC = 5  # that the end of a process waits for an item that is being read ahead
GRACE_SEC = 60  # what a worker may take for one batch beyond the time that storage may take
STOP_SEC = 30  # after SIGTERM, until a worker that hangs is ended
MAX_SUBSTITUTES = 8  # damaged samples in a row until the set is taken for lost


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: every world_size-th image, so parts may differ in size by one."""

    images: torch.Tensor  # uint8 [B, C, H, W], channels last in memory
    labels: torch.Tensor | None  # int64 [B]; None when the set has none
    substituted: tuple[str, ...] = ()  # for each sample that another stands in for, what is wrong with it

    def pin_memory(self) -> "Batch":
        labels = None if self.labels is None else self.labels.pin_memory()
        return dataclasses.replace(self, images=self.images.pin_memory(), labels=labels)


class ImageStream:
    """A packed set as an endless stream of batches.

    url: the folder that holds index.json, local or any fsspec URL. batch_size: the global batch, over all
    ranks. split: one of the index's, or `all`. seed: of order and augmentation. num_workers: processes that read
    ahead; 0 reads in this one, a thread ahead. resolution, num_channels: what the model takes, compared with the
    index; None compares nothing. flip: mirror half of the samples, others in each epoch. random_crop: cut images of
    `resolution` out of a set that is packed larger, elsewhere in each epoch; None does so where it is. on_corrupt: a sample that is damaged in
    storage raises, or another one, the same on every run, stands in for it. pin_memory: hand out page-locked tensors;
    without CUDA it does nothing. cache: where remote blocks are kept on this node; None keeps none.
    storage_options: fsspec's. timeout_sec, retries, outage_sec: see Folder, the last for samples
    and not for opening the set; a worker that takes longer than they allow and a minute is given up.

    Raises UserError on any setting that does not fit the set, and later when a sample cannot be read.
    """

    def __init__(
        self,
        url,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        split: str = "train",
        seed: int = 0,
        num_workers: int = 0,
        resolution: int | None = None,
        num_channels: int | None = None,
        flip: bool = False,
        random_crop: bool | None = False,
        on_corrupt: Literal["raise", "substitute"] = "raise",
        pin_memory: bool = False,
        cache: BlockCache | None = None,
        storage_options: dict | None = None,
        timeout_sec: float = 30,
        retries: int = 4,
        outage_sec: float = 0,
    ):
        self.folder = Folder(url, storage_options, timeout_sec=timeout_sec, retries=retries)
        self.where = where = shown(self.folder.url)  # as errors name it
        whole = Index.load(self.folder)
        self.folder.outage_sec = outage_sec
        self.index = index = whole.split(split, where)
        if batch_size < 1 or world_size < 1 or batch_size < world_size:
            raise UserError(
                f"a global batch_size of {batch_size} is too small for {world_size} ranks; each needs an image of every batch"
            )
        if batch_size > index.count:
            raise UserError(
                f"batch_size {batch_size} is more than the {index.count} images of {where}; make "
                "it smaller, or pack more images"
            )
        if not 0 <= rank < world_size or not 0 <= seed < 2**63 or num_workers < 0:
            raise UserError(
                f"rank {rank} of {world_size}, seed {seed}, num_workers {num_workers}: a rank "
                "must lie below the number of ranks, and none may be negative"
            )
        self.resolution = resolution or index.resolution
        if random_crop is None:
            random_crop = self.resolution < index.resolution
        if random_crop and self.resolution >= index.resolution:
            raise UserError(
                f"data.random_crop: {where} is packed at {index.resolution} pixels, so there is nothing to cut images of "
                f"{self.resolution} from; pack it larger, or leave random_crop off"
            )
        if self.resolution != index.resolution and not random_crop:
            larger = ", or with data.random_crop=true, which cuts from it" if self.resolution < index.resolution else ""
            raise UserError(
                f"{where} is packed at resolution {index.resolution} and the model takes "
                f"{resolution}; pack it with --resolution {resolution}, or train with "
                f"model.resolution={index.resolution}{larger}"
            )
        if num_channels not in (None, index.num_channels):
            raise UserError(
                f"{where} is packed with {index.num_channels} channels and the model takes "
                f"{num_channels}; pack it with --num-channels {num_channels}, or train with "
                f"model.num_channels={index.num_channels}"
            )
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.num_workers, self.flip, self.on_corrupt = num_workers, flip, on_corrupt
        self.pin = pin_memory and torch.cuda.is_available()
        mixed = mixed_shards(index.shard_sizes)
        self.order = Order(index.shard_sizes, seed, mixed)
        self.shards = ShardReader(index.shard_folder(self.folder), index, cache, mixed)

    @cached_property
    def names(self) -> dict[str, str]:
        """key -> what the image was called where it came from; empty where the set has none."""
        return read_names(self.folder)

    @property
    def digest(self) -> str:
        """The set's identity: what a checkpoint keeps, to tell when a run goes on with other data."""
        return self.index.digest

    @property
    def num_classes(self) -> int | None:
        return self.index.num_classes

    def __len__(self) -> int:
        """Images in the set."""
        return self.index.count

    def batches(self, images_seen: int = 0) -> Generator[Batch, None, None]:
        """This rank's part of every global batch from position `images_seen` on, without end; `close` it to end what reads.

        Exact at any position, whatever ranks and workers read before. Raises UserError when a sample
        cannot be read or a worker dies.
        """
        if operator.index(images_seen) < 0:
            raise UserError(f"images_seen is {images_seen}; a position in the stream is not negative")
        if self.num_workers:
            return self._worker_batches(images_seen)
        return (self._pinned(batch) for batch in self.steps(images_seen, 0, 1))

    def steps(self, images_seen: int, first: int, stride: int) -> Iterator[Batch]:
        """The batches of steps first, first + stride, ... Bytes are read one step ahead of the pixels."""
        starts = (images_seen + step * self.batch_size for step in count(first, stride))
        limit_sec = self.shards.patience_sec + GRACE_SEC / 2
        try:
            for positions, encoded in one_ahead(self._fetch, map(self._positions, starts), limit_sec):
                yield self._decode(positions, encoded)
        except queue.Empty:
            raise UserError(
                f"a read of {self.where} has hung for {limit_sec:.0f} s; see whether the storage hangs, and run again to resume"
            ) from None

    def at(self, start: int) -> Batch:
        """This rank's part of the global batch [start, start + batch_size)."""
        positions, encoded = self._fetch(self._positions(start))
        return self._decode(positions, encoded)

    def sample(self, indices) -> Batch:
        """The samples of these numbers (0 .. len - 1), in the order given, never mirrored, cut from the middle."""
        samples = np.asarray(indices, dtype=np.int64).reshape(-1)
        if samples.size and not 0 <= samples.min() <= samples.max() < len(self):
            raise UserError(
                f"samples {samples.min()} to {samples.max()} were asked for, and {self.where} has 0 to {len(self) - 1}"
            )
        middle = np.full(len(samples), (self.index.resolution - self.resolution) // 2)
        return self._batch(samples, self.shards.read(samples), np.zeros_like(samples), None, middle, middle)

    def _positions(self, start: int) -> np.ndarray:
        return rank_positions(start, self.batch_size, self.rank, self.world_size)

    def _fetch(self, positions: np.ndarray) -> tuple[np.ndarray, list]:
        return positions, self.shards.read(self.order.sample_at(positions))

    def _decode(self, positions: np.ndarray, encoded: list) -> Batch:
        samples, epochs = self.order.sample_at(positions), self.order.epoch_at(positions)
        flips = flip_at(self.seed, epochs, samples) if self.flip else None
        top, left = window_at(self.seed, epochs, samples, self.index.resolution - self.resolution)
        return self._batch(samples, encoded, epochs, flips, top, left)

    def _batch(self, samples, encoded, epochs, flips, top, left) -> Batch:
        samples, size, substituted = samples.copy(), self.resolution, []
        # Pixels stay together in memory, as decoders give them: to part them here costs more than reading them.
        images = torch.empty((len(samples), size, size, self.index.num_channels), dtype=torch.uint8)
        for i, data in enumerate(encoded):
            try:
                image = self._image(samples[i], data)
            except Corrupt as error:
                if self.on_corrupt == "raise":
                    raise
                samples[i], image = self._substitute(int(epochs[i]), int(samples[i]), error)
                substituted.append(str(error))
            pixels = torch.from_numpy(image.transpose(1, 2, 0))[top[i] : top[i] + size, left[i] : left[i] + size]
            images[i] = pixels.flip(1) if flips is not None and flips[i] else pixels
        labels = None if self.index.label is None else torch.from_numpy(self.index.label[samples])
        return Batch(images.permute(0, 3, 1, 2), labels, tuple(substituted))

    def _image(self, sample: int, data: bytes | Corrupt) -> np.ndarray:
        """uint8 [C, R, R] of a sample as it is packed; raises Corrupt."""
        if isinstance(data, Corrupt):
            raise data
        index = self.index
        try:
            return DECODERS[index.image_format](data, index.resolution, index.num_channels, index.name(sample))
        except UserError as error:
            raise Corrupt(str(error)) from None

    def _substitute(self, epoch: int, sample: int, error: Corrupt) -> tuple[int, np.ndarray]:
        """Another sample, which follows from the seed, the epoch and the damaged sample alone."""
        for attempt in range(MAX_SUBSTITUTES):
            other = substitute_at(self.seed, epoch, sample, attempt, self.index.count)
            try:
                return other, self._image(other, self.shards.read([other])[0])
            except Corrupt as again:
                logger.debug("a substitute is damaged too: %s", again)
        raise UserError(f"{MAX_SUBSTITUTES} samples in a row are damaged, so the set is taken for lost; first {error}")

    def _pinned(self, batch: Batch) -> Batch:
        return batch.pin_memory() if self.pin else batch

    def _worker_batches(self, images_seen: int) -> Iterator[Batch]:
        on_child = signal.getsignal(signal.SIGCHLD)
        iterator = None
        try:
            with warnings.catch_warnings():
                # Readers wait for storage more than they compute: more of them than cores can be right.
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                loader = DataLoader(
                    _Steps(self, images_seen),
                    batch_size=None,
                    num_workers=self.num_workers,
                    collate_fn=_unchanged,
                    pin_memory=self.pin,
                    multiprocessing_context=self._context(),
                )
                iterator = iter(loader)
            if threading.current_thread() is threading.main_thread() and on_child is not None:
                # DataLoader has just asked to be told of dead children by a signal, and would raise in the
                # midst of whatever runs then, a collective or a checkpoint. It also looks every 5 s while
                # it waits for a batch, in any thread: enough, and an ordinary exception.
                signal.signal(signal.SIGCHLD, on_child)
            for item in iterator:
                if isinstance(item, UserError):
                    raise item
                yield item
        except RuntimeError as error:  # how DataLoader tells that a worker died
            raise UserError(
                f"a process that reads {self.where} died or hung ({error}); see whether memory "
                "ran out or the storage hangs, and run again to resume"
            ) from None
        finally:
            iterator = None  # ends the workers now, for a traceback may keep this frame

    def _context(self):
        """Fork is quick, but a child must not inherit this process's connections (see Folder.fs)."""
        folder = self.shards.folder
        if folder.is_local or folder.url.startswith("memory:"):  # such memory is only inherited
            return multiprocessing.get_context("fork")
        context = multiprocessing.get_context("forkserver")
        # Imports torch and the driver once, not once a worker.
        context.set_forkserver_preload([__name__, type(folder.fs).__module__])
        return context


class _Steps(IterableDataset):
    """What one worker runs: every n-th step. DataLoader asks the workers in turn, so steps come in order."""

    def __init__(self, stream: ImageStream, images_seen: int):
        self.stream, self.images_seen = stream, images_seen

    def __iter__(self):
        worker, stream = get_worker_info(), self.stream
        threading.Thread(target=_end_with_parent, daemon=True).start()
        items = stream.steps(self.images_seen, worker.id, worker.num_workers)
        # A worker that hangs, on a dead network mount for one, is killed by its own alarm and found dead.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # Who asks a job to stop often signals every process of it. The training process decides: it may need the batch
        # that is being read. One that hangs in its read is gone soon after.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(STOP_SEC))
        while True:
            signal.alarm(math.ceil(stream.shards.patience_sec + GRACE_SEC))
            try:
                item = next(items)
            except UserError as error:  # handed over as a value: raised here it would arrive as a traceback
                item = error
            except Exception as error:  # its trace is logged here, where it still is
                logger.exception("a data worker failed")
                item = UserError(f"a process that reads {stream.where} failed: {error!r}")
            signal.alarm(0)
            yield item
            if isinstance(item, UserError):
                return


def _end_with_parent():
    """DataLoader's own watch is over the parent's number, which under a fork server is the server's, and that lives on."""
    multiprocessing.parent_process().join()
    os._exit(1)


def one_ahead(work: Callable, items: Iterator, limit_sec: float) -> Iterator:
    """work(item) for each of endless items, done by a thread one item ahead of who takes the results.

    Raises queue.Empty when one takes longer than limit_sec; the thread, which may hang for ever, is left alone.
    """
    asked, done = queue.SimpleQueue(), queue.SimpleQueue()

    def serve():
        while (item := asked.get()) is not None:
            try:
                done.put((work(item), None))
            except BaseException as error:  # noqa: BLE001 - raised where the result is taken
                done.put((None, error))
        atexit.unregister(end)

    # A daemon, unlike a pool's threads: a read that hangs must not hold up the end of the process. But one that is at work in
    # torch when Python ends aborts the process, so the end waits for the item in hand for a while.
    thread = threading.Thread(target=serve, name="sivae-read-ahead", daemon=True)
    thread.start()

    def end():
        asked.put(None)
        thread.join(END_SEC)

    atexit.register(end)
    try:
        asked.put(next(items))
        while True:
            asked.put(next(items))
            result, error = done.get(timeout=limit_sec)
            if error is not None:
                raise error
            yield result
    finally:
        asked.put(None)


def _unchanged(item):
    return item
