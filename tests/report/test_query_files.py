"""The results of queries as Parquet: the same values as CSV's, with nulls."""

import sys

import pytest

from signal_reid.report.contents import QueryResult
from signal_reid.report.query_files import check_query_file, write_query_file
from signal_reid.report.tables import query_rows

ROWS = query_rows(
    [QueryResult("a.jpg", 3, "1", 0.5, [2, 4], "b.jpg", 7), QueryResult("c.jpg", 4, "n/a", float("nan"), [])]
)


def test_parquet_holds_every_column_with_its_type(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (extra parquet)")
    path = tmp_path / "queries.parquet"
    check_query_file(path)
    write_query_file(path, ROWS)
    table = parquet.read_table(path)
    assert table.column_names == ROWS[0]
    assert [list(row.values()) for row in table.to_pylist()] == [
        ["a.jpg", 3, "1", 0.5, 2, 2, "2 4", "b.jpg", 7],
        ["c.jpg", 4, "n/a", None, 0, None, "", "", None],
    ]
    assert str(table.schema.field("average_precision").type) == "double"


def test_parquet_without_pyarrow_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"Parquet needs pyarrow: pip install 'signal-reid\[parquet\]'"):
        check_query_file(tmp_path / "queries.parquet")
