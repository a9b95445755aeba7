"""Commands that train: `demo`, `train`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from signal_reid.cli.app import ConfigOption, Overrides, console, keep_memory
from signal_reid.cli.errors import shared_work
from signal_reid.config import Config, ConfigError, load_config
from signal_reid.runtime.device import choose_device
from signal_reid.runtime.troubles import TRAINING_MEMORY, explained
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
    with told_how_to_go_on(RunDirectory(loaded.output), "the same command"), explained(TRAINING_MEMORY):
        run_demo(loaded, console)


@contextmanager
def told_how_to_go_on(run: RunDirectory, command: str | None = None) -> Iterator[None]:
    """Say at Ctrl-C what goes on with what was begun in a run directory: by default `train --resume`."""
    try:
        yield
    except KeyboardInterrupt:
        if run.checkpoint.exists():
            command = command or f"signal-reid train --resume {shlex.quote(str(run.path))}"
            console.print(f"interrupted; {command} goes on from the last checkpoint")
        else:
            console.print("interrupted before the first checkpoint; the same command begins anew")
        raise


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
    from signal_reid.program import report as write_report
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
                page = write_report(loaded.output, given, console=console)  # the process that was to write it ended
                console.print(f"report in {page}")
            return
        keep_memory(choose_device(loaded.training.device, processes))
        try:
            with told_how_to_go_on(RunDirectory(loaded.output)):
                run_training(loaded, resume=resumed, console=console, processes=processes, asked=asked)
                processes.wait()  # so that somebody can tell of a process 0 that is lost while it writes the report
        except TrainingStopped as stopped:
            console.print(str(stopped))
            raise typer.Exit(REQUEUE) from None
