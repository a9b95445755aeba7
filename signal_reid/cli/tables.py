"""The tables that `eval` prints."""

from __future__ import annotations

from rich.table import Table

from signal_reid.evaluation import Metrics
from signal_reid.evaluation.missing import STANDS_FOR_ABSENT, MissingTable


def summary_table(title: str, metrics: Metrics) -> Table:
    """The numbers of one measurement."""
    summary = metrics.summary()
    table = _table(title, [], list(summary))
    table.add_row(*_percent(summary))
    return table


def missing_table(found: MissingTable) -> Table:
    """A row for each setting, after the complete one, and the mean where there is one."""
    complete = found.complete.metrics.summary()
    table = _table(STANDS_FOR_ABSENT[found.absent], ["query lacks", "gallery lacks"], list(complete))
    table.add_row("nothing", "nothing", *_percent(complete))
    for setting, metrics in found.rows:
        lacks = (", ".join(found.missing(side)) or "nothing" for side in setting)
        table.add_row(*lacks, *_percent(metrics.summary()))
    if found.mean is not None:
        table.add_section()
        table.add_row("mean where both", "lack the same", *_percent(found.mean))
    return table


def _table(title: str, texts: list[str], numbers: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _percent(numbers: dict[str, float]) -> list[str]:
    return [f"{value:.1%}" for value in numbers.values()]
