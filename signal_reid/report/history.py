"""Curves and a table from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from signal_reid.runtime.text import is_number

Row = Mapping[str, Any]

NOT_LOSSES = {"kind", "epoch", "step", "learning_rate", "triplets_per_second", "mfu", "peak_memory_bytes", "seconds"}
"""What rows hold besides losses, and the seconds of each share of the work."""
LABELS = {
    "mAP": "mAP",
    "rank1": "R-1",
    "rank5": "R-5",
    "rank10": "R-10",
    "mINP": "mINP",
    "total": "loss",
    "mfu": "MFU",
    "triplets_per_second": "samples/s",
    "identity": "identity loss",
    "triplet": "triplet loss",
    "accuracy": "accuracy on the training batches",
}
FORMATS = {"learning_rate": ".2e", "triplets_per_second": ".1f"}
_LARGEST = 1e300
FRACTIONS = {"mAP", "rank1", "rank5", "rank10", "mINP", "mfu", "accuracy"}


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    x: list[float]
    y: list[float]


def loss_curves(history: Sequence[Row], titles: Mapping[str, str] | None = None) -> list[Curve]:
    """The total and each loss by step, the total first; of a run too short for that, the means of its epochs.

    Args:
        history: rows of `metrics.jsonl`.
        titles: of the method's losses, where they differ from their names.
    """
    rows = [row for row in history if row["kind"] == "step"] or [row for row in history if row["kind"] == "epoch"]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if is_loss(name)]
    return _curves(rows, sorted(names, key=lambda name: name != "total"), "step", titles)


def part_curves(history: Sequence[Row], titles: Mapping[str, str] | None = None) -> dict[str, list[Curve]]:
    """What the method tells of its losses by epoch, such as the accuracy of each head: a curve for each loss, by part.

    Args:
        history: rows of `metrics.jsonl`; in `head_0.accuracy`, `head_0` is the loss and `accuracy` the part.
        titles: of the method's losses, where they differ from their names.
    """
    rows = [row for row in history if row["kind"] == "epoch"]
    parts: dict[str, list[Curve]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if "." in name):
        loss, _, part = name.rpartition(".")
        curves = [Curve(label(loss, titles), curve.x, curve.y) for curve in _curves(rows, [name], "epoch")]
        parts.setdefault(part, []).extend(curves)
    return {part: curves for part, curves in parts.items() if curves}


def learning_rate_curves(history: Sequence[Row]) -> list[Curve]:
    """The learning rate by epoch."""
    return _curves([row for row in history if row["kind"] == "epoch"], ["learning_rate"], "epoch")


def retrieval_curves(history: Sequence[Row]) -> list[Curve]:
    """mAP and Rank-1 by epoch, on what the best epoch was chosen on."""
    return _curves([row for row in history if row["kind"] == choosing(history)], ["mAP", "rank1"], "epoch")


def choosing(history: Sequence[Row]) -> str:
    """The kind of the rows that the best epoch was chosen by: `validation` where there are some, else `eval`."""
    return "validation" if any(row["kind"] == "validation" for row in history) else "eval"


def best_row(history: Sequence[Row]) -> Row | None:
    """The row of the best epoch, by mAP on what it was chosen on, the earliest of equals; None without evaluations."""
    rows = [row for row in history if row["kind"] == choosing(history) and is_finite(row.get("mAP"))]
    return max(rows, key=lambda row: row["mAP"], default=None)


def last_row(history: Sequence[Row]) -> Row | None:
    """The last of the rows that the best epoch was chosen by; None without evaluations."""
    rows = [row for row in history if row["kind"] == choosing(history) and is_finite(row.get("mAP"))]
    return rows[-1] if rows else None


def epoch_table(history: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what was measured of each epoch, the best one named."""
    epochs: dict[int, dict[str, Any]] = {}
    shown = ("epoch", choosing(history))
    for row in history:
        if row["kind"] in shown:
            epochs.setdefault(row["epoch"], {}).update(row)
    known = ["total", "learning_rate", "triplets_per_second", "mfu", "mAP", "rank1", "rank5", "rank10", "mINP"]
    names = [name for name in known if any(name in row for row in epochs.values())]
    header = ["epoch", *map(label, names)]
    best = best_row(history)
    marked = {best["epoch"]: " (best)"} if best is not None else {}
    return header, [
        [f"{epoch}{marked.get(epoch, '')}", *(_shown(name, row.get(name)) for name in names)]
        for epoch, row in epochs.items()
    ]


def label(name: str, titles: Mapping[str, str] | None = None) -> str:
    """A number's name for readers: what `titles` has for it, else what is usual in the field."""
    return {**LABELS, **(titles or {})}.get(name, name.replace("_", " "))


def spread(values: Sequence[float], count: int) -> list[float]:
    """At most `count` of some values, spread evenly, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def is_loss(name: str) -> bool:
    """Whether a number in the row of a step or an epoch is a loss."""
    return name not in NOT_LOSSES and "." not in name and not name.endswith("_seconds")


def _curves(rows: Sequence[Row], names: Sequence[str], x: str, titles: Mapping[str, str] | None = None) -> list[Curve]:
    curves = []
    for name in names:
        points = [(row[x], row[name]) for row in rows if is_finite(row.get(name))]
        if points:
            curves.append(Curve(label(name, titles), [float(a) for a, _ in points], [float(b) for _, b in points]))
    return curves


def is_finite(value: Any) -> bool:
    """Whether a value of a row is a number that a chart can show: no NaN, and less than what its axis overflows at."""
    return is_number(value) and abs(value) < _LARGEST


def _shown(name: str, value: Any) -> str:
    if not is_number(value):
        return "n/a"
    return format(value, ".1%" if name in FRACTIONS else FORMATS.get(name, ".3f"))
