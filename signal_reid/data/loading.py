"""Batches of image triplets: decoded, kept in memory or read from a packed file."""

from __future__ import annotations

import errno
import multiprocessing.util
import os
import pickle
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import torch.utils.data
from torch import Tensor

from signal_reid.config import Config
from signal_reid.data.decoding import EVALUATION, TRAINING, Interpolation, decode, decode_into
from signal_reid.data.errors import DataError
from signal_reid.data.layouts import Dataset, Sample
from signal_reid.data.packing import PackedImages, open_packed
from signal_reid.data.progress import ProgressCallback
from signal_reid.data.sampler import IdentitySampler
from signal_reid.data.worker_deaths import raise_deaths_where_batches_are_waited_for, told_of_deaths
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import UserError
from signal_reid.runtime.spare_memory import require_memory_of_threads
from signal_reid.runtime.troubles import MachineError, explain

_SPARE_FILES = 8
"""File descriptors that a worker keeps free to hand its batches over with."""
_KEPT_FILES = 3

Cache = Literal["none", "ram", "packed"]


class Batch(NamedTuple):
    """What a loader yields."""

    images: Tensor
    """uint8 (B, M, 3, H, W)."""
    labels: Tensor
    """int64 (B,): training labels from a training loader, identities from an evaluation loader."""
    cameras: Tensor
    """int64 (B,)."""
    scenes: Tensor
    """int64 (B,); -1 where the dataset has no scenes."""
    indices: Tensor
    """int64 (B,): positions in the list of samples."""

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device, without waiting where the memory is pinned."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass(frozen=True)
class _LoadFailure:
    """An error on its way from a worker process; raised there, PyTorch would wrap it in a traceback."""

    error: UserError


class _Sealed:
    """A batch on its way from a worker process: the images lie in shared memory, the rest is copied.

    The worker itself shares the memory and takes the file descriptors, so that a failure is noticed. PyTorch would do
    so in the thread that feeds its queue, where a failure loses the batch, and whoever waits for it waits for ever.
    """

    def __init__(self, batch: Batch) -> None:
        numbers = [values.numpy() for values in batch[1:]]
        self._content = bytes(ForkingPickler.dumps((batch.images, numbers)))
        _check_spare_files()

    def open(self) -> Batch | _LoadFailure:
        try:
            images, numbers = pickle.loads(self._content)
        except (EOFError, OSError, RuntimeError) as error:
            line = explain(error) or "a data-loading worker ended before its batch was read; lower data.workers"
            return _LoadFailure(MachineError(line))
        return Batch(images, *map(torch.from_numpy, numbers))

    def pin_memory(self) -> Batch | _LoadFailure:
        """Open it in page-locked memory; PyTorch's pinning thread calls this."""
        opened = self.open()
        return Batch(*(values.pin_memory() for values in opened)) if isinstance(opened, Batch) else opened


class TripletDataset(torch.utils.data.Dataset[Tensor]):
    """The images of samples, decoded when asked for or ahead of time.

    Args:
        samples: at least one.
        size: height, width in pixels.
        interpolation: `bicubic` (training) or `bilinear` (evaluation).
        cache: `none` decodes at every access, `ram` decodes all samples here and keeps them in memory, `packed` reads
            `packed`.
        labels: class label of each identity; none: the identity itself.
        packed: the file to read with `cache="packed"`.
        shared: keep the cache in memory that worker processes share.
        progress: called while the cache is filled or packed again.

    Raises:
        DataError: no samples, an unreadable image, a sample that is not in the packed file, or too little memory.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: tuple[int, int],
        interpolation: Interpolation,
        cache: Cache = "none",
        labels: Mapping[int, int] | None = None,
        packed: PackedImages | None = None,
        shared: bool = False,
        progress: ProgressCallback | None = None,
    ) -> None:
        if not samples:
            raise DataError("no samples to load")
        self.samples = list(samples)
        self.size = size
        self.interpolation: Interpolation = interpolation
        identities = [sample.identity for sample in samples]
        self.labels = torch.tensor([labels[i] for i in identities] if labels is not None else identities)
        self.cameras = torch.tensor([sample.camera for sample in samples])
        self.scenes = torch.tensor([sample.scene for sample in samples])
        self._cached = _allocate(samples, size, shared) if cache == "ram" else None
        if self._cached is not None:
            decode_into(self._cached, self.samples, interpolation, progress)
        if cache == "packed" and packed is None:
            raise DataError("cache='packed' needs a packed file")
        self._packed = packed if cache == "packed" else None
        self._rows = self._packed.rows(self.samples, interpolation) if self._packed is not None else []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        """The images of one sample: uint8 (M, 3, H, W)."""
        return self.images([index])[0]

    def images(self, indices: Sequence[int]) -> Tensor:
        """The images of several samples: uint8 (B, M, 3, H, W)."""
        if self._cached is not None:
            return self._cached.index_select(0, torch.tensor(indices))
        if self._packed is not None:
            return self._packed.read([self._rows[index] for index in indices])
        return torch.stack([decode(self.samples[index], self.size, self.interpolation) for index in indices])

    def __getitems__(self, indices: list[int]) -> Batch | _LoadFailure:
        """What PyTorch's loader asks for: a whole batch at once."""
        try:
            images = self.images(indices)
        except DataError as error:
            return _LoadFailure(error)
        except (MemoryError, OSError, RuntimeError) as error:
            return _failure(error)
        chosen = torch.tensor(indices)
        return Batch(images, self.labels[chosen], self.cameras[chosen], self.scenes[chosen], chosen)


