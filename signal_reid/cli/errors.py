"""How the program ends: what a user can mend is one line and exit code 2, a bug shows its traceback and is exit code 1.

Of several processes one says it for all.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.control import Control
from rich.segment import ControlType

from signal_reid.cli.app import choices, console
from signal_reid.ops import BackendError
from signal_reid.runtime.console import make_console
from signal_reid.runtime.distributed import LostProcessError, Processes, join_processes, launched
from signal_reid.runtime.errors import UserError
from signal_reid.runtime.spare_memory import require_memory
from signal_reid.runtime.text import escaped, shortened
from signal_reid.runtime.troubles import EVALUATION_MEMORY, explain

_REMEDY = "the names of files are {} in this locale: set PYTHONUTF8=1, or a locale of UTF-8 such as LC_ALL=C.UTF-8"
_SPARE_BYTES = 2**23
_LEAST_BYTES = 2**25  # what any command takes; with less, small pieces lack, which libraries may not survive
_LEAVE_BAR = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), ControlType.SHOW_CURSOR)


@contextmanager
def explained_end(processes: Processes, memory: str | None = None, named: bool = False) -> Iterator[None]:
    """End the program where the block fails; of several processes one says why all of them end.

    Args:
        processes: that share the work.
        memory: the remedy where memory ran out, if there is one.
        named: whether the line tells which process it was.
    """
    spare = _Spare()
    try:
        require_memory(_LEAST_BYTES)
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        spare.give_back()
        line = one_line(error, memory)
        if isinstance(error, LostProcessError):
            line = processes.who_is_gone(line or "")
        elif line is not None and named and processes.size > 1:
            line = f"{processes.name}: {line}"
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
    finally:
        spare.give_back()


class _Spare:
    """Open files and memory to be given back where the program fails, as it needs some to clean up and to say why."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []
        self._memory: mmap.mmap | None = None
        with suppress(OSError):
            self._memory = mmap.mmap(-1, _SPARE_BYTES)  # nothing of it is touched: it takes addresses, and no memory
            for _ in range(4):
                self._descriptors.append(os.open(os.devnull, os.O_RDONLY))

    def give_back(self) -> None:
        if self._memory is not None:
            self._memory.close()
        while self._descriptors:
            os.close(self._descriptors.pop())


def one_line(error: Exception, memory: str | None = None) -> str | None:
    """What the user can mend, in one line; None for a bug."""
    known = explain(error, memory)
    if known is not None:
        return known
    if isinstance(error, OSError) and error.strerror and error.filename:
        line = escaped(f"{error.filename}: {error.strerror}")
    elif isinstance(error, (UserError, BackendError)):
        line = " ".join(str(error).split())
    elif isinstance(error, OSError):
        line = escaped(str(error))
    elif isinstance(error, UnicodeEncodeError) and not _can_be_a_name(error.object):
        line = f"{shortened(error.object)} cannot be the name of a file"
    else:
        return _cause(error, memory)
    return f"{line}; {remedy}" if (remedy := remedy_of_locale(line)) else line


def _cause(error: BaseException, memory: str | None) -> str | None:
    """What the machine lacked where that became another error: a worker's death is raised between any two steps."""
    while (cause := error.__cause__ or error.__context__) is not None:
        if (line := explain(cause, memory)) is not None:
            return line
        error = cause
    return None


def remedy_of_locale(line: str) -> str:
    """What helps where a line tells of a name that files cannot have in this locale; empty where there is none."""
    return "" if _can_be_a_name(line) else _REMEDY.format(sys.getfilesystemencoding())


def _can_be_a_name(text: str) -> bool:
    """Whether files can be opened by a text; under a locale that is not UTF-8 those of other scripts seem not there."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


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
def shared_work(memory: str = EVALUATION_MEMORY, named: bool = False) -> Iterator[Processes]:
    """Join the processes that torchrun started; only process 0 shows anything. See `explained_end`."""
    log = logging.getLogger("signal_reid")
    before = log.level
    with join_processes() as processes, explained_end(processes, memory, named):
        try:
            if not processes.first:
                console.quiet = True
                log.setLevel(logging.ERROR)
            yield processes
        finally:
            console.quiet = False
            log.setLevel(before)


def stopped_by_signal(run: Callable[[], None]) -> None:
    """Run what SIGINT and SIGTERM end: bars are taken down, nothing unfinished is left; exit codes 130 and 143.

    Processes that torchrun started keep the system's way: one that waits for another cannot be told anything.
    """
    if launched()[1] > 1:
        run()
        return
    received, over = 0, False

    def stop(number: int, _: object) -> None:
        nonlocal received
        if over:
            return
        received = number
        # What is left to do is short and must not be cut off; a second Ctrl-C does so all the same.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else signal.default_int_handler)
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    try:  # not a context, whose own steps into the block and out of it a signal could interrupt
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, stop)
        run()
    except (KeyboardInterrupt, SystemExit):
        if received:
            sys.exit(128 + received)
        raise
    finally:
        over = True
        for asked, handler in before.items():
            signal.signal(asked, handler)


def end_of_thread(problem: threading.ExceptHookArgs) -> None:
    """Say why a thread ended, but for what is said elsewhere.

    TensorBoard's thread raises a full disk here and once more in the main thread, where it becomes one line.
    """
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)
