"""Commands that train or report on training: `demo`, `train`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from signal_reid.cli.app import ConfigOption, Overrides, console, keep_memory
from signal_reid.config import ConfigError, load_config
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.evaluation.trained import load_trained
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.device import choose_device
from signal_reid.runtime.files import check_writable
from signal_reid.training.run_directory import RunDirectory


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
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Short for training.compile=false.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train a model; writes configuration, metrics, checkpoints and report to the run directory (`output`)."""
    from signal_reid.program import train as run_training

    if (config is None) == (resume is None):
        raise ConfigError("train takes either --config NAME_OR_FILE or --resume RUN_DIRECTORY")
    given = [*(overrides or []), *(["training.compile=false"] if no_compile else [])]
    if resume is not None:
        run = RunDirectory(resume)
        run.check(resume=True)
        loaded = load_config(run.config, [*given, f"output={resume}"])
    else:
        loaded = load_config(str(config), given)
    keep_memory(choose_device(loaded.training.device))
    run_training(loaded, resume=resume is not None, console=console)


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
