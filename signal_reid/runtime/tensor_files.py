"""Safetensors files with a checksum of the whole file among their metadata, since the format has none."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

CHECKSUM = "crc32"
"""Of the metadata: the CRC-32 of the file, as eight hexadecimal digits, with zeros in the checksum's own place."""
_BLANK = "0" * 8
_CHUNK = 1 << 20
_LONGEST_HEADER = 100_000_000  # what the format allows


class DamagedFileError(ValueError):
    """A file that does not have the checksum that it carries."""


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file, its checksum included.

    Args:
        tensors: on the CPU, contiguous, each with memory of its own.
        metadata: text by name.
    """
    content = bytearray(safetensors.torch.save(dict(tensors), {**metadata, CHECKSUM: _BLANK}))
    end = 8 + int.from_bytes(content[:8], "little")
    place = content.index(_entry(_BLANK), 8, end) + len(_entry("")) - 1
    content[place : place + len(_BLANK)] = f"{zlib.crc32(content):08x}".encode()
    return bytes(content)


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
