"""Numbers as tables of the page, and as files that a spreadsheet opens."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from signal_reid.figures import Table
from signal_reid.report.contents import QueryResult, Value
from signal_reid.report.history import Curve, spread

ROWS = 200
"""The most rows of a curve's table; of a longer curve they are spread evenly."""
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a spreadsheet takes a text for a formula by, when it begins so; the last four are the wide forms."""


def curve_table(curves: Sequence[Curve], x_label: str, title: str) -> Table:
    """The points of curves: a row for each x, thinned evenly to `ROWS`, the last always among them."""
    points = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    every = sorted({x for curve in curves for x in curve.x})
    chosen = spread(every, ROWS)
    if len(chosen) < len(every):
        title = f"{title}; {len(chosen)} of {len(every)} points, spread evenly"
    rows = [[f"{x:g}", *(_number(point.get(x)) for point in points)] for x in chosen]
    return Table(title, [x_label, *(curve.label for curve in curves)], rows)


def query_rows(queries: Iterable[QueryResult]) -> list[list[Value]]:
    """A header and a row for each query, for `csv_text`."""
    header: list[Value] = ["query", "identity", "camera", "average_precision", "matches", "first_match_rank"]
    header += ["match_ranks", "nearest", "nearest_identity"]
    rows: list[list[Value]] = [header]
    for query in queries:
        ranks = query.match_ranks
        precision = "" if math.isnan(query.average_precision) else query.average_precision
        row: list[Value] = [query.name, query.identity, query.camera, precision, len(ranks)]
        row += [ranks[0] if ranks else "", " ".join(map(str, ranks)), query.nearest]
        rows.append([*row, query.nearest_identity if query.nearest_identity >= 0 else ""])
    return rows


def csv_text(rows: Iterable[Sequence[Value]]) -> str:
    """Rows as CSV (RFC 4180), all text quoted; what a spreadsheet would run as a formula begins with an apostrophe."""
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_NONNUMERIC).writerows([_defused(cell) for cell in row] for row in rows)
    return file.getvalue()


def csv_uri(rows: Iterable[Sequence[Value]]) -> Markup:
    """Rows as the data URI of a CSV file."""
    encoded = base64.b64encode(csv_text(rows).encode("utf-8", "backslashreplace")).decode()
    return Markup(f"data:text/csv;charset=utf-8;base64,{encoded}")


def file_uri(text: str, name: str) -> Markup:
    """A text as the data URI of a file of that name."""
    kind = {".csv": "text/csv", ".md": "text/markdown"}.get(name[name.rfind(".") :], "text/plain")
    return Markup(f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}")


def _defused(cell: Value) -> Value:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"
