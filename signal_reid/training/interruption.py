"""When a training saves before its epoch ends: by the clock, or because it is asked to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from signal_reid.runtime.distributed import Processes, others_at_hand

REQUEUE = 75
"""Exit code of a training that saved and stopped because it was asked to: EX_TEMPFAIL, "try again later"."""
_SIGNALS = ("SIGTERM", "SIGUSR1")


class TrainingStopped(Exception):  # noqa: N818 - nothing went wrong
    """The training was asked to stop, and its checkpoint holds every step that it made."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Take SIGTERM and SIGUSR1 for a wish to save and stop, inside the block, which is in the main thread.

    Yields:
        Which signal came first, as a number; 0: none yet.
    """
    received: list[int] = []
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]  # Windows knows no SIGUSR1
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interruption:
    """Decides after each step whether a training saves, and whether it stops.

    A cluster may ask one process or all; they have to stop after the same step. So each tells the others after every
    step whether it was asked, and looks at what they said one step later, when that has long arrived.

    Args:
        processes: that share the training.
        asked: the number of the signal by which this process was asked to stop; 0: it was not.
        minutes: between checkpoints; none: no checkpoint is due.
    """

    def __init__(self, processes: Processes, asked: Callable[[], int], minutes: float | None):
        self._processes, self._asked, self._minutes = processes, asked, minutes
        self._saved = time.monotonic()
        self._said: tuple[Tensor, Any] | None = None

    def due(self) -> bool:
        """Whether a checkpoint is due by the clock; the time runs anew when it is."""
        now = time.monotonic()
        if self._minutes is None or now - self._saved < 60 * self._minutes:
            return False
        self._saved = now
        return True

    def stop(self) -> str | None:
        """The signal for which all processes stop now; called by all of them after each step.

        Raises:
            LostProcessError: a process ended.
        """
        if self._processes.size == 1:
            number = self._asked()
        else:
            number = self._agreed()
            said = torch.tensor([self._asked()])
            with others_at_hand():
                self._said = said, dist.all_reduce(said, dist.ReduceOp.MAX, async_op=True)
        return signal.Signals(number).name if number else None

    def close(self) -> None:
        """Hear the others out, where all end together."""
        self._agreed()

    def _agreed(self) -> int:
        if self._said is None:
            return 0
        (said, work), self._said = self._said, None
        with others_at_hand():
            work.wait()
        return int(said)
