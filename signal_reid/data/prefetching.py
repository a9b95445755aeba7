"""Batches on the device before they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch

from signal_reid.data.loading import Batch


def prefetch(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """Move batches to a device; on CUDA the next one is copied, on a stream of its own, while the current one is used.

    On any other device each batch is moved when it is asked for, which does nothing on the CPU.

    Args:
        batches: from a loader made for this device, whose batches lie in pinned memory: others are waited for.
        device: where the batches go.

    Yields:
        Batches that the current stream may use at once; the host never waits for a copy.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    side = _side_stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = batch.to(device), side.record_event()
        if ahead is not None:
            yield _usable(*ahead, device)
        ahead = copied
    if ahead is not None:
        yield _usable(*ahead, device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: the allocator keeps freed memory for the stream that it was used on."""
    return torch.cuda.Stream(device)


def _usable(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Order the current stream behind the copy, and keep the memory until that stream is done with it."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(current)
    return batch
