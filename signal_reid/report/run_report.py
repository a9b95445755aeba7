"""The report of a run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from signal_reid.checkpoints import LoadReport
from signal_reid.config import Config, dump_config
from signal_reid.data import Dataset
from signal_reid.evaluation.evaluator import Evaluation
from signal_reid.evaluation.trained import Trained
from signal_reid.methods.base import Method
from signal_reid.ops import dispatch
from signal_reid.report.contents import Headline, RunReport
from signal_reid.report.evaluated import keep_features
from signal_reid.report.history import best_row
from signal_reid.report.html import write_report
from signal_reid.report.model_pictures import (
    DrawnModels,
    feature_pictures,
    models_to_draw,
    pictures_of,
    without_before,
)
from signal_reid.report.ranking import Wanted, choose, reader
from signal_reid.report.request import USUAL, PageRequest
from signal_reid.report.selection import Ranking, evenly
from signal_reid.runtime import environment
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically
from signal_reid.runtime.text import escaped, read_json
from signal_reid.training.run_directory import RunDirectory

QUERIES = 24
"""Queries whose ranked lists are shown, where no other number is asked for."""
PICTURED = 8
"""Queries among these that the method's pictures are drawn of."""
CHOSEN = "best epoch"
"""The fact that only a run has."""


def report_on_training(
    run: RunDirectory,
    config: Config,
    dataset: Dataset,
    evaluation: Evaluation,
    model: Method,
    request: PageRequest = USUAL,
    loaded: LoadReport | None = None,
) -> Path:
    """Write `report.html`: what the run measured, its curves, ranked lists of the evaluation and pictures of the model.

    The features are kept beside it, so that runs can be compared without running their models.

    Args:
        run: its metrics and baselines are read.
        config: of the run.
        dataset: the images of the ranked lists and pictures are read from it.
        evaluation: of the weights to report on.
        model: with these weights.
        request: how much to show.
        loaded: what the weights gave the model, where they were loaded.

    Raises:
        InputError: no query of a name that was asked for, or a page that cannot keep its size.
        FileNotFoundError, CheckpointError: see `load_beside`, where weights are asked for as those before training.
    """
    keep_features(run, config, dataset, evaluation)
    drawn = models_to_draw(config, model, dataset, request.before, f"report {run.path}")
    report = _page_of(config, dataset, evaluation, drawn, request, loaded)
    measured = Headline.of(_measured(config), evaluation.metrics)
    headlines = [*load_baselines(run), *_best(run, config), *_plain(evaluation), measured]
    report = replace(report, headlines=headlines, history=run.rows())
    write_report(run.report, report, request.size_limit)
    return run.report


def report_on_weights(
    path: Path, weights: Path, trained: Trained, evaluation: Evaluation, request: PageRequest = USUAL
) -> None:
    """Write the same page of weights without a run, such as another program's: all but what a training measures.

    Args:
        path: the page.
        weights: the file, which the page names.
        trained: the model with these weights.
        evaluation: of it.
        request: how much to show.

    Raises:
        InputError, FileNotFoundError, CheckpointError: see `report_on_training`.
    """
    config, model, name = trained.config, trained.model, escaped(weights.name)
    command = f"report --weights {weights}"
    drawn = without_before(model, command)
    if request.before is not None:
        drawn = models_to_draw(config, model, trained.dataset, request.before, command)
    report = _page_of(config, trained.dataset, evaluation, drawn, request, trained.report)
    headlines = [*_plain(evaluation), Headline.of(name, evaluation.metrics)]
    of_file = [("weights", name), *(("loaded", line) for line in trained.report.summary().splitlines())]
    facts = [*of_file, *(fact for fact in report.dataset if fact[0] != CHOSEN)]
    report = replace(report, title=f"{report.title}: {name}", headlines=headlines, dataset=facts)
    write_report(path, report, request.size_limit)


def _page_of(
    config: Config,
    dataset: Dataset,
    evaluation: Evaluation,
    drawn: DrawnModels,
    request: PageRequest,
    loaded: LoadReport | None,
) -> RunReport:
    """What both pages show: of the data set, the ranking and the model."""
    names = [sample.name for sample in dataset.query]
    ranking = Ranking.of(evaluation, config, request.top, dataset)
    results = ranking.results()
    chosen = choose(results, Wanted(request.queries, request.order, count=request.count or QUERIES))
    images = [reader(samples, config.data.image_size) for samples in (dataset.query, dataset.gallery)]
    pictured = [names[i] for i in evenly(chosen, PICTURED)]
    seen, by_query = pictures_of(drawn, config, dataset, pictured, request.limit, loaded)
    lists = zip(chosen, ranking.lists(chosen, *images), strict=True)
    return RunReport(
        title=f"{drawn.model.title} on {dataset.name}",
        loss_titles=drawn.model.loss_titles,
        dataset=facts_of(dataset, config),
        ranked_lists=[replace(found, pictures=by_query.get(names[i], ())) for i, found in lists],
        queries=results,
        pictures=[*feature_pictures(evaluation, config, dataset), *seen],
        config=dump_config(config),
        environment=[*environment.describe().items(), *dispatch.describe().items()],
        modalities=dataset.modalities,
        seen_note=drawn.note if by_query else "",
    )


def facts_of(dataset: Dataset, config: Config) -> list[tuple[str, str | int]]:
    """What a reader wants to know of the data set."""
    train, query, gallery = len(dataset.train), len(dataset.query), len(dataset.gallery)
    return [
        ("data set", dataset.name),
        (f"training {dataset.unit}", f"{train} of {dataset.num_train_identities} identities"),
        (f"query {dataset.unit}", f"{query} of {len({sample.identity for sample in dataset.query})} identities"),
        (f"gallery {dataset.unit}", f"{gallery} of {len({sample.identity for sample in dataset.gallery})} identities"),
        ("cameras", dataset.cameras_in_words),
        (CHOSEN, f"chosen on {_chosen_on(config)}"),
        ("protocol", _protocol(config.evaluation.protocol)),
    ]


def _plain(evaluation: Evaluation) -> list[Headline]:
    """The numbers without flip, expansion and re-ranking, where these are set."""
    return [] if evaluation.plain is None else [Headline.of("plain ranking", evaluation.plain)]


def _best(run: RunDirectory, config: Config) -> list[Headline]:
    """The numbers of the best epoch where the test set chose it and it is not the last, which is reported on."""
    best = best_row(run.rows())
    if best is None or config.training.validation or best["epoch"] == config.schedule.epochs:
        return []
    try:
        numbers = [best[name] for name in ("mAP", "rank1", "rank5", "rank10")]
        return [Headline(f"best epoch ({best['epoch']}), chosen on the test set", *numbers)]
    except (KeyError, TypeError):  # a row of another version
        return []


def _measured(config: Config) -> str:
    return "best epoch, chosen on held-out identities" if config.training.validation else "after training"


def _chosen_on(config: Config) -> str:
    if config.training.validation:
        return f"held-out training identities ({config.training.validation:.0%}); the test set had no part in it"
    return "the test set, as the published numbers do"


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
