"""A segment of an index: some features and what is known of each, in one file with a checksum of every block."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from signal_reid.data.layouts import ImageSource
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_file
from signal_reid.runtime.text import is_whole, read_json, shortened

Storage = Literal["fp16", "fp32"]
STORAGE: dict[Storage, str] = {"fp16": "F16", "fp32": "F32"}
"""The types that features are kept in, and their names in a safetensors file."""
UNKNOWN = -1
"""The identity or camera of an item of which it is not known."""
PARTS = ("identities", "cameras", "entries", "features", "checksums")
"""What a segment's file holds."""
NAMES = "names"
"""What it holds beside these where an item has a name of its identity or its camera."""
_TYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
_BLOCK_BYTES = 2 * 2**20  # read, checked and multiplied at a time
_LONGEST_HEADER = 100_000


@dataclass(frozen=True)
class Entry:
    """What an index knows of an item beside its feature."""

    name: str
    sources: tuple[ImageSource | None, ...] = ()
    """Its image of each modality, where it came from files; none for a modality that it lacks."""
    identity: int = UNKNOWN
    camera: int = UNKNOWN
    identity_name: str = ""
    """What its files call the identity; empty: nothing but the number is known."""
    camera_name: str = ""
    """What its files call the camera; empty: nothing but the number is known."""

    @property
    def identity_shown(self) -> str:
        """The name of the identity, or its number; empty where it is not known."""
        return self.identity_name or ("" if self.identity == UNKNOWN else str(self.identity))

    @property
    def camera_shown(self) -> str:
        """The name of the camera, or its number; empty where it is not known."""
        return self.camera_name or ("" if self.camera == UNKNOWN else str(self.camera))


