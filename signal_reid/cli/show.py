"""The command that draws pictures: `show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table as ShownTable
from rich.text import Text

from signal_reid.cli.app import ConfigOption, Overrides, WeightsOption, console, keep_memory
from signal_reid.figures import Table, picture_path
from signal_reid.runtime.device import choose_device
from signal_reid.runtime.files import check_writable, is_standard_output

ROWS = 40
"""Rows of a table that are printed."""


def show(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="The picture; a name that is none lists all.")],
    weights: WeightsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: .png, .svg or .pdf.")],
    config: ConfigOption = None,
    before: Annotated[
        str | None,
        typer.Option(help="Weights to draw beside them, or `pretrained`: the model as its training began."),
    ] = None,
    query: Annotated[list[str] | None, typer.Option(help="A sample's name; may be given several times.")] = None,
    count: Annotated[int | None, typer.Option(help="How many samples, where none are named.")] = None,
    limit: Annotated[int | None, typer.Option(help="Test samples that a distribution is taken over, at most.")] = None,
    width: Annotated[
        Literal["column", "page"] | None, typer.Option(help="Of a two-column paper; by default what suits the picture.")
    ] = None,
    order: Annotated[
        Literal["spread", "worst", "best", "disagreement"] | None,
        typer.Option(help="ranking: which queries come first; spread from best to worst where nothing is asked."),
    ] = None,
    camera: Annotated[
        str | None, typer.Option(help="ranking: only queries of this camera, named as the files name it, such as cam1.")
    ] = None,
    identity: Annotated[int | None, typer.Option(help="ranking: only queries of this identity.")] = None,
    top: Annotated[int | None, typer.Option(help="ranking: gallery items of each query.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="ranking: weights of another run, and the queries on which both disagree.")
    ] = None,
    map_: Annotated[
        Literal["pca", "tsne", "umap"], typer.Option("--map", help="embedding: how features come onto the plane.")
    ] = "pca",
    overrides: Overrides = None,
) -> None:
    """Draw what a trained model sees, as a picture for a paper; prints the numbers in it."""
    from signal_reid.program import show as draw
    from signal_reid.report.pictures import Request

    output = picture_path(output)
    check_writable(output)
    keep_memory(choose_device("auto"))
    request = Request(tuple(query or ()), count, limit, width, order, camera, identity, top, against, map_)
    picture = draw(what, weights, config, overrides or (), before=before, request=request, console=console)
    picture.save(output)
    taken = is_standard_output(output)
    wide = Console(stderr=taken)
    if not wide.is_terminal:
        wide = Console(stderr=taken, width=200)  # a file has no edge to break lines at
    for table in picture.tables:
        wide.print(_printed(table))
    for note in picture.notes:
        typer.echo(note, err=taken)
    console.print(f"{picture.title} in {output}")


def _printed(table: Table) -> ShownTable:
    printed = ShownTable(title=table.title, title_justify="left")
    for i, name in enumerate(table.header):
        printed.add_column(name, justify="right" if i else "left")
    for row in table.rows[:ROWS]:
        texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row)
        printed.add_row(*map(Text, texts))  # a name in brackets is no markup
    if len(table.rows) > ROWS:
        printed.caption = f"{ROWS} of {len(table.rows)} rows; the page and picture.tables in Python have them all"
    return printed
