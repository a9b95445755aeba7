"""The comparison of two JSON files of a benchmark: for every row that both have, the ratio of their medians."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MEDIANS = ("p50_ms", "p50_us", "peak_MiB")
"""What is compared where both rows have it: times and memory, less is better."""
SIZES = ("batch", "cameras", "dimension", "gallery", "items", "layers", "processes", "queries", "threads", "triplets")
SIZES += ("workers",)
"""Numbers that tell one row from another, like every text; all others are results."""
DEVICE = "device"

Row = Mapping[str, Any]


class CompareError(ValueError):
    """Files that cannot be compared; the message is one line."""


def compare(first: str | Path, second: str | Path, any_device: bool = False) -> list[dict[str, Any]]:
    """Pair the rows of two files that say the same of what was measured.

    Args:
        first, second: what a benchmark wrote with `--json`.
        any_device: compare rows of different devices too.

    Returns:
        For every pair: what tells it from the others, and for each of `MEDIANS` that both have both values and
        `B/A NAME`, the second over the first; below 1 the second is better.

    Raises:
        FileNotFoundError: no such file.
        CompareError: not a benchmark's file, rows of different devices, rows that nothing tells apart, or no row in
            common.
    """
    a, b = _rows(Path(first), any_device), _rows(Path(second), any_device)
    if not any_device:
        _check_devices(a, b)
    rows = []
    for key in a.keys() & b.keys():
        values = {name: (a[key][name], b[key][name]) for name in MEDIANS if a[key].get(name) and b[key].get(name)}
        if values:
            row = dict(key)
            for name, (before, after) in values.items():
                row |= {f"A {name}": before, f"B {name}": after, f"B/A {name}": round(after / before, 3)}
            rows.append((list(a).index(key), row))
    if not rows:
        raise CompareError(f"{first} and {second} have no row in common")
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def only_in(first: str | Path, second: str | Path, any_device: bool = False) -> list[dict[str, Any]]:
    """Rows of the first file, by what tells them apart, that the second does not have."""
    others = _rows(Path(second), any_device)
    return [dict(key) for key in _rows(Path(first), any_device) if key not in others]


def report(first: str | Path, second: str | Path, any_device: bool = False) -> None:
    """Print the comparison: a table, the middle of the ratios, and the rows that only one file has."""
    rows = compare(first, second, any_device)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = sorted(columns, key=lambda name: name.startswith(("A ", "B ", "B/A ")))
    table = Table(title=f"A: {first}, B: {second}")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if column not in row else str(row[column]) for column in columns))
    console = Console(width=160, soft_wrap=True)
    console.print(table)
    for name in MEDIANS:
        ratios = [row[f"B/A {name}"] for row in rows if f"B/A {name}" in row]
        if ratios:
            console.print(f"{name}: B/A {statistics.median(ratios):.3g} in the middle of {len(ratios)} rows")
    for label, pair in (("A", (first, second)), ("B", (second, first))):
        for row in only_in(*pair, any_device):
            console.print(f"only in {label}: {', '.join(f'{key} {value}' for key, value in row.items())}")


class CompareAction(argparse.Action):
    """`--compare A.json B.json`: print the comparison instead of measuring."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        parser.exit(report_or_error(*values, any_device=bool(self.const)))


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """`--compare` and `--compare-devices`, which any benchmark takes instead of its own work."""
    names = ("A.json", "B.json")
    parser.add_argument(
        "--compare", nargs=2, metavar=names, action=CompareAction, help="print the ratios of two files and stop"
    )
    parser.add_argument(
        "--compare-devices",
        nargs=2,
        metavar=names,
        action=CompareAction,
        const=True,
        help="the same of any devices",
    )


def _rows(path: Path, any_device: bool) -> dict[tuple[tuple[str, Any], ...], Row]:
    """Rows of a file by what tells them apart; the device of the file stands in each."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text())
        environment, rows = content["environment"], content["rows"]
        found: dict[tuple[tuple[str, Any], ...], Row] = {}
        for row in rows:
            row = {DEVICE: environment[DEVICE], "threads": environment["threads"], **row}
            named = {name: value for name, value in row.items() if isinstance(value, str) or name in SIZES}
            if any_device:
                named = {name: value for name, value in named.items() if name not in (DEVICE, "threads")}
            key = tuple(sorted(named.items()))
            if key in found:
                raise CompareError(f"{path}: nothing tells two rows apart ({', '.join(map(str, named.values()))})")
            found[key] = row
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise CompareError(f"{path}: not what a benchmark writes with --json") from None
    return found


def _check_devices(a: Mapping[Any, Row], b: Mapping[Any, Row]) -> None:
    first, second = ({row[DEVICE] for row in rows.values()} for rows in (a, b))
    if first != second:
        raise CompareError(
            f"the rows are of different devices ({', '.join(sorted(first))}; {', '.join(sorted(second))}); "
            "--compare-devices compares them all the same"
        )


def report_or_error(first: str, second: str, any_device: bool) -> int:
    """Print the comparison, or one line that says why there is none; the exit code."""
    try:
        report(first, second, any_device)
    except (CompareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
