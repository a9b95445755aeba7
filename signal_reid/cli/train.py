"""Commands that train or report on training: `demo`, `train`, `report`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from signal_reid.cli.app import ConfigOption, Overrides, console, keep_memory
from signal_reid.cli.errors import shared_work
from signal_reid.config import Config, ConfigError, load_config
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.evaluation.trained import load_trained
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.device import choose_device
from signal_reid.runtime.files import check_writable
from signal_reid.runtime.troubles import TRAINING_MEMORY
from signal_reid.training.interruption import REQUEUE, TrainingStopped, stop_requests
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.training_state import is_finished


def demo(
    output: Annotated[Path, typer.Option(help="The run directory; must not hold a run.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Synthesize a data set, train a small model from scratch, evaluate before and after, write a report."""
    from signal_reid.demo import run_demo

    loaded = load_config("demo", [*(overrides or []), f"output={output}"])
    keep_memory(choose_device(loaded.training.device))
    run_demo(loaded, console)


def train(
    config: ConfigOption = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue the run in this directory; auto, with --config: that of output=, or begin it."),
    ] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Short for training.compile=false.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train a model; writes configuration, metrics, checkpoints and report to the run directory (`output`).

    Processes that torchrun starts share every batch. SIGTERM and SIGUSR1 save and end with exit code 75.
    """
    from signal_reid.program import train as run_training

    auto = resume == Path("auto")
    if (config is None) != (resume is not None and not auto):
        raise ConfigError("train takes either --config NAME_OR_FILE, perhaps with --resume auto, or --resume DIRECTORY")
    given = [*(overrides or []), *(["training.compile=false"] if no_compile else [])]

    def load() -> tuple[Config, bool]:
        if resume is None or auto:
            loaded = load_config(str(config), given)
            return loaded, auto and RunDirectory(loaded.output).checkpoint.exists()
        run = RunDirectory(resume)
        run.check(resume=True)
        return load_config(run.config, [*given, f"output={resume}"]), True

    # Processes on other machines may not see the run directory.
    with stop_requests() as asked, shared_work(TRAINING_MEMORY, named=True) as processes:
        loaded, resumed = processes.from_first(load)
        processes.be_patient(timedelta(minutes=loaded.training.timeout_minutes))
        if auto and resumed and processes.from_first(lambda: is_finished(RunDirectory(loaded.output), loaded)):
            console.print(f"{loaded.output} is finished")
            if processes.first and not RunDirectory(loaded.output).report.exists():
                _report_on(Path(loaded.output), given)  # the process that was to write it ended
            return
        keep_memory(choose_device(loaded.training.device, processes))
        try:
            run_training(loaded, resume=resumed, console=console, processes=processes, asked=asked)
            processes.wait()  # so that somebody can tell of a process 0 that is lost while it writes the report
        except TrainingStopped as stopped:
            console.print(str(stopped))
            raise typer.Exit(REQUEUE) from None


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN... [KEY=VALUE]...", help="Run directories, then settings.")],
    output: Annotated[
        Path | None, typer.Option(help="The page of several runs; by default comparison.html beside the first.")
    ] = None,
) -> None:
    """Write a run's report again, from its metrics and its last weights; of several runs, a page that compares them.

    The best weights take their place where the run is not finished, or chose them on held-out identities.
    """
    overrides = [text for text in runs if "=" in text and not Path(text).exists()]
    directories = [Path(text) for text in runs if text not in overrides]
    if not directories:
        raise ConfigError("report needs a run directory")
    if len(directories) > 1:
        from signal_reid.program import compare

        console.print(f"comparison in {compare(directories, output, overrides, console=console)}")
        return
    if output is not None:
        raise ConfigError("--output is for several runs; the report of one is report.html in its directory")
    _report_on(directories[0], overrides)


def _report_on(run: Path, overrides: list[str]) -> None:
    from signal_reid.report.run_report import report_on_training

    directory = RunDirectory(run)
    directory.check(resume=True)
    check_writable(directory.report)
    trained = load_trained(directory.weights, directory.config, [*overrides, f"output={run}"])
    keep_memory(trained.device)
    console.print(trained.report.summary())
    with progress_bar("evaluating", console) as show:
        evaluation = Evaluator(trained.config, trained.dataset, trained.device, show).run(trained.model, show)
    path = report_on_training(directory, trained.config, trained.dataset, evaluation, trained.model)
    console.print(f"report in {path}")
