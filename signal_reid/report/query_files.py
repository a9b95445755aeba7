"""The result of each query as a file: CSV or Parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from signal_reid.report.contents import Value
from signal_reid.report.tables import csv_text
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import check_writable, write_atomically


def check_query_file(path: Path) -> None:
    """Check before the work that the results of queries can be written to a path.

    Raises:
        InputError: another suffix than .csv or .parquet, or Parquet without pyarrow.
        OSError: nothing can be written there.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"results of queries are kept in files named *.csv or *.parquet, got {path.name}")
    if path.suffix == ".parquet":
        _pyarrow()
    check_writable(path)


def write_query_file(path: Path, rows: Sequence[Sequence[Value]]) -> None:
    """Write a header and rows, as `query_rows` gives them, in the format of the suffix, whole or not at all.

    In Parquet a cell without a value is null; in CSV it is empty.
    """
    if path.suffix == ".csv":
        write_atomically(path, csv_text(rows).encode("utf-8", "backslashreplace"))
        return
    arrow, parquet = _pyarrow()
    header, *values = rows
    columns: dict[str, list[Value | None]] = {str(name): [row[i] for row in values] for i, name in enumerate(header)}
    numbers = ("identity", "average_precision", "matches", "first_match_rank", "nearest_identity")
    for name in numbers:
        columns[name] = [None if value == "" else value for value in columns[name]]
    file = io.BytesIO()
    parquet.write_table(arrow.table(columns), file)
    write_atomically(path, file.getvalue())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet needs pyarrow: pip install 'signal-reid[parquet]'; or name the file *.csv") from None
    return pyarrow, pyarrow.parquet