class Segment:
    """A segment on disk; every byte that is read is held against its checksum first.

    The file is safetensors: `entries` (JSON as bytes: name and sources), `identities` (n,), `cameras` (n,), `features`
    (n, d) in fp16 or fp32, and `checksums` (blocks + 1,), the CRC-32 of all that stands before the features, then of
    each block of `block_rows` rows, in the low half, and in the high half the CRC-32 of all numbers before it. Where
    there are names of identities or cameras, `names` (JSON as bytes) has them by number, before the features.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is damaged, or no segment.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"index: no file {path}")
        self.path = path
        with path.open("rb") as file:
            try:
                self._tensors, self.block_rows, self._start = _read_header(file)
                self.rows, self.dimension = self._tensors["features"]["shape"]
                self.dtype = _TYPES[self._tensors["features"]["dtype"]]
                self._check_size(file)
                self._checksums = self._read_checksums(file)
                self._attributes = self._read_attributes(file)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, struct.error) as error:
                raise damaged(path, shortened(str(error))) from None

    def __len__(self) -> int:
        return self.rows

    def entry(self, row: int) -> Entry:
        """What is known of an item.

        Raises:
            InputError: the file does not say it in the way that segments do.
        """
        try:
            name, sources = self._attributes["entries"][row]
            images = tuple(None if source is None else _source(*source) for source in sources)
        except (TypeError, ValueError) as error:
            raise damaged(self.path, f"its item {row}: {shortened(str(error))}") from None
        identity, camera = int(self.identities[row]), int(self.cameras[row])
        called = self._attributes[NAMES]
        names = (called[kind].get(str(number), "") for kind, number in (("identities", identity), ("cameras", camera)))
        return Entry(str(name), images, identity, camera, *names)

    @property
    def identities(self) -> np.ndarray:
        """(n,) int64."""
        return self._attributes["identities"]

    @property
    def cameras(self) -> np.ndarray:
        """(n,) int64."""
        return self._attributes["cameras"]

    @property
    def summary(self) -> int:
        """One number that a change of any byte of the file changes."""
        return zlib.crc32(self._checksums.tobytes())

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The first row and the features (rows, d), as they are kept, of one block after another.

        Raises:
            InputError: a block has changed since it was written.
        """
        begin, _ = self._place("features")
        row_bytes = self.dimension * self.dtype.itemsize
        with self.path.open("rb") as file:
            for number, row in enumerate(range(0, self.rows, self.block_rows)):
                count = min(self.block_rows, self.rows - row)
                content = bytearray(count * row_bytes)
                file.seek(begin + row * row_bytes)
                if file.readinto(content) != len(content) or zlib.crc32(content) != self._crc(number + 1):
                    raise damaged(self.path, f"rows {row} to {row + count - 1} do not have their checksum")
                values = np.frombuffer(content, self.dtype).reshape(count, self.dimension)
                yield row, torch.from_numpy(values)

    def mapped(self) -> np.ndarray:
        """All features (n, d) mapped into memory, unchecked: for rows of blocks that have been checked."""
        begin, _ = self._place("features")
        return np.memmap(self.path, self.dtype, "r", begin, (self.rows, self.dimension))

    def check(self) -> None:
        """Hold the whole file against its checksums.

        Raises:
            InputError: it has changed since it was written.
        """
        for _ in self.blocks():
            pass

    def _place(self, name: str) -> tuple[int, int]:
        begin, end = self._tensors[name]["data_offsets"]
        return self._start + begin, self._start + end

    def _crc(self, number: int) -> int:
        return int(self._checksums[number]) & 0xFFFFFFFF

    def _read_checksums(self, file: BinaryIO) -> np.ndarray:
        begin, end = self._place("checksums")
        file.seek(begin)
        checksums = np.frombuffer(file.read(end - begin), "<i8")
        blocks = -(-self.rows // self.block_rows)
        if len(checksums) != blocks + 1 or _chained(checksums & 0xFFFFFFFF).tobytes() != checksums.tobytes():
            raise ValueError("its checksums do not fit together")
        return checksums

    def _check_size(self, file: BinaryIO) -> None:
        """Whether each part is within the file, before memory is taken for it."""
        size = file.seek(0, 2)
        for name in _parts(self._tensors):
            begin, end = self._place(name)
            tensor = self._tensors[name]
            if not 0 <= begin <= end <= size or end - begin != prod(tensor["shape"]) * _TYPES[tensor["dtype"]].itemsize:
                raise ValueError(f"its header says of {name} what cannot be")
        if size != self._place("checksums")[1]:
            raise ValueError("it is not as long as its header says")

    def _read_attributes(self, file: BinaryIO) -> dict[str, Any]:
        """What stands before the features, checked."""
        features, _ = self._place("features")
        file.seek(0)
        content = file.read(features)
        if zlib.crc32(content) != self._crc(0):
            raise ValueError("its entries do not have their checksum")
        parts = {name: content[slice(*self._place(name))] for name in _parts(self._tensors)}
        entries = read_json(parts["entries"])
        names = _checked_names(read_json(parts[NAMES]) if NAMES in parts else {})
        numbers = {name: np.frombuffer(parts[name], "<i8") for name in ("identities", "cameras")}
        if any(len(part) != self.rows for part in (entries, *numbers.values())):
            raise ValueError("it does not have an entry for each feature")
        return {"entries": entries, NAMES: names, **numbers}


def write_segment(
    path: Path, entries: Sequence[Entry], dimension: int, storage: Storage, features: Iterable[Tensor]
) -> int:
    """Write a segment whole or not at all; of the features one block at a time is in memory.

    Args:
        path: the file.
        entries: n, at least one. An identity and a camera has one name in a segment: the shortest that its items give.
        dimension: d.
        storage: what the features are kept in.
        features: parts of (n, d) floating point, in order; of unit length.

    Returns:
        The segment's `summary`.

    Raises:
        InputError: features of another number or size, or that are not finite.
        OSError: the disk is full or refuses.
    """
    dtype = _TYPES[STORAGE[storage]]
    block_rows = max(1, _BLOCK_BYTES // (dimension * dtype.itemsize))
    head = _head(entries, dimension, storage, block_rows)
    checksums = [zlib.crc32(head)]

    def write(file: BinaryIO) -> None:
        del checksums[1:]
        file.write(head)
        written = 0
        for block in _blocks(features, dimension, dtype, block_rows):
            content = block.tobytes()
            checksums.append(zlib.crc32(content))
            file.write(content)
            written += len(block)
        if written != len(entries):
            raise InputError(f"features must be one for each of the {len(entries)} items, got {written}")
        file.write(_chained(np.array(checksums, "<i8")).tobytes())

    write_file(path, write)
    return zlib.crc32(_chained(np.array(checksums, "<i8")).tobytes())


def damaged(path: Path, problem: str) -> InputError:
    """The error of a file of an index that is not as it was written."""
    return InputError(f"{path}: damaged ({problem}); build the index again")


def _head(entries: Sequence[Entry], dimension: int, storage: Storage, block_rows: int) -> bytes:
    """All that stands before the features."""
    n = len(entries)
    named = json.dumps([[entry.name, [_written(source) for source in entry.sources]] for entry in entries]).encode()
    parts = {
        "identities": np.array([entry.identity for entry in entries], "<i8").tobytes(),
        "cameras": np.array([entry.camera for entry in entries], "<i8").tobytes(),
        "entries": _aligned(named),
    }
    if names := {kind: called for kind, called in _names(entries).items() if called}:
        parts[NAMES] = _aligned(json.dumps(names).encode())
    header: dict[str, Any] = {"__metadata__": {"signal_reid_segment": "1", "block_rows": str(block_rows)}}
    end = 0
    sizes = {
        **{name: len(content) for name, content in parts.items()},
        "features": n * dimension * _TYPES[STORAGE[storage]].itemsize,
        "checksums": 8 * (1 - (-n // block_rows)),
    }
    kinds = {name: ("U8", [sizes[name]]) for name in ("entries", NAMES) if name in parts}
    kinds["features"] = (STORAGE[storage], [n, dimension])
    for name, size in sizes.items():
        kind, shape = kinds.get(name, ("I64", [size // 8]))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts.values())


def _aligned(text: bytes) -> bytes:
    """JSON, which may end in spaces, of a length that leaves what follows aligned."""
    return text + b" " * (-len(text) % 8)


def _names(entries: Sequence[Entry]) -> dict[str, dict[int, str]]:
    """The names that say more than the number of an identity or a camera, by that number."""
    found: dict[str, dict[int, str]] = {"identities": {}, "cameras": {}}
    for entry in entries:
        labels = ((entry.identity, entry.identity_name), (entry.camera, entry.camera_name))
        for called, (number, name) in zip(found.values(), labels, strict=True):
            if name and name != str(number):
                called[number] = min(called.get(number, name), name, key=lambda text: (len(text), text))
    return found


def _checked_names(names: Any) -> dict[str, dict[str, str]]:
    """The names of identities and cameras by the digits of their numbers."""
    known = {kind: dict(names.get(kind, {})) for kind in ("identities", "cameras")}
    if not all(isinstance(name, str) for called in known.values() for name in called.values()):
        raise ValueError("a name of an identity or a camera is no text")
    return known


def _parts(tensors: Mapping[str, Any]) -> list[str]:
    """What a file holds, by its header."""
    return [*PARTS, NAMES] if NAMES in tensors else list(PARTS)


def _written(source: ImageSource | None) -> list[Any] | None:
    return None if source is None else [str(source.path.absolute()), *(source.box or ())]


def _source(path: str, *box: int) -> ImageSource:
    if len(box) not in (0, 4) or not all(map(is_whole, box)):
        raise ValueError("a part of an image is four numbers")
    return ImageSource(Path(path), (box[0], box[1], box[2], box[3]) if box else None)


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """The parts by name, the rows of a block, and where the parts begin."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST_HEADER:
        raise ValueError("no header of a segment")
    header = read_json(file.read(length))
    metadata = header.pop("__metadata__")
    if metadata["signal_reid_segment"] != "1":
        raise ValueError("a version of segments that this version does not know")
    block_rows = int(metadata["block_rows"])
    features = header["features"]["shape"]
    numbers = [number for name in _parts(header) for key in ("shape", "data_offsets") for number in header[name][key]]
    if not all(map(is_whole, numbers)) or not all(is_whole(number, 1) for number in (block_rows, *features)):
        raise ValueError("a number in its header is none that a segment has")
    return header, block_rows, 8 + length


def _blocks(features: Iterable[Tensor], dimension: int, dtype: np.dtype, block_rows: int) -> Iterator[np.ndarray]:
    """The features in the type that they are kept in, dealt in blocks."""
    waiting: list[np.ndarray] = []
    count = 0
    for part in features:
        if part.ndim != 2 or part.shape[1] != dimension:
            raise InputError(f"features must have shape (n, {dimension}), got {tuple(part.shape)}")
        values = part.detach().cpu().float().numpy().astype(dtype)
        if not np.isfinite(values).all():
            raise InputError("features must be finite, got NaN or infinity")
        while count + len(values) >= block_rows:
            taken = block_rows - count
            yield np.concatenate([*waiting, values[:taken]])
            waiting, values, count = [], values[taken:], 0
        waiting.append(values)
        count += len(values)
    if count:
        yield np.concatenate(waiting)


def _chained(checksums: np.ndarray) -> np.ndarray:
    """Checksums with, in the high half of each, a checksum of those before it and of itself."""
    result = checksums.astype("<i8")
    crc = 0
    for number, value in enumerate(checksums.tolist()):
        crc = zlib.crc32(struct.pack("<q", value), crc)
        result[number] = value | ((crc & 0x7FFFFFFF) << 32)
    return result
