"""What counted launches, bytes and operations mean in time on cards that are not here.

The floor is the time of the bytes that must move, at the card's bandwidth. The estimate adds up the work that is done:
of each operator the longer of its bytes at the bandwidth and its operations at the peak rate, and `LAUNCH_US` for each
launch. It is a prediction for a device that never waits for its host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signal_reid.training.throughput import GPU_PEAKS

from .counting import Count

LAUNCH_US = 2.5
"""Stated, not measured: microseconds from the end of a kernel to the end of an empty one queued behind it."""


@dataclass(frozen=True)
class Card:
    """What a device moves and computes at best: bytes and operations per second, in fp32 and in 16-bit products."""

    bandwidth: float
    rate: float
    low_rate: float

    def floor_us(self, moved: int, operations: int = 0) -> float:
        """Least time in microseconds, of fp32 operations."""
        return 1e6 * max(moved / self.bandwidth, operations / self.rate)

    def estimate_us(self, count: Count) -> float:
        """Microseconds of what was counted."""
        seconds = 0.0
        for work in count.work:
            rate = self.low_rate if work.on_tensor_cores else self.rate
            seconds += max(work.moved / self.bandwidth, work.operations / rate)
        return 1e6 * seconds + LAUNCH_US * count.launches


BANDWIDTHS = {"RTX 3090": 936e9, "A100": 2039e9, "H100": 3350e9, "RTX 5090": 1792e9}
"""Bytes per second, from the vendor's data sheets; A100 and H100 are those with 80 GB and SXM."""
CARDS = {name: Card(bandwidth, *(1e12 * rate for rate in GPU_PEAKS[name])) for name, bandwidth in BANDWIDTHS.items()}


def costs(count: Count, must_move: int, cards: Mapping[str, Card] = CARDS) -> dict[str, Any]:
    """A row's numbers: what was counted, what must move at least, and floor and estimate of each card."""
    row: dict[str, Any] = {
        "launches": count.launches,
        "MB": round(count.moved / 1e6, 3),
        "must_MB": round(must_move / 1e6, 3),
        "moved_ratio": round(count.moved / must_move, 2) if must_move else None,
        "GFLOP": round(count.operations / 1e9, 4),
    }
    for name, card in cards.items():
        row[f"floor_us {name}"] = round(card.floor_us(must_move), 2)
        row[f"estimate_us {name}"] = round(card.estimate_us(count), 2)
    return row


READABLE = {"must_MB": "must MB", "moved_ratio": "ratio"}


def readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as it is printed: floor → estimate of a card in one column, megabytes without decimals."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        kind, _, card = name.partition(" ")
        if kind == "floor_us":
            cells[f"{card} us"] = f"{value:.0f} → {row[f'estimate_us {card}']:.0f}"
        elif kind != "estimate_us":
            cells[READABLE.get(name, name)] = value
    return cells
