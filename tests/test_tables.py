"""Tables of the terminal: names are text, whatever brackets they hold, and no row stands twice."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from signal_reid.cli import index, show, tables
from signal_reid.evaluation.missing import MissingTable, Setting
from signal_reid.figures import Table
from signal_reid.search.index import Hit
from signal_reid.search.segments import Entry

NAME = "a [/gate] [red] :smile:.jpg"


@pytest.mark.parametrize(
    "table",
    [
        show._printed(Table("Ranked lists", ["query", "camera"], [[NAME, "north"]])),
        index._table(Entry("query"), [Hit(1, 0.5, 0, Entry(NAME))]),
        index._table(Entry(NAME), [Hit(1, 0.5, 0, Entry("x" * 40))]),
    ],
    ids=["show", "an answer", "a query"],
)
def test_a_name_in_brackets_is_no_markup(table):
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    assert NAME in console.file.getvalue()


def test_the_setting_in_which_nothing_is_missing_is_one_row():
    metrics = SimpleNamespace(summary=lambda: {"mAP": 0.5})
    both, first = (0, 1), (0,)
    settings = [Setting(query, gallery) for query in (both, first) for gallery in (both, first)]
    found = MissingTable(("RGB", "TI"), "zeros", SimpleNamespace(metrics=metrics), [(s, metrics) for s in settings])
    lacking = [list(column.cells) for column in tables.missing_table(found).columns[:2]]
    assert [tuple(map(str, row)) for row in zip(*lacking, strict=True)] == [
        ("nothing", "nothing"), ("nothing", "TI"), ("TI", "nothing"), ("TI", "TI")
    ]  # fmt: skip
