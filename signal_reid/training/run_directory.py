"""The directory of a run: resolved configuration, metrics, checkpoints, report."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from signal_reid.config import Config, dump_config, flat_settings, load_config
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically
from signal_reid.runtime.ownership import owned
from signal_reid.runtime.spare_memory import require_memory_of_threads
from signal_reid.runtime.text import is_number, is_whole, read_json, shown

MAY_CHANGE_ON_RESUME = (
    "output",
    "data.root",
    "data.workers",
    "data.cache",
    "training.device",
    "training.log_every",
    "training.checkpoint_every",
    "training.compile",
    "training.cuda_graphs",
    "training.gradient_checkpointing",
    "training.accumulation",
    "training.checkpoint_minutes",
    "training.timeout_minutes",
    "evaluation",
)
"""Settings that leave the sequence of losses as it is, up to rounding."""

MOST_NAMED = 20
"""Damaged lines of the metrics, and epochs and steps without any, that are named; of others their number is said."""


class RunDirectory:
    """Where a run writes; every file is replaced whole, and a metrics row is appended whole or not at all.

    Holds `config.yml`, `metrics.jsonl`, `checkpoint.pt` (to resume), `last.safetensors`, `best.safetensors`,
    `tensorboard/` where TensorBoard is installed, `baselines.json` of the demo, `evaluated.safetensors` (features of
    the query and the gallery), `report.html`, and `run.log` (what the program said); `run.lock` while a process works
    in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.tensorboard = self.path / "tensorboard"
        self.evaluated = self.path / "evaluated.safetensors"
        self.baselines = self.path / "baselines.json"
        self.report = self.path / "report.html"
        self.log = self.path / "run.log"

    def owned(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
        """Keep every other process out for a block; `say` is told where the disk knows no locks.

        Raises:
            InUseError: another process works in it.
        """
        return owned(self.path, say)

    @property
    def weights(self) -> Path:
        """What a report is on: the last weights; the best ones of a run that is not finished or chose them honestly."""
        honest = self.config.is_file() and load_config(self.config).training.validation > 0
        return self.last if self.last.exists() and not honest else self.best

    def check(self, resume: bool) -> None:
        """Refuse to overwrite a run, or to continue one that is not there.

        Raises:
            FileExistsError: the directory holds a run that could be resumed.
            FileNotFoundError: there is no run to resume.
        """
        if resume and not self.config.is_file():
            raise FileNotFoundError(f"{self.path} holds no run (no {self.config.name})")
        if not resume and self.checkpoint.exists():
            raise FileExistsError(
                f"{self.path} already holds a run; continue it with train --resume {self.path}, "
                "or choose another output="
            )

    def start(self, config: Config) -> None:
        """Begin a new run."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.metrics, b"")
        write_atomically(self.config, dump_config(config).encode())

    def resume(
        self, config: Config, after_epoch: int, say: Callable[[str], None], after_step: int | None = None
    ) -> None:
        """Continue a run: forget what was measured after the checkpoint, and what cannot be read.

        Args:
            config: of the run, perhaps with other settings.
            after_epoch: the last that the checkpoint covers whole.
            say: told what is wrong with the metrics.
            after_step: the last that the checkpoint covers of the next epoch; none: it ends with an epoch.

        Damaged or missing rows are named to `say`: the losses to come do not depend on them.

        Raises:
            ValueError: a setting differs that would change the losses.
        """
        changed = self.changed(config)
        was, now = changed.get("schedule.epochs", (0, 0))
        longer = was <= after_epoch < now
        """Whether a finished run goes on for more epochs, which changes none of those that are done."""
        for key, (was, now) in changed.items():
            if not key.startswith(MAY_CHANGE_ON_RESUME) and not (longer and key == "schedule.epochs"):
                raise InputError(f"{key} was {was} in {self.path} and cannot be {now} on resume")
        rows, damage = self._whole_rows()
        kept = [row for row in rows if _covered(row, after_epoch, after_step)]
        for problem in damage[:MOST_NAMED]:
            say(f"{self.metrics}: {problem}; left out")
        if len(damage) > MOST_NAMED:
            say(f"{self.metrics}: {len(damage) - MOST_NAMED} more lines are damaged; left out")
        for lacking in _missing(kept, after_epoch):
            say(f"{self.metrics}: the numbers of {lacking} are missing; the training lacks nothing")
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
        write_atomically(self.config, dump_config(config).encode())
        if longer:
            epochs = config.schedule.epochs
            say(f"{self.path} was finished; epoch {after_epoch + 1} has the rate of a schedule of {epochs} epochs")
            self.last.unlink(missing_ok=True)  # it is no longer what the run ended with

    def changed(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """The settings that differ between the run and a configuration: what they are in each, None where absent."""
        old, new = flat_settings(load_config(self.config)), flat_settings(config)
        both = {key: (old.get(key), new.get(key)) for key in {**old, **new}}
        return {key: (was, now) for key, (was, now) in both.items() if was != now}

    def finished(self, epochs: int) -> bool:
        """Whether the run has its last weights of that many epochs, and the test set was measured after them."""
        evaluated = [row["epoch"] for row in self.rows() if row["kind"] in ("eval", "validation")]
        return self.last.is_file() and epochs in evaluated and self.measured()

    def measured(self) -> bool:
        """Whether the test set was measured, as far as the rows that can be read tell."""
        return any(row["kind"] == "eval" for row in self._whole_rows()[0])

    def rows(self) -> list[dict[str, Any]]:
        """The metrics written so far; an unfinished last line is left out.

        Raises:
            InputError: another line is not a row; resuming the run leaves it out.
        """
        rows, damage = self._whole_rows()
        if damage:
            raise InputError(f"{self.metrics}: damaged, {damage[0]}")
        return rows

    def _whole_rows(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows that can be read, and what is wrong with which other line; an unfinished last line is nothing."""
        rows, damage = [], []
        content = self.metrics.read_bytes() if self.metrics.is_file() else b""
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                rows.append(_row(line))
            except ValueError as error:
                damage.append(f"line {number} is {error}")
        return rows, damage


def _row(line: bytes) -> dict[str, Any]:
    """A row as `MetricsLog` writes it."""
    try:
        row = read_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        raise ValueError("not a row of metrics (no kind)")
    if not is_whole(row.get("epoch")) or not is_whole(row.get("step")):
        raise ValueError("not a row of metrics (no epoch or step)")
    for name, value in row.items():
        if name != "kind" and value is not None and not is_number(value):
            raise ValueError(f"not a row of metrics ({shown(name)} is no number)")
    return row


def _covered(row: Mapping[str, Any], after_epoch: int, after_step: int | None) -> bool:
    """Whether a checkpoint knows of what a row measured; see `RunDirectory.resume`."""
    if row["epoch"] <= after_epoch:
        return True
    # The epoch's own row is written after its last step, by which a checkpoint within it may stand.
    return after_step is not None and row["kind"] == "step" and row["step"] <= after_step


def _missing(rows: Sequence[Mapping[str, Any]], after_epoch: int) -> Iterator[str]:
    """What the rows up to an epoch leave out: epochs, and steps where neighbours lie further apart than on either side.

    How far apart rows of steps are may differ from one start of the run to the next.
    """
    present = {row["epoch"] for row in rows if row["kind"] == "epoch"}
    if epochs := [str(epoch) for epoch in range(1, after_epoch + 1) if epoch not in present]:
        yield f"epoch {_first_of(epochs)}"
    steps = [row["step"] for row in rows if row["kind"] == "step"]
    apart = [after - before for before, after in pairwise(steps)]
    if gaps := [
        f"between {steps[at]} and {steps[at + 1]}"
        for at in range(1, len(apart) - 1)
        if apart[at] > max(apart[at - 1], apart[at + 1])
    ]:
        yield f"steps {_first_of(gaps)}"


def _first_of(names: Sequence[str]) -> str:
    more = len(names[MOST_NAMED:])
    return f"{', '.join(names[:MOST_NAMED])}{f' and {more} more' if more else ''}"


class NoLog(AbstractContextManager["NoLog"]):
    """Writes nothing: what a process has that does not own the run directory."""

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def flush(self) -> None:
        """Nothing to flush."""

    def write(self, kind: str, epoch: int, step: int, **numbers: Any) -> None:
        """Leave the row out."""


class MetricsLog:
    """Writes each row of numbers as a JSON line, and to TensorBoard where that is installed."""

    def __init__(self, run: RunDirectory, step: int, say: Callable[[str], None]):
        self._run = run
        self._file = run.metrics.open("ab", buffering=0)
        self._board = _summary_writer(run.tensorboard, step, say)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            # An error that is on its way already says more than the one it causes here.
            with contextlib.suppress(OSError) if kind else _naming(self._run.tensorboard):
                self._board.close()

    def flush(self) -> None:
        """Return when every row so far is on the disk, so that a checkpoint never knows more than the metrics.

        Raises:
            OSError: the disk refuses.
        """
        with _naming(self._run.metrics):
            os.fsync(self._file.fileno())

    def write(self, kind: str, epoch: int, step: int, **numbers: Any) -> None:
        """Append one row: `kind` is `step`, `epoch` or `eval`; epochs and steps count from 1.

        Raises:
            OSError: the disk is full or refuses; no part of the row is left.
        """
        known = {name: None if _is_not_finite(value) else value for name, value in numbers.items()}  # JSON has no NaN
        row = json.dumps({"kind": kind, "epoch": epoch, "step": step, **known}, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        with _naming(self._run.metrics):
            try:
                if self._file.write(row) != len(row):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(size)
                raise
        if self._board is not None:
            with _naming(self._run.tensorboard):
                for name, value in numbers.items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(f"{kind}/{name}", value, step)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an error of writing the name of the file, which the operating system leaves out."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _summary_writer(path: Path, step: int, say: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("TensorBoard is not installed, metrics go to metrics.jsonl alone (pip install 'signal-reid[tensorboard]')")
        return None
    if any("\ud800" <= character <= "\udfff" for character in str(path)):
        say("TensorBoard writes to no path that is not UTF-8, metrics go to metrics.jsonl alone")
        return None
    require_memory_of_threads(1)  # which writes the events
    with _naming(path):
        return SummaryWriter(str(path), purge_step=step + 1)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
