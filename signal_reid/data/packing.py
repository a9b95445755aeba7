"""One file of decoded triplets, so that training reads pixels instead of JPEG.

The file: a magic line, padding to one page, the images (uint8, row after row of M x 3 x H x W), a JSON index with every
row's sample, interpolation and CRC-32 and every source file's size and time, and a trailer that locates the index.
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from signal_reid.config import Config
from signal_reid.data.configured import options_of
from signal_reid.data.decoding import EVALUATION, TRAINING, Interpolation, decode, threaded
from signal_reid.data.depth import with_measured_ranges
from signal_reid.data.errors import DataError
from signal_reid.data.layouts import Dataset, Sample, locate_dataset, open_dataset
from signal_reid.data.progress import ProgressCallback
from signal_reid.runtime.files import write_file
from signal_reid.runtime.text import escaped, is_whole, read_json

_MAGIC = b"signal-reid packed images 1\n"
_TRAILER = struct.Struct("<QQI8s")  # offset, length and CRC-32 of the index; end mark
_END = b"SIGNALPK"
_DATA_OFFSET = 4096
_CHUNK = 128  # samples decoded ahead of the disk
_logger = logging.getLogger("signal_reid")


class StalePackError(DataError):
    """A packed file that is damaged or does not hold the data set as it is now; packing again mends it.

    Args:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # what a worker process needs to send the error to another
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return escaped(f"{self.path}: {self.reason}; run `signal-reid data pack` again")


def packed_path(root: str | Path, image_size: tuple[int, int]) -> Path:
    """Where the packed file of a dataset lies unless another place is given: in its directory, or beside its file."""
    (height, width), root = image_size, Path(root)
    if root.is_file():
        return root.with_name(f"{root.name}_{height}x{width}.packed")
    return root / f"signal_reid_{height}x{width}.packed"


