"""Tables of the terminal: names are text, whatever brackets they hold."""

import io

import pytest
from rich.console import Console

from signal_reid.cli import index, show
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
