"""The death of a data-loading worker, raised where its batch is waited for and nowhere else.

PyTorch raises it from a signal handler, between any two steps of the main thread: within a queue, whose lock then stays
locked and is waited for at the end; within an import, which makes another error of it; once more while it is told.
"""

from __future__ import annotations

import multiprocessing.queues
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from torch.utils.data._utils import signal_handling

from signal_reid.runtime.troubles import explain

_Item = TypeVar("_Item")
_WAITING = multiprocessing.queues.Queue.get.__code__
_deaths: list[RuntimeError] = []


def raise_deaths_where_batches_are_waited_for() -> None:
    """Put our handler around PyTorch's, which it sets once in a process; called before workers are started."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    signal_handling._set_SIGCHLD_handler()
    raising = signal.getsignal(signal.SIGCHLD)
    if not callable(raising) or getattr(raising, "keeps_deaths", False):
        return

    def handler(number: int, frame: FrameType | None) -> Any:
        try:
            return raising(number, frame)
        except RuntimeError as error:
            _deaths.append(error)
        if len(_deaths) == 1 and _is_waiting(frame):
            raise _deaths[0]

    handler.keeps_deaths = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, handler)


def _is_waiting(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is _WAITING:
            return True
        frame = frame.f_back
    return False


def told_of_deaths(items: Iterable[_Item]) -> Iterator[_Item]:
    """The same items; where one is missing because a worker died, the error is that of its death.

    A death that the main thread is not waiting at is noticed within the five seconds after which PyTorch looks whether
    the workers live.
    """
    try:
        yield from items
    except RuntimeError as error:
        if _deaths and explain(error) is not None:
            raise _deaths.pop() from error
        raise
