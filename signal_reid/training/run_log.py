"""`run.log` in a run directory: when, where and by which command the run was worked on, and what the program said."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from rich.console import Console

from signal_reid.runtime import environment
from signal_reid.runtime.console import overheard
from signal_reid.runtime.errors import UserError
from signal_reid.runtime.text import escaped
from signal_reid.training.interruption import TrainingStopped
from signal_reid.training.run_directory import RunDirectory

_open: set[str] = set()
"""Logs that this process writes; a training inside a demo is told by the demo's."""


@contextmanager
def working_in(run: RunDirectory, *consoles: Console) -> Iterator[None]:
    """Own a run directory for a block, and append what the consoles are told to its log.

    Raises:
        InUseError: another process works in it.
    """
    with run.owned(consoles[0].print), logged(run, *consoles):
        yield


@contextmanager
def logged(run: RunDirectory, *consoles: Console) -> Iterator[None]:
    """Append what consoles are told inside the block to the run's log, each line with its time.

    It begins with the command, the host and the versions, and ends with how the block ended. A block that fails before
    it says anything, because the run cannot begin, and a directory that holds no run leave no trace. A disk that takes
    no more of the log does not end a training.
    """
    key = os.path.realpath(run.log)
    if key in _open:
        yield
        return
    _open.add(key)
    log = _Log(run)
    log.write(f"{_command()} on {socket.gethostname()}, process {os.getpid()}")
    log.write(", ".join(f"{name} {value}" for name, value in environment.describe().items()))
    try:
        with ExitStack() as listening:
            for console in consoles:
                listening.enter_context(overheard(console, log.tell))
            yield
        log.tell("ended")
    except BaseException as error:
        log.write(_end(error))
        raise
    finally:
        log.flush()
        _open.discard(key)


class _Log:
    """Lines with their time, which are kept until there is a run that they tell of."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._waiting: list[str] = []
        self._begun = False

    def tell(self, text: str) -> None:
        self._begun = True
        self.write(text)
        self.flush()

    def write(self, text: str) -> None:
        time = datetime.now().astimezone().isoformat(" ", "seconds")
        self._waiting.extend(f"{time}  {escaped(line)}\n" for line in text.splitlines())

    def flush(self) -> None:
        if self._begun and self._run.config.is_file():
            with suppress(OSError), self._run.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(self._waiting)
                self._waiting.clear()


def _command() -> str:
    program = Path(sys.argv[0])
    name = "signal-reid" if program.name in ("signal-reid", "__main__.py") else sys.argv[0]
    return shlex.join([name, *sys.argv[1:]])


def _end(error: BaseException) -> str:
    """How the run ended: what a user can mend in one line, a bug with its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, (UserError, TrainingStopped, OSError, SystemExit)):
        return f"ended: {error or type(error).__name__}"
    return "ended by a fault\n" + "".join(traceback.format_exception(error)).rstrip()