def _share_patiently(worker: int) -> None:
    """Let the thread that hands a worker's file descriptors over try again where there are too few, without a word.

    It would print a traceback and try again at once, until the other side gives up: thousands of tracebacks before the
    one line that says what is wrong. A worker's end would print one as well, so some are kept for it.
    """

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            time.sleep(0.01)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = tell
    kept: list[int] = []  # for the end of the worker, which removes a directory
    with suppress(OSError):
        kept.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(_KEPT_FILES))
    multiprocessing.util.Finalize(None, _close, (kept,), exitpriority=0)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class BatchLoader:
    """Iterates over batches; which samples they hold is decided here, whatever the number of workers.

    Args:
        dataset: what to load.
        batches: the sample indices of each batch, iterated anew each time that this loader is.
        workers: processes that load ahead; 0 loads here.
        device: where the batches will go; the memory is pinned for CUDA.
    """

    def __init__(
        self,
        dataset: TripletDataset,
        batches: Sequence[list[int]] | _EpochAfterEpoch,
        workers: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.dataset = dataset
        self._batches = batches
        sampler: Iterable[list[int]] = batches
        self._loader: torch.utils.data.DataLoader[Tensor] = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_sealed_in_workers,
            pin_memory=device is not None and torch.device(device).type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_share_patiently,
        )

    def __iter__(self) -> Iterator[Batch]:
        return told_of_deaths(map(_opened, self._start()))

    def _start(self) -> Iterator[Any]:
        if self._loader.num_workers:
            raise_deaths_where_batches_are_waited_for()
            require_memory_of_threads(self._loader.num_workers + 1)  # one for each queue, and one that pins memory
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._batches)


