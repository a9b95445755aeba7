"""How long a training still takes, from how long its part so far took."""

from __future__ import annotations

import time

SECONDS_BETWEEN_LINES = 30.0
"""Between the lines that tell of steps where there is no terminal with a bar."""


class Outlook:
    """Measures the pace of a run, evaluations with it.

    The first step, most of which may be compilation, is left out.

    Args:
        epochs: of the whole run.
    """

    def __init__(self, epochs: int):
        self.epochs = epochs
        self._begun: tuple[float, float] | None = None
        self._told = time.monotonic()

    def left(self, epoch: int, share: float) -> str | None:
        """How long the run still takes, in words; None at the first step.

        Args:
            epoch: that is under way, from 1.
            share: of its steps that are done.
        """
        now, done = time.monotonic(), epoch - 1 + share
        if self._begun is None:
            self._begun = now, done
            return None
        began, before = self._begun
        return f"{in_words((now - began) / (done - before) * (self.epochs - done))} left" if done > before else None

    def line_due(self) -> bool:
        """Whether it is time for a line that tells of a step; the time runs anew when it is."""
        now = time.monotonic()
        due = now - self._told >= SECONDS_BETWEEN_LINES
        if due:
            self._told = now
        return due


def in_words(seconds: float) -> str:
    """A duration as its two largest units, such as `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} days {hours % 24} h"
