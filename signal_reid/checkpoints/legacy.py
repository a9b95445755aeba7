"""Files of `torch.save` before PyTorch 1.6: pickles one after the other, then the storages."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from signal_reid.checkpoints.unpickling import Unpickler

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_legacy(path: Path) -> Any:
    """What the file holds; it has no checksums.

    Raises:
        ValueError: another kind of pickle, or storages that claim more bytes than the file has.
        Exception: the file is damaged; see `Unpickler.load`.
    """
    with path.open("rb") as file:
        return _Reader(file).read()


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._contents: dict[str, tuple[Tensor, int]] = {}
        """Bytes of each storage, filled after the pickle that names it, and bytes of one number."""
        self._claimed = 0

    def read(self) -> Any:
        """Everything."""
        if self._pickle() != _MAGIC or self._pickle() != _PROTOCOL:
            raise ValueError("a pickle that torch.save did not write")
        system = self._pickle()
        if isinstance(system, dict) and system.get("little_endian", True) != (sys.byteorder == "little"):
            raise ValueError(f"its byte order is not this machine's ({sys.byteorder})")
        objects, keys = self._pickle(), self._pickle()
        if not isinstance(keys, list) or sorted(keys) != sorted(self._contents):
            raise ValueError("its storages are not those that its tensors name")
        for key in keys:
            content, itemsize = self._contents[key]
            (numel,) = struct.unpack("<q", self._file.read(8))
            if numel * itemsize != len(content):
                raise ValueError(f"a storage of {numel} numbers in a place of {len(content)} bytes")
            memory = memoryview(content.numpy())  # type: ignore[arg-type]
            if self._file.readinto(memory) != len(content):  # type: ignore[attr-defined]
                raise EOFError("a storage ends early")
        return objects

    def _pickle(self) -> Any:
        return Unpickler(self._file, self._size, self._storage).load()

    def _storage(self, pid: Any) -> Tensor:
        kind, dtype, key, _, numel, part = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or part is not None:
            raise ValueError("it names a storage of no known type")
        if type(numel) is not int or numel < 0:
            raise ValueError("it names a storage of no known size")
        if key not in self._contents:
            self._claimed += numel * dtype.itemsize
            if self._claimed > self._size:
                raise ValueError(f"its storages claim {self._claimed} bytes, the file has {self._size}")
            self._contents[key] = torch.empty(numel * dtype.itemsize, dtype=torch.uint8), dtype.itemsize
        content, _ = self._contents[key]
        if numel * dtype.itemsize != len(content):
            raise ValueError(f"a storage of {numel} numbers in a place of {len(content)} bytes")
        return content.view(dtype)
