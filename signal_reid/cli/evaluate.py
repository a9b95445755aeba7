"""Commands for trained weights: `eval`, `extract` and `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from signal_reid.cli.app import ConfigOption, Overrides, WeightsOption, console, keep_memory
from signal_reid.cli.errors import shared_work
from signal_reid.cli.index import ImagesOption, PatternsOption, extract_images
from signal_reid.evaluation import save_features
from signal_reid.evaluation.evaluator import Evaluator, Extractor
from signal_reid.evaluation.features import features_path
from signal_reid.evaluation.trained import load_trained
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.files import check_writable, write_atomically


def evaluate(
    weights: WeightsOption,
    config: ConfigOption = None,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
    overrides: Overrides = None,
) -> None:
    """Evaluate weights on the query and gallery of a dataset; processes that torchrun starts share the work."""
    with shared_work() as processes:
        if output is not None:
            check_writable(output)
        trained = load_trained(weights, config, overrides or (), processes)
        keep_memory(trained.device)
        console.print(trained.report.summary())
        with progress_bar("evaluating", console) as show:
            evaluator = Evaluator(trained.config, trained.dataset, trained.device, show, processes)
            metrics = evaluator.run(trained.model, show).metrics
        if not processes.first:
            return
        summary = metrics.summary()
        if output is not None:
            write_atomically(output, json.dumps({**summary, "cmc": metrics.cmc.tolist()}, indent=2).encode() + b"\n")
        table = Table(title=f"{trained.dataset.name}, {metrics.num_valid_queries} queries", title_justify="left")
        for name in summary:
            table.add_column(name, justify="right")
        table.add_row(*(f"{value:.1%}" for value in summary.values()))
        Console().print(table)


def extract(
    weights: WeightsOption,
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    config: ConfigOption = None,
    split: Annotated[Literal["train", "query", "gallery"], typer.Option(help="Which images.")] = "gallery",
    images: ImagesOption = None,
    pattern: PatternsOption = None,
    overrides: Overrides = None,
) -> None:
    """Write features with names, of a split with its labels or of images; processes of torchrun share the work."""
    with shared_work() as processes:
        output = features_path(output)
        check_writable(output)
        if images is not None:
            extract_images(weights, output, images, pattern, config, overrides, processes)
            return
        trained = load_trained(weights, config, overrides or (), processes)
        keep_memory(trained.device)
        console.print(trained.report.summary())
        samples = getattr(trained.dataset, split)
        with progress_bar(f"extracting {split}", console) as show:
            features = Extractor(trained.config, samples, trained.device, show, processes).run(trained.model, show)
        if not processes.first:
            return
        save_features(output, features, [sample.name for sample in samples])
        console.print(f"{len(features)} features of {features.features.shape[1]} numbers in {output}")


def export(
    weights: WeightsOption,
    output: Annotated[Path, typer.Option(help="The file to write: safetensors in our naming, .pth in another.")],
    naming: Annotated[str, typer.Option(help="ours, or another program's that the method knows (authors).")] = "ours",
    config: ConfigOption = None,
    overrides: Overrides = None,
) -> None:
    """Write weights of any supported naming again, in ours or another program's; needs no data set."""
    from signal_reid.program import export as write

    check_writable(output)
    console.print(write(weights, output, naming, config, overrides or ()))
    console.print(f"{weights} exported to {output} ({naming} naming)")
