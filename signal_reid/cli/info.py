"""The command `info`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from signal_reid.ops import dispatch
from signal_reid.runtime import environment


def info() -> None:
    """Print versions, devices and which operator backends are available, and why not the others."""
    table = Table(show_header=False, box=None)
    for name, value in {**environment.describe(), **dispatch.describe(start=True)}.items():
        table.add_row(name, value)
    Console().print(table)
