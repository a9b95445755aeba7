"""Commands for trained weights: `eval`, `extract` and `export`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from signal_reid.cli.app import ConfigOption, Overrides, WeightsOption, console, keep_memory
from signal_reid.cli.errors import shared_work
from signal_reid.cli.index import ImagesOption, PatternsOption, extract_images
from signal_reid.cli.tables import details_tables, missing_table, summary_table
from signal_reid.config import ConfigError
from signal_reid.data.progress import ProgressCallback
from signal_reid.evaluation import save_features
from signal_reid.evaluation.detailed import details_of
from signal_reid.evaluation.evaluator import Evaluation, Evaluator, Extractor
from signal_reid.evaluation.features import features_path
from signal_reid.evaluation.missing import MissingEvaluator, MissingTable, Setting, parse_settings
from signal_reid.evaluation.trained import Trained, load_trained
from signal_reid.report.query_files import check_query_file, write_query_file
from signal_reid.report.selection import Ranking
from signal_reid.report.tables import query_rows
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.distributed import Processes
from signal_reid.runtime.files import check_writable, is_standard_output, write_atomically


def evaluate(
    weights: WeightsOption,
    config: ConfigOption = None,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
    missing: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="Measure with modalities missing, too: all (every choice, the same in query and gallery), "
            "any-to-any (every pair), NAME,... (in both), or 'query=NAME,...;gallery=NAME,...'. May be repeated.",
        ),
    ] = None,
    details: Annotated[
        bool,
        typer.Option(
            "--details",
            help="Tell precision at k, an interval of mAP, thresholds at false-accept rates and each camera's "
            "numbers (in JSON each identity's, too).",
        ),
    ] = False,
    queries: Annotated[
        Path | None, typer.Option(help="Write the result of each query to this file, .csv or .parquet.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Evaluate weights on the query and gallery of a dataset; processes that torchrun starts share the work."""
    with shared_work() as processes:
        if output is not None:
            check_writable(output)
        if queries is not None:
            check_query_file(queries)
        trained = load_trained(weights, config, overrides or (), processes)
        settings = parse_settings(missing or (), trained.dataset.modalities)
        keep_memory(trained.device)
        console.print(trained.report.summary())
        with progress_bar("evaluating", console) as show:
            evaluation, lacking = _evaluated(trained, settings, show, processes)
        if not processes.first:
            return
        metrics = evaluation.metrics
        numbers: dict[str, object] = {**metrics.summary(), "cmc": metrics.cmc.tolist()}
        if evaluation.plain is not None:
            numbers["plain"] = evaluation.plain.summary()
        title = f"{trained.dataset.name}, {metrics.num_valid_queries} queries"
        tables = [summary_table(title, evaluation, trained.config.evaluation)]
        if lacking is not None:
            numbers["missing"] = lacking.as_json()
            tables.append(missing_table(lacking))
        if details:
            more = details_of(evaluation, trained.config, trained.dataset.camera_name)
            numbers["details"] = more.as_json()
            tables += details_tables(more)
        if queries is not None:
            write_query_file(queries, query_rows(Ranking.of(evaluation, trained.config, 1, trained.dataset).results()))
        if output is not None:
            write_atomically(output, json.dumps(numbers, indent=2).encode() + b"\n")
        written = [path for path in (output, queries) if path is not None]
        shown = Console(stderr=any(map(is_standard_output, written)))  # nothing stands between what was asked for
        for table in tables:
            shown.print(table)


def _evaluated(
    trained: Trained, settings: Sequence[Setting], show: ProgressCallback, processes: Processes
) -> tuple[Evaluation, MissingTable | None]:
    """The plain evaluation, and the table of settings with modalities missing where some are asked for."""
    config = trained.config
    if not settings:
        evaluator = Evaluator(config, trained.dataset, trained.device, show, processes)
        return evaluator.run(trained.model, show), None
    options = [name for name in ("flip", "expansion", "reranking") if getattr(config.evaluation, name)]
    if options:
        raise ConfigError(f"--missing measures plain rankings, without evaluation.{options[0]}")
    found = MissingEvaluator(config, trained.dataset, settings, trained.device, show, processes)
    table = found.run(trained.model, show)
    return table.complete, table


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
