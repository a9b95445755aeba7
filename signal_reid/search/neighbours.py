"""Approximate neighbours by FAISS, where it is installed: which items to score, beside the features of a segment."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch
from torch import Tensor

from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_file
from signal_reid.search.segments import Segment, damaged

if TYPE_CHECKING:
    from types import ModuleType

Kind = Literal["exact", "flat", "ivf", "hnsw"]
KINDS: tuple[Kind, ...] = ("exact", "flat", "ivf", "hnsw")
"""What finds the neighbours: this package's exact search, or one of FAISS's indices."""
_LINKS = 32  # of an item of HNSW to others
_VISITED = 128  # items that a search of HNSW keeps in view
_PROBED = 16  # lists of IVF that a query looks into
_TRAINED_ON = 64  # items for each list of IVF
_CHUNK = 2**20


def write_neighbours(path: Path, segment: Segment, kind: Kind) -> int:
    """Build FAISS's index of a segment and write it whole or not at all.

    `flat` keeps the features in fp32; `ivf` and `hnsw` keep them in eight bits a number, which decides only what is
    scored: a search scores what they find by the segment's own features.

    Returns:
        The file's CRC-32.

    Raises:
        InputError: FAISS is not installed.
    """
    faiss = find_faiss()
    made = _make(faiss, segment, kind)
    for _, features in segment.blocks():
        made.add(features.float().numpy())
    crc = 0

    def write(file: BinaryIO) -> None:
        nonlocal crc
        crc = 0

        def put(content: bytes) -> None:
            nonlocal crc
            crc = zlib.crc32(content, crc)
            file.write(content)

        faiss.write_index(made, faiss.PyCallbackIOWriter(put))

    write_file(path, write)
    return crc


class Neighbours:
    """FAISS's index of a segment, read from its file.

    Args:
        path: the file.
        crc: that it must have.

    Raises:
        InputError: FAISS is not installed, or the file has changed since it was written.
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path, crc: int) -> None:
        faiss = find_faiss()
        if not path.is_file():
            raise FileNotFoundError(f"index: no file {path}")
        if _crc(path) != crc:
            raise damaged(path, "it does not have its checksum")
        try:
            self._index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
        except RuntimeError:  # a kind of index that cannot be mapped into memory
            self._index = faiss.read_index(str(path))
        if hasattr(self._index, "nprobe"):
            self._index.nprobe = _PROBED

    def find(self, queries: Tensor, count: int) -> Iterable[Tensor]:
        """For each query (d,) the rows, ascending, of at most `count` items that may be its nearest."""
        _, found = self._index.search(queries.numpy(), min(count, self._index.ntotal))
        for rows in found:
            yield torch.from_numpy(rows[rows >= 0]).sort().values


def _make(faiss: ModuleType, segment: Segment, kind: Kind) -> Any:
    """An empty index, trained where its kind is."""
    d, product = segment.dimension, faiss.METRIC_INNER_PRODUCT
    bits = faiss.ScalarQuantizer.QT_8bit
    if kind == "flat":
        return faiss.IndexFlatIP(d)
    if kind == "hnsw":
        made = faiss.IndexHNSWSQ(d, bits, _LINKS, product)
        made.hnsw.efSearch = _VISITED
    else:
        lists = max(1, min(round(math.sqrt(len(segment))), len(segment) // _TRAINED_ON))
        quantizer = faiss.IndexFlatIP(d)
        made = faiss.IndexIVFScalarQuantizer(quantizer, d, lists, bits, product)
        made.own_fields = True
        quantizer.this.disown()
    made.train(_sample(segment, _TRAINED_ON * max(1, round(math.sqrt(len(segment))))).numpy())
    return made


def _sample(segment: Segment, count: int) -> Tensor:
    """About `count` features in fp32, evenly spread."""
    step = max(1, len(segment) // count)
    return torch.cat([features[(-first) % step :: step].float() for first, features in segment.blocks()])


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def find_faiss() -> ModuleType:
    """The library.

    Raises:
        InputError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise InputError("FAISS is not installed; pip install 'signal-reid[faiss]', or use an exact index") from None
    return faiss
