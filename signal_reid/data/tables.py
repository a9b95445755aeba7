"""Tables of text in CSV or Parquet files: a manifest has a line per sample."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically
from signal_reid.runtime.text import shown

PARQUET_SUFFIXES = (".parquet", ".pq")


class TableError(InputError):
    """A file of which nothing can be used; the message does not name it."""


class Row(NamedTuple):
    line: int
    """Line of the file; where it is a Parquet file, one more than the row's number, which counts from 1."""
    cells: Mapping[str, str]
    """By column; empty where the file has nothing."""


@dataclass
class Table:
    columns: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Lines that are no rows, and why."""


def read_table(path: Path) -> Table:
    """Read a table; its format is told by the file's suffix.

    Raises:
        TableError: it cannot be read at all, has no columns or two of one name, or pyarrow is not installed.
        OSError: the file cannot be opened.
    """
    return _read_parquet(path) if path.suffix.lower() in PARQUET_SUFFIXES else _read_csv(path)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table in one piece; its format is told by the file's suffix.

    Raises:
        TableError: pyarrow is not installed.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() in PARQUET_SUFFIXES:
        pyarrow, parquet = _pyarrow()
        cells = list(zip(*rows, strict=True)) or [()] * len(columns)
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(
            pyarrow.table({name: list(values) for name, values in zip(columns, cells, strict=True)}), sink
        )
        write_atomically(path, sink.getvalue().to_pybytes())
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))


def _read_csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = next(reader, None)
        except csv.Error as error:
            raise TableError(f"line 1: not CSV ({error})") from None
        if not columns:
            raise TableError("line 1: there are no names of columns")
        table = Table(_column_names(columns))
        start = reader.line_num + 1
        try:
            for cells in reader:
                _add(table, start, [cell.strip() for cell in cells])
                start = reader.line_num + 1
        except csv.Error as error:
            table.problems.append((start, f"not CSV ({error}); no line after it was read"))
    return table


def _add(table: Table, line: int, cells: list[str]) -> None:
    if not any(cells):
        return  # an empty line, such as the last
    if len(cells) != len(table.columns):
        table.problems.append((line, f"{len(cells)} cells, the names of the columns are {len(table.columns)}"))
    else:
        table.rows.append(Row(line, dict(zip(table.columns, cells, strict=True))))


def _read_parquet(path: Path) -> Table:
    pyarrow, parquet = _pyarrow()
    try:
        content = parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise TableError(f"not a Parquet file that can be read ({' '.join(str(error).split())})") from None
    table = Table(_column_names(content.column_names))
    for number, values in enumerate(zip(*(column.to_pylist() for column in content.columns), strict=True), start=2):
        cells, unfit = [], ""
        for name, value in zip(table.columns, values, strict=True):
            text = _text(value)
            cells.append(text or "")
            unfit = unfit or (f"{name} must be text or a whole number, got {shown(value)}" if text is None else "")
        if unfit:
            table.problems.append((number, unfit))
        else:
            _add(table, number, cells)
    return table


def _text(value: Any) -> str | None:
    """A cell as a CSV file would hold it; none where it is of no kind that a manifest has."""
    if value is None or (isinstance(value, float) and value != value):  # NaN is nothing, too
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _column_names(names: Sequence[str]) -> tuple[str, ...]:
    columns = tuple(name.strip() for name in names)
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        raise TableError("line 1: columns are separated by commas")
    if "" in columns:
        raise TableError(f"line 1: column {columns.index('') + 1} has no name")
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise TableError(f"line 1: there are {columns.count(twice[0])} columns {shown(twice[0])}")
    return columns


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TableError("Parquet needs pyarrow: pip install 'signal-reid[parquet]'; or use CSV") from None
    return pyarrow, pyarrow.parquet
