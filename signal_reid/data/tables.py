"""Tables of text in CSV or Parquet files: a manifest has a line per sample."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from signal_reid.data.errors import MOST_LISTED
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically
from signal_reid.runtime.spare_memory import require_memory
from signal_reid.runtime.text import shortened, shown
from signal_reid.runtime.troubles import explain

PARQUET_SUFFIXES = (".parquet", ".pq")
LONGEST_NAME = 100
"""Characters of a column's name, which messages show."""
MOST_COLUMNS = 1000
MOST_CELLS = 2**22
"""Cells of a Parquet file, beside a quarter of its bytes: what it repeats takes no space in it."""
MOST_TEXT = 2**28
"""Bytes of all texts of a Parquet file."""
_ENOUGH = 2**26  # bytes; where a machine has them, one that lacks memory for a table was asked for too much by the file


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
    """The first `MOST_LISTED` lines that are no rows, and why."""
    unlisted: int = 0
    """How many more there are."""

    def note(self, line: int, what: str) -> None:
        """Note a line that is no row."""
        if len(self.problems) < MOST_LISTED:
            self.problems.append((line, what))
        else:
            self.unlisted += 1


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
        TableError: Parquet, and pyarrow is not installed or a text has no UTF-8.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() in PARQUET_SUFFIXES:
        pyarrow, parquet = _pyarrow()
        rows = list(rows)
        unfit = next((text for row in (columns, *rows) for text in row if not _is_utf8(text)), None)
        if unfit is not None:
            raise TableError(f"Parquet holds UTF-8 alone, which {shown(unfit)} is not; write CSV")
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


def _is_utf8(text: str) -> bool:
    """Whether a text has no bytes of a file's name that are none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


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
            table.note(start, f"not CSV ({error}); no line after it was read")
    return table


def _add(table: Table, line: int, cells: list[str]) -> None:
    if not any(cells):
        return  # an empty line, such as the last
    if len(cells) != len(table.columns):
        table.note(line, f"{len(cells)} cells, the names of the columns are {len(table.columns)}")
    else:
        table.rows.append(Row(line, dict(zip(table.columns, cells, strict=True))))


def _read_parquet(path: Path) -> Table:
    pyarrow, parquet = _pyarrow()
    try:
        names = parquet.read_schema(path).names
        with parquet.ParquetFile(path, read_dictionary=names) as file:
            table = Table(_column_names(file.schema_arrow.names))
            for number, values in enumerate(_parquet_rows(file, path.stat().st_size), start=2):
                _add_values(table, number, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, MemoryError):
            require_memory(_ENOUGH)  # a damaged file asks for what no machine has
        elif explain(error) is not None:  # the machine's fault, not the file's
            raise
        raise TableError(f"not a Parquet file that can be read ({shortened(' '.join(str(error).split()))})") from None
    return table


def _parquet_rows(file: Any, size: int) -> Iterator[tuple[Any, ...]]:
    """The values of each row; some at a time are unpacked, as a small file may hold a long text very often."""
    about, names = file.metadata, file.schema_arrow.names
    if about.num_rows * len(names) > MOST_CELLS + size // 4:
        raise TableError(f"{about.num_rows} rows of {len(names)} columns are more than a manifest has in {size} bytes")
    most = MOST_TEXT + 4 * size
    if sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups)) > most:
        raise TableError(f"it holds more than {most} bytes in {size}, which a manifest does not")
    text = 0
    for batch in file.iter_batches(batch_size=1024):
        text += sum(_bytes(column) for column in batch.columns)
        if text > most:
            raise TableError(f"its texts are longer than those of a manifest: more than {most} bytes in {size}")
        columns = [_unpacked(column).to_pylist() for column in batch.columns]
        yield from zip(*columns, strict=True)


def _bytes(column: Any) -> int:
    """What a column takes unpacked: its texts are each kept once, and named by number."""
    if not hasattr(column, "dictionary"):
        return int(column.nbytes)
    import pyarrow.compute as compute

    lengths = compute.binary_length(column.dictionary)
    return int(compute.sum(lengths.take(column.indices)).as_py() or 0)


def _unpacked(column: Any) -> Any:
    return column.dictionary_decode() if hasattr(column, "dictionary") else column


def _add_values(table: Table, number: int, values: Sequence[Any]) -> None:
    cells, unfit = [], ""
    for name, value in zip(table.columns, values, strict=True):
        text = _text(value)
        cells.append(text or "")
        unfit = unfit or (f"{name} must be text or a whole number, got {shown(value)}" if text is None else "")
    if unfit:
        table.note(number, unfit)
    else:
        _add(table, number, cells)


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
    long = next((name for name in columns if len(name) > LONGEST_NAME), None)
    if long is not None:
        raise TableError(f"line 1: a column has a name of {len(long)} characters, more than {LONGEST_NAME}")
    if len(columns) > MOST_COLUMNS:
        raise TableError(f"line 1: {len(columns)} columns, more than {MOST_COLUMNS}")
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
