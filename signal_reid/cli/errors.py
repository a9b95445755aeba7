"""How the program ends: what a user can mend is one line and exit code 2, a bug shows its traceback and is exit code 1.

Of several processes one says it for all.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from rich.control import Control
from rich.segment import ControlType

from signal_reid.cli.app import choices, console
from signal_reid.ops import BackendError
from signal_reid.runtime.console import make_console
from signal_reid.runtime.distributed import Processes, join_processes
from signal_reid.runtime.errors import UserError
from signal_reid.runtime.text import escaped
from signal_reid.runtime.troubles import EVALUATION_MEMORY, TRAINING_MEMORY, explain

_LEAVE_BAR = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), ControlType.SHOW_CURSOR)


@contextmanager
def explained_end(processes: Processes, memory: str = TRAINING_MEMORY) -> Iterator[None]:
    """End the program where the block fails; of several processes one says why all of them end.

    Args:
        processes: that share the work.
        memory: the remedy where memory ran out.
    """
    try:
        yield
    except Exception as error:
        line = one_line(error, memory)
        with processes.reporting() as chosen:
            if chosen:
                if processes.size > 1:  # process 0 may be stopped while its progress bar is on this line
                    make_console().control(_LEAVE_BAR)
                if line is None or choices.traceback:
                    traceback.print_exception(error)
                if line is not None:
                    print(f"error: {line}", file=sys.stderr, flush=True)
        _let_go(error)
        sys.exit(1 if line is None else 2)


def one_line(error: Exception, memory: str) -> str | None:
    """What the user can mend, in one line; None for a bug."""
    known = explain(error, memory)
    if known is not None:
        return known
    if isinstance(error, OSError) and error.strerror and error.filename:
        return escaped(f"{error.filename}: {error.strerror}")
    if isinstance(error, (UserError, BackendError)):
        return " ".join(str(error).split())
    return escaped(str(error)) if isinstance(error, OSError) else None


def _let_go(error: BaseException | None) -> None:
    """Free what the error's frames hold, without a word.

    A loader that did not get all its workers fails once more when it is freed, which would be said after the line.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
    finally:
        sys.unraisablehook = hook


@contextmanager
def shared_work() -> Iterator[Processes]:
    """Join the processes that torchrun started; only process 0 shows anything."""
    log = logging.getLogger("signal_reid")
    before = log.level
    with join_processes() as processes, explained_end(processes, EVALUATION_MEMORY):
        try:
            if not processes.first:
                console.quiet = True
                log.setLevel(logging.ERROR)
            yield processes
        finally:
            console.quiet = False
            log.setLevel(before)


def end_of_thread(problem: threading.ExceptHookArgs) -> None:
    """Say why a thread ended, but for what is said elsewhere.

    TensorBoard's thread raises a full disk here and once more in the main thread, where it becomes one line.
    """
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)
