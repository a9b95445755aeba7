"""The directory of a run: resolved configuration, metrics, checkpoints, report."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from signal_reid.config import Config, dump_config, load_config
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically
from signal_reid.runtime.text import is_whole, read_json

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
    "evaluation",
)
"""Settings that leave the sequence of losses as it is, up to rounding."""


class RunDirectory:
    """Where a run writes; every file is replaced whole, and a metrics row is appended whole or not at all.

    Holds `config.yml`, `metrics.jsonl`, `checkpoint.pt` (to resume), `last.safetensors`, `best.safetensors`,
    `tensorboard/` where TensorBoard is installed, `baselines.json` of the demo, and `report.html`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.tensorboard = self.path / "tensorboard"
        self.baselines = self.path / "baselines.json"
        self.report = self.path / "report.html"

    def check(self, resume: bool) -> None:
        """Refuse to overwrite a run, or to continue one that is not there.

        Raises:
            FileExistsError: the directory holds a run that could be resumed.
            FileNotFoundError: there is no run to resume.
        """
        if resume and not self.config.is_file():
            raise FileNotFoundError(f"{self.path} holds no run to resume (no {self.config.name})")
        if not resume and self.checkpoint.exists():
            raise FileExistsError(
                f"{self.path} already holds a run; continue it with --resume {self.path}, or choose another output="
            )

    def start(self, config: Config) -> None:
        """Begin a new run."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.metrics, b"")
        write_atomically(self.config, dump_config(config).encode())

    def resume(self, config: Config, after_epoch: int) -> None:
        """Continue a run: forget what was measured after the checkpoint's epoch.

        Raises:
            ValueError: a setting differs that would change the losses.
        """
        changed = _differences(load_config(self.config).model_dump(), config.model_dump())
        forbidden = [key for key in changed if not key.startswith(MAY_CHANGE_ON_RESUME)]
        if forbidden:
            key = forbidden[0]
            raise InputError(f"{key} was {changed[key][0]} in {self.path} and cannot be {changed[key][1]} on resume")
        rows = [row for row in self.rows() if row["epoch"] <= after_epoch]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())
        write_atomically(self.config, dump_config(config).encode())

    def rows(self) -> list[dict[str, Any]]:
        """The metrics written so far; an unfinished last line is left out.

        Raises:
            InputError: another line is no row.
        """
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_bytes().split(b"\n")[:-1]
        return [self._row(number, line) for number, line in enumerate(lines, start=1)]

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = read_json(line)
        except ValueError as error:
            raise InputError(f"{self.metrics}: damaged, a line is not JSON (line {number}: {error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            raise InputError(f"{self.metrics}: damaged, line {number} is not a row of metrics (no kind)")
        if not is_whole(row.get("epoch")) or not is_whole(row.get("step")):
            raise InputError(f"{self.metrics}: damaged, line {number} is not a row of metrics (no epoch or step)")
        return row


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

    def write(self, kind: str, epoch: int, step: int, **numbers: Any) -> None:
        """Append one row: `kind` is `step`, `epoch` or `eval`; epochs and steps count from 1.

        Raises:
            OSError: the disk is full or refuses; no part of the row is left.
        """
        row = json.dumps({"kind": kind, "epoch": epoch, "step": step, **numbers}).encode() + b"\n"
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
    with _naming(path):
        return SummaryWriter(str(path), purge_step=step + 1)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    changed: dict[str, tuple[Any, Any]] = {}
    for key, value in new.items():
        if isinstance(value, dict):
            changed |= _differences(old[key], value, f"{prefix}{key}.")
        elif old[key] != value:
            changed[prefix + key] = (old[key], value)
    return changed
