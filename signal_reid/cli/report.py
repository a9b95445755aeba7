"""The command `report`: the page of a run, of weights alone, or of several runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from signal_reid.cli.app import ConfigOption, console, keep_memory
from signal_reid.config import ConfigError
from signal_reid.runtime.device import choose_device

MEGABYTE = 1_000_000

Runs = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]... [KEY=VALUE]...", help="Run directories, then settings.")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", "-w", help="A checkpoint, ours or the authors': a page without a run.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="The page of weights, by default beside them with the suffix .html, or of several runs, by default "
        "comparison.html beside the first.",
    ),
]
Queries = Annotated[
    list[str] | None, typer.Option(help="A query to list, instead of --count; may be given several times.")
]
Count = Annotated[int | None, typer.Option(help="How many queries to list; 24 of one run, 12 of several.")]
Order = Annotated[
    Literal["spread", "worst", "best"] | None,
    typer.Option(help="Which queries: spread from the best to the worst, where nothing is asked."),
]
Top = Annotated[int, typer.Option(help="Gallery items of each query.")]
Limit = Annotated[int | None, typer.Option(help="Test samples that a distribution is taken over, at most; 64.")]
Before = Annotated[
    str | None,
    typer.Option(
        help="Weights to draw beside the run's, or `pretrained`: the model as training began, which a run's report "
        "draws anyway where the backbone's weights are at hand."
    ),
]
SizeLimit = Annotated[float, typer.Option(metavar="MB", help="The page is at most so large.")]


def report(
    runs: Runs = None,
    weights: Weights = None,
    config: ConfigOption = None,
    output: Output = None,
    query: Queries = None,
    count: Count = None,
    order: Order = None,
    top: Top = 10,
    limit: Limit = None,
    before: Before = None,
    size_limit: SizeLimit = 10.0,
) -> None:
    """Write a run's report again, from its metrics and its last weights; of several runs, a page that compares them.

    The best weights take their place where the run is not finished, or chose them on held-out identities.
    --weights gives the same page of weights without a run, such as the authors'.
    """
    from signal_reid import program
    from signal_reid.report.request import PageRequest

    given = runs or []
    overrides = [text for text in given if "=" in text and not Path(text).exists()]
    directories = [Path(text) for text in given if text not in overrides]
    of_one = {"--query": query, "--order": order, "--limit": limit, "--before": before}
    _check(directories, weights, config, output, [name for name, value in of_one.items() if value is not None])
    if not 0 < size_limit < math.inf:
        raise ConfigError(f"--size-limit must be a number of megabytes above 0, got {size_limit}")
    request = PageRequest(
        count=count,
        top=top,
        size_limit=round(size_limit * MEGABYTE),
        queries=tuple(query or ()),
        order=order or "spread",
        limit=PageRequest.limit if limit is None else limit,
        before=before,
    )
    if len(directories) > 1:
        page = program.compare(directories, output, overrides, request=request, console=console)
        console.print(f"comparison in {page}")
        return
    keep_memory(choose_device("auto"))
    if weights is not None:
        page = program.report_weights(weights, output, config, overrides, request=request, console=console)
    else:
        page = program.report(directories[0], overrides, request=request, console=console)
    console.print(f"report in {page}")


def _check(
    directories: list[Path], weights: Path | None, config: str | None, output: Path | None, of_one: list[str]
) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: one line that says what to leave out.
    """
    if not directories and weights is None:
        raise ConfigError("report needs a run directory, or --weights FILE")
    if directories and weights is not None:
        raise ConfigError(f"report takes run directories or --weights, got {directories[0]} and {weights}")
    if config is not None and weights is None:
        raise ConfigError("--config is for --weights; a run has a configuration")
    if output is not None and len(directories) == 1:
        raise ConfigError("--output is for several runs or --weights; the report of one run is report.html in it")
    if of_one and len(directories) > 1:
        raise ConfigError(f"{of_one[0]} is for the report of one run, got {len(directories)} runs")
