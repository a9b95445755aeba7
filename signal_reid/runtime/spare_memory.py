"""Memory asked for before code of others that does not survive the lack of it, so that the lack becomes one line."""

from __future__ import annotations

import threading

import numpy as np

_STACK = 8 * 2**20  # of a thread, where nothing else is set; no system maps more
_BESIDE_STACK = 2**20  # the allocator's next arena, the interpreter's own stack
_CODEC = 4 * 2**20  # tables and buffers of a decoder or an encoder, and what other threads take meanwhile
_BYTES_OF_PIXEL = 4


def require_memory(size: int) -> None:
    """Ask for so many bytes and give them back; nothing is written to them, so that it takes a few microseconds.

    Raises:
        MemoryError: there are not so many.
    """
    np.empty(size, dtype=np.uint8)


def require_memory_of_threads(count: int) -> None:
    """Ask for what threads need to begin: `Thread.start` waits for ever for one that had too little to come so far.

    Source: python/cpython issue 140746.

    Raises:
        MemoryError: there is too little.
    """
    require_memory(count * ((threading.stack_size() or _STACK) + _BESIDE_STACK))


def require_memory_of_codec(width: int, height: int) -> None:
    """Ask for what Pillow needs to decode or encode so many pixels.

    A codec that Pillow gets no memory for it frees through a pointer that it has not set yet, which ends the process
    by SIGSEGV (`PyImaging_DecoderNew`, `PyImaging_EncoderNew`, to version 13.0 and later).

    Raises:
        MemoryError: there is too little.
    """
    require_memory(width * height * _BYTES_OF_PIXEL + _CODEC)