def pack(
    name: str,
    root: str | Path,
    config: Config,
    output: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Decode a dataset into one file: the training split bicubic, query and gallery bilinear and what they share once.

    Args:
        name: of the dataset.
        root: see `open_dataset`.
        config: `data` is used, but for its name and root.
        output: the file to write; none: `packed_path` of the dataset's directory.
        progress: called with the samples done and their number.

    Returns:
        The file, which appears only when it is whole.

    Raises:
        FileNotFoundError, DataError: a dataset that cannot be opened or decoded, no directory for the file.
        OSError: the file cannot be written.
    """
    data = config.data.model_copy(update={"dataset": name, "root": str(root)})
    measured = with_measured_ranges(config.model_copy(update={"data": data}))
    dataset = open_dataset(name, root, options_of(measured))
    size = config.data.image_size
    path = packed_path(dataset.root, size) if output is None else Path(output).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory, to write {path.name} in")
    write_file(path, lambda file: _write(file, dataset, size, progress))
    return path


def open_packed(
    config: Config,
    path: str | Path | None = None,
    rebuild: bool = False,
    progress: ProgressCallback | None = None,
) -> PackedImages:
    """Open the packed file of the configured dataset.

    Args:
        config: `data` is used.
        path: the file; none: `packed_path` of the dataset's directory.
        rebuild: where the file is damaged or does not hold the dataset as it is now, say so and pack again.
        progress: of packing again.

    Raises:
        FileNotFoundError: no dataset, or no packed file.
        StalePackError: the file is truncated or corrupt, holds another image size, or the dataset has changed since.
        DataError: the dataset cannot be opened.
        OSError: the file cannot be packed again.
    """
    root = locate_dataset(config.data.dataset, config.data.root)
    path = packed_path(root, config.data.image_size) if path is None else Path(path).expanduser()
    try:
        images = PackedImages(path, root, config.data.image_size)
        if rebuild:
            for job in _jobs(open_dataset(config.data.dataset, root, options_of(config))):
                images.rows([job[0]], job[1])
        return images
    except StalePackError as error:
        if not rebuild:
            raise
        _logger.warning("%s", escaped(f"{error.path}: {error.reason}; packing it again"))
    pack(config.data.dataset, root, config, path, progress)
    return PackedImages(path, root, config.data.image_size)


class PackedImages:
    """A packed file, open for reading; each row is checked against its CRC-32 when it is first read.

    Args:
        path: the file.
        root: the directory (or the file that lists it) of the dataset that it was packed from.
        image_size: height, width that the file must hold.

    Raises:
        FileNotFoundError: no such file.
        StalePackError: see `open_packed`.
    """

    def __init__(self, path: Path, root: Path, image_size: tuple[int, int]) -> None:
        self.path = path
        self.root = root = root.parent if root.is_file() else root
        index = _read_index(path)
        self.shape = (len(index["rows"]), index["modalities"], 3, *index["image_size"])
        if tuple(index["image_size"]) != tuple(image_size):
            sizes = f"image_size {tuple(index['image_size'])}, expected {tuple(image_size)}"
            raise StalePackError(path, f"packed at {sizes}")
        if index["data_bytes"] != math.prod(self.shape):
            raise StalePackError(path, "the index and the images of this packed file do not agree")
        _check_sources(path, root, index["sources"])
        self._modalities = index["modalities"]
        self._row_of = {(key, interpolation): row for row, (key, interpolation, _) in enumerate(index["rows"])}
        self._checksums = [checksum for _, _, checksum in index["rows"]]
        self._checked: set[int] = set()
        self._file: FileIO | None = None

    def rows(self, samples: Sequence[Sample], interpolation: Interpolation) -> list[int]:
        """Where samples are in the file.

        Raises:
            StalePackError: a sample that is not in it, or another number of modalities.
        """
        if samples and len(samples[0].sources) != self._modalities:
            counts = f"{self._modalities} modalities, expected {len(samples[0].sources)}"
            raise StalePackError(self.path, f"packed with {counts}")
        rows = [self._row_of.get((_key(sample, self.root), interpolation)) for sample in samples]
        for sample, row in zip(samples, rows, strict=True):
            if row is None:
                raise StalePackError(self.path, f"{sample.sources[0].path} ({interpolation}) is not in it")
        return [row for row in rows if row is not None]

    def read(self, rows: Sequence[int]) -> Tensor:
        """Copy rows out of the file.

        Returns:
            uint8 (len(rows), M, 3, H, W).

        Raises:
            StalePackError: a row whose bytes have changed since they were written.
        """
        images = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        for row, image in zip(rows, images, strict=True):
            self._read(row, image)
            if row not in self._checked:
                if zlib.crc32(image.data) != self._checksums[row]:
                    raise StalePackError(self.path, f"the images of row {row} are corrupt")
                self._checked.add(row)
        return torch.from_numpy(images)

    def _read(self, row: int, image: np.ndarray) -> None:
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        offset, missing = _DATA_OFFSET + row * image.nbytes, image.data.cast("B")
        while missing:
            count = _read_at(self._file, missing, offset)
            if count == 0:
                raise StalePackError(self.path, "this packed file was cut short after it was opened")
            offset, missing = offset + count, missing[count:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # a worker opens the file itself


def _read_at(file: FileIO, buffer: memoryview, offset: int) -> int:
    """Read without a mapping, under which a file that is cut short ends the process with SIGBUS.

    At a position of its own, as forked workers share the file's; Windows, which has no such call, forks none.
    """
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [buffer], offset)
    file.seek(offset)
    return file.readinto(buffer)


def _write(file: BinaryIO, dataset: Dataset, size: tuple[int, int], progress: ProgressCallback | None) -> None:
    """Write the whole file."""
    jobs = _jobs(dataset)
    paths = sorted({source.path for sample, _ in jobs for source in sample.sources})
    sources = {_relative(path, dataset.directory): _stamp(path) for path in paths}
    file.write(_MAGIC.ljust(_DATA_OFFSET, b"\0"))
    rows = []
    for (sample, interpolation), images in zip(jobs, _decoded(jobs, size, progress), strict=True):
        file.write(images.data)
        rows.append((_key(sample, dataset.directory), interpolation, zlib.crc32(images.data)))
    index = {
        "dataset": dataset.name,
        "image_size": size,
        "modalities": len(jobs[0][0].sources),
        "data_bytes": file.tell() - _DATA_OFFSET,
        "rows": rows,
        "sources": sources,
    }
    text = json.dumps(index, separators=(",", ":")).encode()
    offset = file.tell()
    file.write(text)
    file.write(_TRAILER.pack(offset, len(text), zlib.crc32(text), _END))


def _jobs(dataset: Dataset) -> list[tuple[Sample, Interpolation]]:
    """What a packed file holds, row by row."""
    return [
        *((sample, TRAINING) for sample in dataset.train),
        *((sample, EVALUATION) for sample in dataset.evaluation_samples()[0]),
    ]


def _decoded(
    jobs: Sequence[tuple[Sample, Interpolation]], size: tuple[int, int], progress: ProgressCallback | None
) -> Iterator[np.ndarray]:
    for start in range(0, len(jobs), _CHUNK):
        chunk = jobs[start : start + _CHUNK]
        decoded = threaded(lambda job: decode(job[0], size, job[1]).numpy(), chunk)
        for done, images in enumerate(decoded, start=start + 1):
            if progress is not None:
                progress(done, len(jobs))
            yield images


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such packed file; run `signal-reid data pack` first")
    length = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise StalePackError(path, "not a packed file of this version")
        file.seek(max(length - _TRAILER.size, 0))
        trailer = file.read()
        if len(trailer) != _TRAILER.size or not trailer.endswith(_END):
            raise StalePackError(path, "this packed file is truncated")
        offset, text_length, checksum, _ = _TRAILER.unpack(trailer)
        file.seek(min(offset, length))
        text = file.read(min(text_length, length))
    if offset + text_length + _TRAILER.size != length or zlib.crc32(text) != checksum:
        raise StalePackError(path, "the index of this packed file is corrupt")
    try:
        index = read_json(text)
    except ValueError:
        index = None
    if not _is_index(index) or offset != _DATA_OFFSET + index["data_bytes"]:
        raise StalePackError(path, "the index of this packed file is not one that packing writes")
    return index


def _is_index(index: Any) -> bool:
    """Whether an index has the structure of one."""
    if not isinstance(index, dict) or not {"rows", "sources", "image_size"} <= index.keys():
        return False
    rows, sources, size = index["rows"], index["sources"], index["image_size"]
    if not (isinstance(rows, list) and isinstance(sources, dict) and isinstance(size, list) and len(size) == 2):
        return False
    counts = (*size, index.get("modalities"))
    return (
        all(is_whole(count, 1) for count in counts)
        and is_whole(index.get("data_bytes"))
        and all(isinstance(row, list) and len(row) == 3 for row in rows)
        and all(isinstance(row[0], str) and isinstance(row[1], str) and is_whole(row[2]) for row in rows)
        and all(isinstance(stamp, list) and "\0" not in name for name, stamp in sources.items())
    )


def _check_sources(path: Path, root: Path, sources: dict[str, list[int]]) -> None:
    for name, stamp in sources.items():
        try:
            current = _stamp(root / name)
        except (OSError, UnicodeEncodeError):  # a name that this locale cannot open
            raise StalePackError(path, f"{root / name} is gone since it was packed") from None
        if current != stamp:
            raise StalePackError(path, f"{root / name} has changed since it was packed")


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _key(sample: Sample, directory: Path) -> str:
    """What tells a sample from all others of the dataset, and from itself with other modalities or read otherwise."""
    sources = [(_relative(source.path, directory), source.box, source.reading) for source in sample.sources]
    return f"{sources[0][0]}#{zlib.crc32(repr(sources).encode(errors='surrogateescape')):08x}"


def _relative(path: Path, directory: Path) -> str:
    return os.path.relpath(path, directory).replace(os.sep, "/")
