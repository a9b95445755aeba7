"""What the commands `train` and `eval` do, for scripts."""

from __future__ import annotations

from rich.console import Console

from signal_reid.config import Config
from signal_reid.report.run_report import report_on_training
from signal_reid.runtime.console import make_console
from signal_reid.training.loop import TrainingResult
from signal_reid.training.loop import train as run_training
from signal_reid.training.run_directory import RunDirectory


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> TrainingResult:
    """Train a model as `signal-reid train` does: the run directory, `config.output`, with its report.

    See `signal_reid.training.train` for the arguments and the errors.
    """
    console = console or make_console()
    result = run_training(config, resume=resume, console=console)
    path = report_on_training(RunDirectory(config.output), config, result.dataset, result.evaluation)
    console.print(f"best mAP {result.best_mAP:.1%} in epoch {result.best_epoch}; report in {path}")
    return result
