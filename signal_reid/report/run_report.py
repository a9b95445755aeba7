"""The report of a run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from signal_reid.config import Config, dump_config
from signal_reid.data import Dataset
from signal_reid.evaluation.evaluator import Evaluation
from signal_reid.methods.base import Method
from signal_reid.ops import dispatch
from signal_reid.report.contents import Headline, PagePicture, RunReport
from signal_reid.report.embedding import (
    EmbeddingPicture,
    embedding_map,
    map_picture,
    similarities,
    similarities_picture,
)
from signal_reid.report.evaluated import keep_features
from signal_reid.report.history import best_row
from signal_reid.report.html import write_report
from signal_reid.report.page_pictures import page_picture, sample_pictures
from signal_reid.report.picture_samples import TestSamples
from signal_reid.report.pictures import draw_models
from signal_reid.report.ranking import reader
from signal_reid.report.selection import Ranking, choose_queries
from signal_reid.runtime import environment
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically
from signal_reid.runtime.text import read_json
from signal_reid.training.run_directory import RunDirectory

QUERIES = 24
"""Queries whose ranked lists are shown, spread from the best to the worst."""
RESULTS = 10
PICTURED = 8
"""Queries among these that the method's pictures are drawn of."""
SAMPLES = 64
"""Test samples that a distribution is taken over: running a large model on a CPU takes about a second for each."""


def report_on_training(
    run: RunDirectory, config: Config, dataset: Dataset, evaluation: Evaluation, model: Method
) -> Path:
    """Write `report.html`: what the run measured, its curves, ranked lists of the evaluation and pictures of the model.

    The features are kept beside it, so that runs can be compared without running their models.

    Args:
        run: its metrics and baselines are read.
        config: of the run.
        dataset: the images of the ranked lists and pictures are read from it.
        evaluation: of the weights to report on.
        model: with these weights.
    """
    keep_features(run, config, dataset, evaluation)
    baselines = load_baselines(run)
    names = [[sample.name for sample in samples] for samples in (dataset.query, dataset.gallery)]
    ranking = Ranking.of(evaluation, config, RESULTS, *names)
    chosen = choose_queries(evaluation.metrics.average_precision, QUERIES)
    images = [reader(samples, config.data.image_size) for samples in (dataset.query, dataset.gallery)]
    pictured = [names[0][i] for i in chosen[:: max(1, len(chosen) // PICTURED)]]
    seen, by_query = pictures_of(model, config, dataset, pictured)
    drawn = zip(chosen, ranking.lists(chosen, *images), strict=True)
    lists = [replace(found, pictures=by_query.get(names[0][i], ())) for i, found in drawn]
    write_report(
        run.report,
        RunReport(
            title=f"{model.title} on {dataset.name}",
            loss_titles=model.loss_titles,
            dataset=facts_of(dataset, config),
            headlines=[
                *baselines,
                *_best(run, config),
                *_plain(evaluation),
                Headline.of(_measured(config), evaluation.metrics),
            ],
            history=run.rows(),
            ranked_lists=lists,
            queries=ranking.results(),
            pictures=[*feature_pictures(evaluation, config), *seen],
            config=dump_config(config),
            environment=[*environment.describe().items(), *dispatch.describe().items()],
            modalities=dataset.modalities,
        ),
    )
    return run.report


def facts_of(dataset: Dataset, config: Config) -> list[tuple[str, str | int]]:
    """What a reader wants to know of the data set."""
    train, query, gallery = len(dataset.train), len(dataset.query), len(dataset.gallery)
    return [
        ("data set", dataset.name),
        (f"training {dataset.unit}", f"{train} of {dataset.num_train_identities} identities"),
        (f"query {dataset.unit}", f"{query} of {len({sample.identity for sample in dataset.query})} identities"),
        (f"gallery {dataset.unit}", f"{gallery} of {len({sample.identity for sample in dataset.gallery})} identities"),
        ("cameras", dataset.num_cameras),
        ("best epoch", f"chosen on {_chosen_on(config)}"),
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


def feature_pictures(evaluation: Evaluation, config: Config) -> list[PagePicture]:
    """The map of the gallery's features, and the similarities of pairs; a reason where there is no map."""
    try:
        found = embedding_map(evaluation.gallery)
    except InputError as error:
        return [PagePicture(EmbeddingPicture.title, str(error), notes=[f"There is no such picture: {error}."])]
    pairs = similarities(evaluation.query, evaluation.gallery, config.evaluation.protocol)
    return [page_picture(map_picture(found), "map"), page_picture(similarities_picture(pairs), "similarities")]


def pictures_of(
    model: Method, config: Config, dataset: Dataset, queries: Sequence[str]
) -> tuple[list[PagePicture], dict[str, list[PagePicture]]]:
    """What the method has to show of a model: of the whole data set, and of each of some queries by its name.

    A picture with layers is shown of each query, with switches; another one once, of the first and the last query. A
    picture that cannot be says why.
    """
    general: list[PagePicture] = []
    by_query: dict[str, list[PagePicture]] = {}
    device, precision = next(model.parameters()).device, config.evaluation.precision
    ends = queries[:: max(1, len(queries) - 1)]
    few, every = (TestSamples(config, dataset, device, names, limit=SAMPLES) for names in (ends, queries))
    for name, picture in model.pictures().items():
        try:
            drawn = draw_models(picture, {"": model}, few, device, precision)
        except InputError as error:
            general.append(PagePicture(picture.title, str(error), notes=[f"{str(error)[0].upper()}{str(error)[1:]}."]))
            continue
        if not drawn.layers:
            general.append(page_picture(drawn, name))
            continue
        drawn = draw_models(picture, {"": model}, every, device, precision)
        for query, shown in sample_pictures(drawn).items():
            by_query.setdefault(query, []).extend(shown)
    return general, by_query


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
