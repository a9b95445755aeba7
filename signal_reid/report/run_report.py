"""The report of a run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from signal_reid.config import Config, dump_config
from signal_reid.data import Dataset, Sample, decode
from signal_reid.evaluation import rank_gallery
from signal_reid.evaluation.evaluator import Evaluation, reranking_parameters
from signal_reid.methods.base import Method
from signal_reid.methods.registry import METHODS
from signal_reid.ops import dispatch
from signal_reid.report.contents import Headline, RankedList, RunReport
from signal_reid.report.html import write_report
from signal_reid.report.selection import choose_queries, ranked_lists
from signal_reid.runtime import environment
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically
from signal_reid.runtime.text import read_json
from signal_reid.training.run_directory import RunDirectory

QUERIES = 8
RESULTS = 10


def report_on_training(run: RunDirectory, config: Config, dataset: Dataset, evaluation: Evaluation) -> Path:
    """Write `report.html`: what the run measured, its curves, and ranked lists of the evaluation.

    Args:
        run: its metrics and baselines are read.
        config: of the run.
        dataset: the images of the ranked lists are read from it.
        evaluation: of the weights to report on.
    """
    method: type[Method] = METHODS.get(config.model.method)
    baselines = load_baselines(run)
    train, query, gallery = len(dataset.train), len(dataset.query), len(dataset.gallery)
    write_report(
        run.report,
        RunReport(
            title=f"{method.title} on {dataset.name}",
            loss_titles=method.loss_titles,
            dataset=[
                ("data set", dataset.name),
                (f"training {dataset.unit}", f"{train} of {dataset.num_train_identities} identities"),
                (
                    f"query {dataset.unit}",
                    f"{query} of {len({sample.identity for sample in dataset.query})} identities",
                ),
                (
                    f"gallery {dataset.unit}",
                    f"{gallery} of {len({sample.identity for sample in dataset.gallery})} identities",
                ),
                ("cameras", dataset.num_cameras),
                ("protocol", _protocol(config.evaluation.protocol)),
            ],
            headlines=[*baselines, Headline.of("after training", evaluation.metrics)],
            history=run.rows(),
            ranked_lists=_ranked_lists(config, dataset, evaluation),
            config=dump_config(config),
            environment=[*environment.describe().items(), *dispatch.describe().items()],
            modalities=dataset.modalities,
        ),
    )
    return run.report


def _protocol(name: str) -> str:
    return (
        "the query itself is dropped"
        if name == "none"
        else f"gallery items of the query's identity and {name} are dropped"
    )


def save_baselines(run: RunDirectory, baselines: Sequence[Headline]) -> None:
    """Keep what the trained model is compared with, for this report and later ones."""
    write_atomically(run.baselines, json.dumps([vars(row) for row in baselines], indent=2).encode())


def load_baselines(run: RunDirectory) -> list[Headline]:
    """What `save_baselines` kept; nothing where nothing was kept.

    Raises:
        InputError: the file is damaged.
    """
    if not run.baselines.is_file():
        return []
    try:
        rows = read_json(run.baselines.read_bytes())
        return [Headline(**row) for row in rows]
    except (ValueError, TypeError):
        raise InputError(f"{run.baselines}: damaged, not the results that a run is compared with") from None


def _ranked_lists(config: Config, dataset: Dataset, evaluation: Evaluation) -> list[RankedList]:
    chosen = choose_queries(evaluation.metrics.average_precision, QUERIES)
    ranking = rank_gallery(
        evaluation.query,
        evaluation.gallery,
        config.evaluation.protocol,
        top=RESULTS,
        normalize=config.evaluation.normalize,
        reranking=reranking_parameters(config),
    )
    return ranked_lists(
        chosen,
        evaluation.query,
        evaluation.gallery,
        ranking,
        evaluation.metrics.average_precision,
        lambda index: _images(dataset.query[index], config),
        lambda index: _images(dataset.gallery[index], config),
        names=[sample.name for sample in dataset.query],
    )


def _images(sample: Sample, config: Config) -> Tensor:
    return decode(sample, config.data.image_size, "bilinear")
