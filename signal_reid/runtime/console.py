"""What the program shows while it works: lines and progress bars on the standard error."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from signal_reid.runtime.spare_memory import require_memory_of_threads
from signal_reid.runtime.text import escaped


class PlainConsole(Console):
    """A console that shows text with what cannot be seen, or would move the cursor, escaped."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(escaped(item, keep="\n") if isinstance(item, str) else item for item in objects), **options)


def make_console(quiet: bool = False) -> Console:
    """A console on the standard error."""
    return PlainConsole(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def overheard(console: Console, listen: Callable[[str], None]) -> Iterator[None]:
    """Tell `listen` everything that a console is asked to print inside the block, but for the frames of its bars."""
    printing = console.print

    def print_and_tell(*objects: Any, **options: Any) -> None:
        printing(*objects, **options)
        for item in objects:
            if not isinstance(item, Control):
                listen(_as_text(item))

    console.print = print_and_tell  # type: ignore[method-assign]
    try:
        yield
    finally:
        del console.print


def _as_text(item: Any) -> str:
    if isinstance(item, (str, Text)):
        return str(item)
    page = Console(file=io.StringIO(), width=100, highlight=False, markup=False)
    page.print(item)
    return str(page.file.getvalue())  # type: ignore[attr-defined]


@contextmanager
def progress_bar(description: str, console: Console) -> Iterator[Callable[..., None]]:
    """A bar, driven by the callback that it yields; nothing is shown where the console is not a terminal.

    The callback takes what is done, the total, and optionally a text to show beside them.
    """
    if not console.is_terminal:  # rich 13.0 ends even a bar that is not shown with an empty line
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    require_memory_of_threads(1)  # which draws the bar
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=None, text="")

        def update(done: int, total: int, text: str | None = None) -> None:
            progress.update(task, completed=done, total=total)
            if text is not None:
                progress.update(task, text=text)

        yield update
