"""Where the time of a step goes, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch


class StepClock:
    """Splits time into named laps: on a GPU by events in its queue, elsewhere by the host's clock.

    On a GPU a lap is the time until the device reaches the end of the work queued so far; waiting for data shows as the
    device's idle time in the lap that ends when the data is there.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._names: list[str] = []
        self._marks: list[Any] = [self._mark()]

    def lap(self, name: str) -> None:
        """End the lap that began at the last call."""
        self._names.append(name)
        self._marks.append(self._mark())

    def seconds(self) -> dict[str, float]:
        """Sum of each lap so far; waits for the device."""
        if self._stream is not None:
            self._stream.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for name, (before, now) in zip(self._names, pairwise(self._marks), strict=True):
            sums[name] += before.elapsed_time(now) / 1e3 if self._stream is not None else now - before
        return dict(sums)

    def _mark(self) -> Any:
        return self._stream.record_event(torch.cuda.Event(enable_timing=True)) if self._stream else time.perf_counter()
