"""The command `ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as ShownTable

from signal_reid.cli.app import ConfigOption, Overrides, console, keep_memory
from signal_reid.config import ConfigError, load_config
from signal_reid.runtime.device import choose_device
from signal_reid.runtime.troubles import TRAINING_MEMORY, explained

SHOWN = ("variant", "mAP", "R-1", "R-5", "R-10", "best mAP")
"""Columns that are printed; the files and the page have all."""


def ablate(
    config: ConfigOption = None,
    variants: Annotated[
        Path | None, typer.Option(help="A YAML file of names and lists of key=value; else what the method offers.")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="'NAME: key=value key=value'; may be given several times.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2; by default the configuration's alone.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="A directory for all runs; by default `ablation` inside `output`.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train variants of a configuration and compare them; called again, it goes on where it was interrupted."""
    from signal_reid.ablation import parse_variant, read_variants, run_ablation
    from signal_reid.report.ablation_table import ablation_table

    if config is None:
        raise ConfigError("ablate needs --config NAME_OR_FILE")
    chosen = [*(read_variants(variants) if variants is not None else []), *map(parse_variant, variant or [])]
    given = overrides or []
    keep_memory(choose_device(load_config(config, given).training.device))
    try:
        with explained(TRAINING_MEMORY):
            result = run_ablation(config, given, chosen, _seeds(seeds), output, console=console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where it was")
        raise
    table = ablation_table(result.variants)
    shown = ShownTable(title=table.title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = [table.header.index(name) for name in SHOWN]
    for place in columns:
        shown.add_column(table.header[place], justify="right" if place else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*(str(row[place]) for place in columns))
    Console().print(shown)
    console.print(f"page in {result.page}; ablation.csv, runs.csv, ablation.tex and ablation.md beside it")


def _seeds(text: str | None) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")] if text is not None else []
    except ValueError:
        raise ConfigError(f"seeds must be whole numbers such as 0,1,2, got {text!r}") from None
