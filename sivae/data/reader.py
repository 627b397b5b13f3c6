"""The stream of training batches: position in, images out; the same ones on any number of ranks and workers.

All that changes between runs is who reads a sample. What is read, in which order and whether mirrored
follows from (seed, position) alone (see `order`), so resuming is starting at another position.
"""

import logging
import math
import operator
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import multiprocessing
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sivae.data.decode import DECODERS
from sivae.data.index import Index
from sivae.data.order import Order, flip_at, rank_positions
from sivae.data.shards import ShardReader, Storage
from sivae.errors import UserError, shown

logger = logging.getLogger(__name__)
GRACE_SEC = 60  # what a worker may take for one batch beyond the time that storage may take
STOP_SEC = 30  # after SIGTERM, until a worker that hangs is ended


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch of B."""

    images: torch.Tensor  # uint8 [B / world_size, C, H, W]
    labels: torch.Tensor | None  # int64 [B / world_size]; None when the set has none

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), None if self.labels is None else self.labels.pin_memory())


class ImageStream:
    """A packed set as an endless stream of batches.

    url: the folder that holds index.json, local or any fsspec URL. batch_size: the global batch, over all
    ranks. seed: of order and flips. num_workers: processes that read ahead; 0 reads in this one.
    resolution, num_channels: what the model takes, compared with the index; None compares nothing.
    flip: mirror half of the samples, others in each epoch. pin_memory: hand out page-locked tensors; without
    CUDA it does nothing. storage_options: fsspec's. timeout_sec, retries: see Storage; a worker that takes
    longer than they allow and a minute is given up.

    Raises UserError on any setting that does not fit the set, and later when a sample cannot be read.
    """

    def __init__(
        self,
        url,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        resolution: int | None = None,
        num_channels: int | None = None,
        flip: bool = False,
        pin_memory: bool = False,
        storage_options: dict | None = None,
        timeout_sec: float = 30,
        retries: int = 4,
    ):
        self.storage = Storage(url, storage_options, timeout_sec=timeout_sec, retries=retries)
        self.index = index = Index.load(url, storage_options, timeout_sec=timeout_sec, retries=retries)
        self.where = where = shown(url)  # as errors name it
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise UserError(
                f"a global batch_size of {batch_size} does not divide among {world_size} ranks; "
                f"make it a multiple of {world_size}"
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
        if resolution not in (None, index.resolution):
            raise UserError(
                f"{where} is packed at resolution {index.resolution} and the model takes "
                f"{resolution}; pack it with --resolution {resolution}, or set "
                f"model.resolution={index.resolution}"
            )
        if num_channels not in (None, index.num_channels):
            raise UserError(
                f"{where} is packed with {index.num_channels} channels and the model takes "
                f"{num_channels}; pack it with --num-channels {num_channels}, or set "
                f"model.num_channels={index.num_channels}"
            )
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.num_workers, self.flip = num_workers, flip
        self.pin = pin_memory and torch.cuda.is_available()
        self.order, self.shards = Order(index.shard_sizes, seed), ShardReader(self.storage, index)

    @property
    def digest(self) -> str:
        """The set's identity: what a checkpoint keeps, to refuse resuming on other data."""
        return self.index.digest

    @property
    def num_classes(self) -> int | None:
        return self.index.num_classes

    def __len__(self) -> int:
        """Images in the set."""
        return self.index.count

    def batches(self, images_seen: int = 0) -> Iterator[Batch]:
        """This rank's part of every global batch from position `images_seen` on, without end.

        Exact at any position, whatever ranks and workers read before. Raises UserError when a sample
        cannot be read or a worker dies.
        """
        if operator.index(images_seen) < 0:
            raise UserError(f"images_seen is {images_seen}; a position in the stream is not negative")
        if self.num_workers:
            return self._worker_batches(images_seen)
        return (self._pinned(self.at(images_seen + step * self.batch_size)) for step in count())

    def at(self, start: int) -> Batch:
        """This rank's part of the global batch [start, start + batch_size)."""
        positions = rank_positions(start, self.batch_size, self.rank, self.world_size)
        samples = self.order.sample_at(positions)
        flips = flip_at(self.seed, self.order.epoch_at(positions), samples) if self.flip else None
        return self._read(samples, flips)

    def sample(self, indices) -> Batch:
        """The samples of these numbers (0 .. len - 1), in the order given, never mirrored."""
        samples = np.asarray(indices, dtype=np.int64).reshape(-1)
        if samples.size and not 0 <= samples.min() <= samples.max() < len(self):
            raise UserError(
                f"samples {samples.min()} to {samples.max()} were asked for, and {self.where} has 0 to {len(self) - 1}"
            )
        return self._read(samples)

    def _read(self, samples: np.ndarray, flips: np.ndarray | None = None) -> Batch:
        index, decode = self.index, DECODERS[self.index.image_format]
        shape = (len(samples), index.num_channels, index.resolution, index.resolution)
        images = torch.empty(shape, dtype=torch.uint8)
        pixels = images.numpy()  # the same memory
        for i, encoded in enumerate(self.shards.read(samples)):
            image = decode(encoded, index.resolution, index.num_channels, index.name(samples[i]))
            pixels[i] = image[..., ::-1] if flips is not None and flips[i] else image
        return Batch(images, None if index.label is None else torch.from_numpy(index.label[samples]))

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
        """Fork is quick, but a child must not inherit this process's connections (see Storage.fs)."""
        if self.storage.is_local or self.storage.url.startswith("memory:"):  # such memory is only inherited
            return multiprocessing.get_context("fork")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imports torch once, not once a worker
        return context


class _Steps(IterableDataset):
    """What one worker runs: every n-th step. DataLoader asks the workers in turn, so steps come in order."""

    def __init__(self, stream: ImageStream, images_seen: int):
        self.stream, self.images_seen = stream, images_seen

    def __iter__(self):
        worker, stream = get_worker_info(), self.stream
        # A worker that hangs, on a dead network mount for one, is killed by its own alarm and found dead.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # Who asks a job to stop often signals every process of it. The training process decides: it may need the batch
        # that is being read. One that hangs in its read is gone soon after.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(STOP_SEC))
        for step in count(worker.id, worker.num_workers):
            signal.alarm(math.ceil(stream.storage.patience_sec + GRACE_SEC))
            try:
                item = stream.at(self.images_seen + step * stream.batch_size)
            except UserError as error:  # handed over as a value: raised here it would arrive as a traceback
                item = error
            except Exception as error:  # its trace is logged here, where it still is
                logger.exception("a data worker failed")
                item = UserError(f"a process that reads {stream.where} failed: {error!r}")
            signal.alarm(0)
            yield item


def _unchanged(item):
    return item