class TrainLoader(BatchLoader):
    """Batches of the identity sampler, one epoch after another.

    Workers go on with the next epoch while the last batches of one are used, and while the model is evaluated: a step
    at the beginning of an epoch waits no longer than any other. Nothing is loaded beyond the last epoch.

    Args:
        dataset, workers, device: see `BatchLoader`.
        sampler: which samples each batch holds.
        epochs: the last epoch; a later one is loaded by itself where it is asked for.
    """

    def __init__(
        self,
        dataset: TripletDataset,
        sampler: IdentitySampler,
        epochs: int,
        workers: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.sampler = sampler
        super().__init__(dataset, _EpochAfterEpoch(sampler, epochs), workers, device)
        self._epochs = epochs
        self._stream: Iterator[Any] = iter(())
        self._stream_goes_on_with: tuple[int, int] | None = None

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch that the next iteration deals, and how many of its batches it passes over."""
        self.sampler.set_epoch(epoch, first)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first, count = self.sampler.epoch, self.sampler.first, len(self)
        if self._stream_goes_on_with != (epoch, first):
            self._stream = self._start()
        self._stream_goes_on_with = None  # an epoch that is given up leaves batches of its own in the stream
        yield from told_of_deaths(map(_opened, islice(self._stream, count)))
        self._stream_goes_on_with = (epoch + 1, 0) if epoch < self._epochs else None


class _EpochAfterEpoch:
    """The batches of a sampler's current epoch, and behind them those of each epoch that follows, to the last."""

    def __init__(self, sampler: IdentitySampler, last: int) -> None:
        self._sampler = sampler
        self._last = last

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self._sampler.epoch
        yield from self._sampler
        for later in range(epoch + 1, self._last + 1):
            yield from self._sampler.part(later)

    def __len__(self) -> int:
        """Batches of the current epoch."""
        return len(self._sampler)


def make_train_loader(
    config: Config,
    dataset: Dataset,
    device: torch.device | str | None = None,
    packed: PackedImages | None = None,
    progress: ProgressCallback | None = None,
    processes: Processes = ALONE,
) -> TrainLoader:
    """Batches of the training split for one epoch after another; see `TrainLoader.set_epoch`.

    Args:
        config: `data`, `schedule.epochs` and `training.seed` are used.
        dataset: its training split is loaded.
        device: where the batches will go.
        packed: the file to read with `data.cache=packed`; none: the one in the dataset's directory, which is packed
            again where the dataset has changed since.
        progress: called while the cache is filled or packed again.
        processes: that share the training; each loads its part of every batch, and has a cache of its own.

    Raises:
        FileNotFoundError, DataError: see `TripletDataset`, `IdentitySampler` and `open_packed`.
    """
    labels = [dataset.train_labels[sample.identity] for sample in dataset.train]
    sampler = IdentitySampler(labels, config.data.batch_size, config.data.instances, config.training.seed, processes)
    cache = config.data.cache
    # The first to open a packed file may have to pack it again.
    with processes.first_before_others() if cache == "packed" else nullcontext():
        triplets = _triplets(config, dataset.train, TRAINING, cache, dataset.train_labels, packed, progress)
    return TrainLoader(triplets, sampler, config.schedule.epochs, config.data.workers, device)


def make_eval_loader(
    config: Config,
    samples: Sequence[Sample],
    device: torch.device | str | None = None,
    cache: Cache | None = None,
    packed: PackedImages | None = None,
    progress: ProgressCallback | None = None,
) -> BatchLoader:
    """Batches of samples in their order, each sample once.

    Args:
        config: `data` and `evaluation.batch_size` are used.
        samples: at least one; see `Dataset.evaluation_samples`.
        device: where the batches will go.
        cache: none: `data.cache`.
        packed: the file to read with the packed cache; none: as in `make_train_loader`.
        progress: called while the cache is filled or packed again.

    Raises:
        FileNotFoundError, DataError: see `TripletDataset` and `open_packed`.
    """
    triplets = _triplets(config, samples, EVALUATION, cache or config.data.cache, None, packed, progress)
    size = config.evaluation.batch_size
    batches = [list(range(start, min(start + size, len(samples)))) for start in range(0, len(samples), size)]
    return BatchLoader(triplets, batches, config.data.workers, device)


def _triplets(
    config: Config,
    samples: Sequence[Sample],
    interpolation: Interpolation,
    cache: Cache,
    labels: Mapping[int, int] | None,
    packed: PackedImages | None,
    progress: ProgressCallback | None,
) -> TripletDataset:
    modalities = {len(sample.sources) for sample in samples} - {config.model.modalities}
    if modalities:
        raise DataError(
            f"model.modalities must be {(found := modalities.pop())} for {config.data.dataset}, got "
            f"{config.model.modalities}; model.modalities={found} takes them all, data.modalities=[NAME,...] some"
        )
    if cache == "packed" and packed is None:
        packed = open_packed(config, rebuild=True, progress=progress)
    return TripletDataset(
        samples,
        config.data.image_size,
        interpolation,
        cache,
        labels,
        packed,
        shared=config.data.workers > 0,
        progress=progress,
    )


def _allocate(samples: Sequence[Sample], size: tuple[int, int], shared: bool) -> Tensor:
    shape = (len(samples), len(samples[0].sources), 3, *size)
    try:
        images = torch.empty(shape, dtype=torch.uint8)
        return images.share_memory_() if shared else images
    except RuntimeError:
        kind = "shared memory (/dev/shm)" if shared else "memory"
        needed = torch.Size(shape).numel() / 2**30
        instead = "data.cache=packed or data.workers=0" if shared else "data.cache=packed"
        raise DataError(f"data.cache=ram needs {needed:.1f} GiB of {kind}; use {instead}") from None


def _opened(item: Any) -> Batch:
    """What PyTorch's loader gave, as a batch; the error of one that could not be loaded is raised."""
    loaded = item.open() if isinstance(item, _Sealed) else item
    if isinstance(loaded, _LoadFailure):
        raise loaded.error
    batch: Batch = loaded
    return batch


def _sealed_in_workers(loaded: Any) -> Batch | _LoadFailure | _Sealed:
    """What `__getitems__` gave, sealed in a worker process."""
    batch: Batch | _LoadFailure = loaded
    if isinstance(batch, _LoadFailure) or torch.utils.data.get_worker_info() is None:
        return batch
    try:
        return _Sealed(batch)
    except (MemoryError, OSError, RuntimeError) as error:
        return _failure(error)


def _failure(error: Exception) -> _LoadFailure:
    """Known trouble of the machine as a value; anything else is raised."""
    line = explain(error, "lower data.workers")
    if line is None:
        raise error
    return _LoadFailure(MachineError(line))


def _check_spare_files() -> None:
    """Fail here rather than in the thread that hands the descriptors over, which would retry for ever."""
    spare: list[int] = []
    try:
        while len(spare) < _SPARE_FILES:
            spare.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for descriptor in spare:
            os.close(descriptor)
