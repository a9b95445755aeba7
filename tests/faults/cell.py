"""One cell of the matrix: an operation under a fault, tried several times, and what counts as having survived it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import machine
from operations import Operation, read_all, set_stage, unfinished

import signal_reid.program
from signal_reid.runtime.files import write_atomically

Prepare = Callable[[], None]


class NotSurvivedError(AssertionError):
    """What a fault broke."""


@dataclass(frozen=True)
class Undisturbed:
    """What an operation does where nothing is wrong: its result, its seconds, and the bytes of what it writes."""

    result: object
    seconds: float
    size: int


def write_small_report(run: signal_reid.training.run_directory.RunDirectory, *_: object) -> Path:
    """In place of the page at the end of a training, whose pictures are drawn for longer than the model is trained.

    The operation `report` draws the whole page.
    """
    write_atomically(run.report, b"<!doctype html></html>\n" * 4000)
    return run.report


@dataclass
class Cell:
    """An operation on a stage of its own, which every try sets anew.

    Attributes:
        operation: what is asked for.
        template: the directory that stages are copies of.
        stage: where the operation works.
        errors: the file of what it says.
        usual: what it does undisturbed.
        draw: of moments and places.
        tries: how often a fault strikes.
        outcomes: of the tries: done, refused (one line and exit code 2) or ended (by a signal).
    """

    operation: Operation
    template: Path
    stage: Path
    errors: Path
    usual: Undisturbed
    draw: random.Random
    tries: int = 3
    outcomes: Counter[str] = field(default_factory=Counter)

    def set_stage(self) -> None:
        """Put in place what the operation works on."""
        set_stage(self.stage, self.template, self.operation)

    def start(
        self, prepare: Prepare | None = None, settings: tuple[str, ...] = (), arguments: list[str] | None = None
    ) -> machine.Running:
        """Start the operation; settings are given to it where it takes some."""
        self.errors.write_text("")
        asked = [*(arguments or self.operation.arguments), *(settings if self.operation.overrides else ())]
        return machine.start(asked, self.stage, self.errors, partial(_prepare, prepare))

    def moment(self) -> float:
        """Seconds after its start at which the operation most likely still works."""
        return self.draw.uniform(0, self.usual.seconds)

    def judge(self, end: machine.End, *, ended: tuple[int, ...] = (), words: tuple[str, ...] = ("",)) -> str:
        """What became of a try.

        Args:
            end: how the process ended.
            ended: exit codes that the fault itself gives.
            words: one of which the line of a refusal holds.

        Raises:
            NotSurvivedError: it is none of the outcomes that are allowed.
        """
        if end.code in ended:
            outcome = "ended"
        elif end.code == 0:
            outcome = "done"
        else:
            lines = [line for line in end.errors.strip().splitlines() if line.startswith("error: ")]
            good = end.code == 2 and len(lines) == 1 and "Traceback" not in end.errors
            if not good or not any(word in lines[0] for word in words):
                raise NotSurvivedError(str(end))
            outcome = "refused"
        self.outcomes[outcome] += 1
        return outcome

    def check_files(self, *, may_be_left: bool = False) -> None:
        """Every file is whole, and where the process could clean up nothing unfinished is left."""
        read_all(self.stage)
        left = unfinished(self.stage / "out")
        if left and not may_be_left:
            raise NotSurvivedError(f"left behind: {', '.join(left)}")

    def check_result(self) -> None:
        """The outcome is that of an undisturbed run."""
        if self.operation.result(self.stage) != self.usual.result:
            raise NotSurvivedError("the result differs from an undisturbed one")

    def recover(self, *, may_be_left: bool = False) -> None:
        """The next command works, and all is as if nothing had been."""
        if not self.operation.is_done(self.stage):
            end = self.start(arguments=self.operation.next_command(self.stage)).wait()
            if end.code:
                raise NotSurvivedError(f"the next command failed: {end}")
        self.check_files(may_be_left=may_be_left)
        self.check_result()


def _prepare(more: Prepare | None) -> None:
    signal_reid.program.report_on_training = write_small_report
    if more is not None:
        more()
