"""Safetensors files with a checksum of the whole file among their metadata, since the format has none."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from signal_reid.runtime.troubles import ran_out_of_memory

CHECKSUM = "crc32"
"""Key of the metadata: the CRC-32 of the file, as eight hexadecimal digits, with zeros in the checksum's own place."""
_BLANK = "0" * 8
_CHUNK = 1 << 20
_REFUSED = re.compile(r"unable to .*file <.*>.*: (.*) \((\d+)\)$")  # PyTorch's, of a file that it maps
_LONGEST_HEADER = 100_000_000  # what the format allows


class DamagedFileError(ValueError):
    """A file that does not have the checksum that it carries."""


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file, its checksum included.

    Args:
        tensors: on the CPU, contiguous, each with memory of its own.
        metadata: text by name.
    """
    content = _ordered(safetensors.torch.save(dict(tensors), {**metadata, CHECKSUM: _BLANK}))
    end = 8 + int.from_bytes(content[:8], "little")
    place = content.index(_entry(_BLANK), 8, end) + len(_entry("")) - 1
    content[place : place + len(_BLANK)] = f"{zlib.crc32(content):08x}".encode()
    return bytes(content)


def _ordered(content: bytes) -> bytearray:
    """The same file with its metadata in order, which the library writes in any: equal contents are equal files."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(struct.pack("<Q", len(text)) + text + content[end:])


def check(path: Path) -> None:
    """Hold a safetensors file against the checksum that it carries; one without is not ours, and passes.

    For 200 MB that takes a core 0.07 s.

    Raises:
        DamagedFileError: it has changed since it was written.
    """
    with path.open("rb") as file:
        start = file.read(8)
        (length,) = struct.unpack("<Q", start.ljust(8, b"\0"))
        header = file.read(min(length, _LONGEST_HEADER))
        said = _said(header)
        if said is None:
            return
        checksum = zlib.crc32(header.replace(_entry(said), _entry(_BLANK)), zlib.crc32(start))
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    if f"{checksum:08x}" != said:
        raise DamagedFileError(f"{path}: damaged, it does not have the checksum that it was written with")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, held against its checksum first.

    Raises:
        DamagedFileError: it has changed since it was written.
        safetensors.SafetensorError: it is no safetensors file.
        MemoryError: there is too little memory for it.
        OSError: it cannot be opened.
    """
    check(path)
    with _explained(path):
        if not str(path).isascii() and any("\ud800" <= character <= "\udfff" for character in str(path)):
            return _read_from_memory(path)  # the library opens no path that is not UTF-8
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file alone, not held against its checksum.

    Raises:
        safetensors.SafetensorError: it is no safetensors file.
        MemoryError: there is too little memory for it.
        OSError: it cannot be opened.
    """
    with _explained(path), safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise what PyTorch and the library say of the machine or of the disk as the errors that they are."""
    try:
        yield
    except safetensors.SafetensorError as error:
        if ran_out_of_memory(error):
            raise MemoryError(str(error)) from None
        raise
    except RuntimeError as error:
        if (refused := _REFUSED.search(str(error))) is None:
            raise
        raise OSError(int(refused[2]), refused[1], str(path)) from None


def _read_from_memory(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = path.read_bytes()
    tensors = safetensors.torch.load(content)  # checks the header, too
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__", {})


def _entry(checksum: str) -> bytes:
    """How the checksum stands in the header."""
    return f'"{CHECKSUM}":"{checksum}"'.encode()


def _said(header: bytes) -> str | None:
    """The checksum that a header carries."""
    if f'"{CHECKSUM}"'.encode() not in header:
        return None
    try:
        said: Any = json.loads(header)["__metadata__"][CHECKSUM]
    except (ValueError, KeyError, TypeError, RecursionError):  # the reader of the format says what is wrong
        return None
    return said if isinstance(said, str) and header.count(_entry(said)) == 1 else ""
