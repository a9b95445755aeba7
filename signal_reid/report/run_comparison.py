"""The comparison of run directories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from signal_reid.config import Config, load_config
from signal_reid.data import DataError, Dataset, open_dataset
from signal_reid.evaluation.evaluator import Evaluation, Evaluator
from signal_reid.evaluation.trained import load_trained
from signal_reid.methods.base import Method
from signal_reid.methods.registry import METHODS
from signal_reid.report.comparison import ComparedRun, Disagreement, comparable, disagreements
from signal_reid.report.comparison_page import Comparison, Lead, write_comparison
from signal_reid.report.evaluated import keep_features, recall_features
from signal_reid.report.ranking import reader
from signal_reid.report.request import USUAL, PageRequest
from signal_reid.report.selection import Ranking
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.errors import InputError, UserError
from signal_reid.training.run_directory import RunDirectory

QUERIES = 12
"""Queries whose ranked lists stand beside each other, where no other number is asked for."""


@dataclass(frozen=True, eq=False)
class _Ranked:
    """A run with what its ranked lists are drawn from; none where it could not be evaluated."""

    run: ComparedRun
    dataset: Dataset | None = None
    ranking: Ranking | None = None


def compare_runs(
    paths: Sequence[str | Path],
    output: str | Path,
    overrides: Sequence[str],
    console: Console,
    *,
    names: Sequence[str] = (),
    title: str = "",
    leads: Sequence[Lead] = (),
    notes: Sequence[str] = (),
    request: PageRequest = USUAL,
) -> Path:
    """Write a page of runs beside each other; the features of a run are read from it or computed and kept there.

    Args:
        paths: run directories, at least two; the others are compared with the first.
        output: the page to write.
        overrides: settings on top of each run's, such as `data.root=/data`.
        console: for what is missing and for progress.
        names: of the runs; by default of their directories.
        title, leads, notes: see `Comparison`.
        request: how many ranked lists of how many items, and how large the page may be.

    Raises:
        FileNotFoundError: a directory that holds no run.
        InputError: fewer than two runs, one run twice, a damaged one, or a page that cannot keep its size.
    """
    if len({Path(path).resolve() for path in paths}) < max(2, len(paths)):
        raise InputError(f"a comparison takes two runs or more, each once, got {', '.join(map(str, paths))}")
    directories = [RunDirectory(path) for path in paths]
    for directory in directories:
        directory.check(resume=True)
    names = names or unique_names(directory.path for directory in directories)
    pairs = zip(names, directories, strict=True)
    ranked = [_ranked(name, run, overrides, request.top, console) for name, run in pairs]
    runs = [each.run for each in ranked]
    for run in runs:
        if run.missing:
            console.print(f"{run.name}: {run.missing}")
    modalities = next((each.dataset.modalities for each in ranked if each.dataset is not None), ())
    title = title or f"Runs beside each other: {', '.join(names)}"
    found = _disagreements(ranked, request.count or QUERIES)
    write_comparison(output, Comparison(title, runs, found, modalities, leads, notes), request.size_limit)
    return Path(output)


def unique_names(paths: Iterable[Path]) -> list[str]:
    """Names of different directories: their last parts, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, 1 + max(map(len, parts))):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _ranked(name: str, directory: RunDirectory, overrides: Sequence[str], top: int, console: Console) -> _Ranked:
    config = load_config(directory.config, [*overrides, f"output={directory.path}"])
    method: type[Method] = METHODS.get(config.model.method)
    history = directory.rows()
    try:
        config, dataset, evaluation = _evaluated(directory, config, overrides, console)
    except (UserError, FileNotFoundError) as error:
        missing = " ".join(str(error).split())
        if isinstance(error, (DataError, FileNotFoundError)):
            missing += "; data.root=DIRECTORY behind the runs says where the data set is"
        return _Ranked(ComparedRun(name, config, history, loss_titles=method.loss_titles, missing=missing))
    ranking = Ranking.of(evaluation, config, top, dataset)
    gallery = [(sample.name, sample.identity) for sample in dataset.gallery]
    run = ComparedRun(name, config, history, ranking.results(), gallery, method.loss_titles)
    return _Ranked(run, dataset, ranking)


def _evaluated(
    directory: RunDirectory, config: Config, overrides: Sequence[str], console: Console
) -> tuple[Config, Dataset, Evaluation]:
    if not directory.weights.is_file():
        resume = f"signal-reid train --resume {directory.path}"
        raise InputError(f"it has no weights ({directory.last.name}, {directory.best.name}); {resume} trains them")
    dataset = open_dataset(config.data.dataset, config.data.root)
    kept = recall_features(directory, config, dataset)
    if kept is not None:
        return config, dataset, kept
    trained = load_trained(directory.weights, directory.config, [*overrides, f"output={directory.path}"])
    with progress_bar(f"evaluating {directory.path.name}", console) as show:
        evaluation = Evaluator(trained.config, trained.dataset, trained.device, show).run(trained.model, show)
    keep_features(directory, trained.config, trained.dataset, evaluation)
    return trained.config, trained.dataset, evaluation


def _disagreements(ranked: Sequence[_Ranked], count: int) -> list[Disagreement]:
    """At most `count` queries on which the comparable runs differ most, with a ranked list of each."""
    compared = comparable([each.run for each in ranked])
    if len(compared) < 2:
        return []
    chosen = disagreements(compared, count)
    lists = []
    for each in ranked:
        if each.run in compared and each.ranking is not None and each.dataset is not None:
            size = each.run.config.data.image_size
            images = [reader(samples, size) for samples in (each.dataset.query, each.dataset.gallery)]
            lists.append((each.run.name, each.ranking.lists(chosen, *images)))
    found = []
    for place, i in enumerate(chosen):
        query = compared[0].results[i]
        of_runs = [(name, of_run[place]) for name, of_run in lists]
        precisions = [ranked_list.average_precision for _, ranked_list in of_runs]
        gap = max(precisions) - min(precisions)
        found.append(Disagreement(query.name, query.identity, query.camera, of_runs, gap))
    return found
