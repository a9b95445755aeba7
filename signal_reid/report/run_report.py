"""The report of a run directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from signal_reid.config import Config, dump_config
from signal_reid.data import Dataset, Sample, decode
from signal_reid.evaluation.evaluator import Evaluation
from signal_reid.methods.base import Method
from signal_reid.methods.registry import METHODS
from signal_reid.ops import dispatch
from signal_reid.report.contents import Headline, RunReport
from signal_reid.report.html import write_report
from signal_reid.report.selection import Ranking, choose_queries
from signal_reid.runtime import environment
from signal_reid.runtime.files import write_atomically
from signal_reid.training.run_directory import RunDirectory

QUERIES = 24
"""Queries whose ranked lists are shown, spread from the best to the worst."""
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
    baselines = json.loads(run.baselines.read_text()) if run.baselines.is_file() else []
    train, query, gallery = len(dataset.train), len(dataset.query), len(dataset.gallery)
    names = [[sample.name for sample in samples] for samples in (dataset.query, dataset.gallery)]
    ranking = Ranking.of(evaluation, config, RESULTS, *names)
    chosen = choose_queries(evaluation.metrics.average_precision, QUERIES)
    write_report(
        run.report,
        RunReport(
            title=f"{method.title} on {dataset.name}",
            loss_titles=method.loss_titles,
            dataset=[
                ("data set", dataset.name),
                ("training triplets", f"{train} of {dataset.num_train_identities} identities"),
                ("query triplets", f"{query} of {len({sample.identity for sample in dataset.query})} identities"),
                ("gallery triplets", f"{gallery} of {len({sample.identity for sample in dataset.gallery})} identities"),
                ("cameras", dataset.num_cameras),
                ("protocol", f"gallery items of the query's identity and {config.evaluation.protocol} are dropped"),
            ],
            headlines=[*(Headline(**row) for row in baselines), Headline.of("after training", evaluation.metrics)],
            history=run.rows(),
            ranked_lists=ranking.lists(chosen, _images(dataset.query, config), _images(dataset.gallery, config)),
            queries=ranking.results(),
            config=dump_config(config),
            environment=[*environment.describe().items(), *dispatch.describe().items()],
            modalities=dataset.modalities,
        ),
    )
    return run.report


def save_baselines(run: RunDirectory, baselines: Sequence[Headline]) -> None:
    """Keep what the trained model is compared with, for this report and later ones."""
    write_atomically(run.baselines, json.dumps([vars(row) for row in baselines], indent=2).encode())


def _images(samples: Sequence[Sample], config: Config) -> Callable[[int], Tensor]:
    return lambda index: decode(samples[index], config.data.image_size, "bilinear")
