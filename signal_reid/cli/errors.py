"""A user's mistake is one line on the standard error and exit code 2; of several processes one says it for all."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.control import Control
from rich.segment import ControlType

from signal_reid.cli.app import console
from signal_reid.ops import BackendError
from signal_reid.runtime.console import make_console
from signal_reid.runtime.distributed import LostProcessError, Processes, join_processes

_LEAVE_BAR = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), ControlType.SHOW_CURSOR)


@contextmanager
def one_line_errors(processes: Processes) -> Iterator[None]:
    """End the program with one line where the block fails; of several processes one says why all of them end."""
    try:
        yield
    except (ValueError, OSError, BackendError, LostProcessError) as error:
        with processes.reporting() as chosen:
            if chosen:
                if processes.size > 1:  # process 0 may be stopped while its progress bar is on this line
                    make_console().control(_LEAVE_BAR)
                print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextmanager
def shared_work() -> Iterator[Processes]:
    """Join the processes that torchrun started; only process 0 shows anything."""
    log = logging.getLogger("signal_reid")
    before = log.level
    with join_processes() as processes, one_line_errors(processes):
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


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
