"""Times on a GPU that hold nothing of the host's and nothing that an earlier step left in the cache.

Before a sample the device spins for twice the time that the host takes to queue the step, so that it never waits for
the host. The cache is then filled by reading a buffer: its lines are clean, so the step need not write them back first,
as it would have to after a buffer that was written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

FILLED_BYTES = 256 * 2**20  # more than any L2 cache
CALIBRATING_CYCLES = 50_000_000
HOST_ROUNDS = 3
"""The first compiles and loads, the least of the others is the host's time."""
AHEAD = 2.0
LEAST_SECONDS = 50e-6
"""Least time of the spin, where the host takes hardly any time."""


def device_times(
    steps: Mapping[str, Callable[[], object]], runs: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds on the device of each step in each of `runs` rounds; a round calls every step once, in turn both ways."""
    with torch.cuda.device(device):
        spins = {name: spin_cycles(host_seconds(step), cycles_per_second()) for name, step in steps.items()}
        filler = torch.zeros(FILLED_BYTES // 4, device=device)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for run in range(-warmup, runs):
            for name in list(steps)[:: -1 if run % 2 else 1]:
                seconds = _sample(steps[name], spins[name], filler)
                if run >= 0:
                    times[name].append(seconds)
    return times


def spin_cycles(host: float, rate: float) -> int:
    """Cycles for which the device is to be busy, for a step that takes the host so many seconds."""
    return int(rate * max(AHEAD * host, LEAST_SECONDS))


def host_seconds(step: Callable[[], object]) -> float:
    """The least time in which the host queues a step, on a device that has nothing else to do.

    A step that waits for the device has that time in it too.
    """
    times = []
    for _ in range(HOST_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def cycles_per_second() -> float:
    """Rate of the counter that `torch.cuda._sleep` watches, on a device that has left its idle clock."""
    for _ in range(2):
        start, end = _events()
        start.record()
        torch.cuda._sleep(CALIBRATING_CYCLES)
        end.record()
        end.synchronize()
    return CALIBRATING_CYCLES / (1e-3 * start.elapsed_time(end))


def _sample(step: Callable[[], object], cycles: int, filler: torch.Tensor) -> float:
    start, end = _events()
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    filler.sum()
    start.record()
    step()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
