"""Runs beside each other: in which settings, curves, results and queries they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from signal_reid.config import Config, flat_settings
from signal_reid.figures import Table
from signal_reid.report.contents import QueryResult, RankedList, Value
from signal_reid.report.history import Curve, Row, is_finite, is_loss, label
from signal_reid.report.page import percent

SUMMARY = ("mAP", "rank1", "rank5", "rank10", "mINP")
"""The numbers of an evaluation, as `metrics.jsonl` names them."""
ABSENT = "n/a"
OWN = ("output",)
"""Settings that say where a run lies, not what it is."""
COUNTED = ("evaluation.protocol", "evaluation.reranking", "evaluation.normalize")
"""Settings that decide what a number means."""


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """What a comparison knows of one run.

    Args:
        name: of the run, unique among those compared.
        config: of the run.
        history: rows of `metrics.jsonl`.
        results: of every query; none where the run could not be evaluated.
        gallery: the gallery's sample names and identities, by which it is the same gallery.
        loss_titles: names of the method's losses for readers.
        missing: why there are no results, and what would give them, in one line.
    """

    name: str
    config: Config
    history: Sequence[Row]
    results: Sequence[QueryResult] = ()
    gallery: Sequence[tuple[str, int]] = ()
    loss_titles: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""

    @property
    def evaluations(self) -> list[Row]:
        """The rows of `metrics.jsonl` that an evaluation wrote, by epoch."""
        return [row for row in self.history if row["kind"] == "eval"]


@dataclass(frozen=True)
class QueryChange:
    """How a run ranks the queries of another, queries by their index.

    Args:
        name: of the run.
        gained, lost: queries that have a match at rank 1 in this run alone, and in the other run alone.
        better, worse: queries with a larger and with a smaller average precision than in the other run.
        mean: of the difference of average precision over the queries that have a match.
    """

    name: str
    gained: tuple[int, ...]
    lost: tuple[int, ...]
    better: tuple[int, ...]
    worse: tuple[int, ...]
    mean: float


@dataclass(frozen=True, eq=False)
class Disagreement:
    """A query on which runs differ, and its ranked list in each.

    Args:
        name, identity, camera: of the query; the camera as its files name it.
        lists: each with the name of its run.
        gap: the largest difference of average precision between two runs.
    """

    name: str
    identity: int
    camera: str
    lists: Sequence[tuple[str, RankedList]]
    gap: float

    @property
    def average_precision(self) -> float:
        """The worst of the runs', by which the page orders."""
        return min(ranked.average_precision for _, ranked in self.lists)


def setting_differences(runs: Sequence[ComparedRun]) -> Table:
    """The settings in which runs differ, a column for each run; a setting that a run's method has not is n/a."""
    settings = [flat_settings(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [_as_yaml(each[key]) if key in each else ABSENT for each in settings]
        if key not in OWN and len(set(values)) > 1:
            rows.append([key, *values])
    return Table("Settings that differ", ["setting", *(run.name for run in runs)], rows)


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def results_table(runs: Sequence[ComparedRun]) -> Table:
    """Each run's last evaluation and its best one by mAP, in percent, as `metrics.jsonl` has them."""
    rows: list[list[Value]] = []
    for run in runs:
        last, best = final_and_best(run.history)
        row: list[Value] = [run.name, last["epoch"] if last else ABSENT, *_percents(last, SUMMARY)]
        rows.append([*row, *_percents(best, ("mAP", "rank1")), best["epoch"] if best else ABSENT])
    header = ["in percent", "epoch", *map(label, SUMMARY), "best mAP", "its R-1", "its epoch"]
    return Table("Results of the last epoch, and of the best one on the test set", header, rows)


def final_and_best(history: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """The last row of an evaluation, and the first of those with the largest mAP; none where there is none.

    An evaluation whose mAP is not a number, which the row has as null, is none.
    """
    rows = [row for row in history if row["kind"] == "eval" and is_finite(row.get("mAP"))]
    return (rows[-1], max(rows, key=lambda row: row["mAP"])) if rows else (None, None)


def _percents(row: Row | None, names: Sequence[str]) -> list[Value]:
    return [percent(row[name]) if row is not None and is_finite(row.get(name)) else ABSENT for name in names]


def caveats(runs: Sequence[ComparedRun]) -> list[str]:
    """What forbids to read numbers of runs beside each other, and what is missing, a line each."""
    lines = []
    datasets = {run.name: run.config.data.dataset for run in runs}
    if len(set(datasets.values())) > 1:
        listed = ", ".join(f"{name} on {dataset}" for name, dataset in datasets.items())
        lines.append(f"The runs are on different data sets ({listed}): their numbers cannot be compared.")
    for key in COUNTED:
        values = {run.name: flat_settings(run.config)[key] for run in runs}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"The runs differ in {key} ({listed}): their numbers do not measure the same.")
    lines += [f"{run.name} is left out of the queries: {run.missing}" for run in runs if run.missing]
    evaluated = [run for run in runs if run.results]
    others = [run for run in evaluated if not same_queries(evaluated[0], run)]
    if others:
        listed = ", ".join(run.name for run in others)
        lines.append(f"The queries of {listed} are not compared: they are not those of {evaluated[0].name}.")
    return lines


def comparable(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs whose queries can be compared: those ranked like the first that has results."""
    evaluated = [run for run in runs if run.results]
    return [run for run in evaluated if same_queries(evaluated[0], run)]


def same_queries(one: ComparedRun, other: ComparedRun) -> bool:
    """Whether two runs ranked the same gallery for the same queries, under one protocol."""
    first, second = flat_settings(one.config), flat_settings(other.config)
    return (
        first["data.dataset"] == second["data.dataset"]
        and first["evaluation.protocol"] == second["evaluation.protocol"]
        and [(r.name, r.identity, r.camera) for r in one.results]
        == [(r.name, r.identity, r.camera) for r in other.results]
        and list(one.gallery) == list(other.gallery)
    )


def query_change(reference: ComparedRun, other: ComparedRun) -> QueryChange:
    """What another run's ranking gains and loses of the reference's; queries without a match count in neither."""
    pairs = [
        (i, theirs, ours)
        for i, (theirs, ours) in enumerate(zip(reference.results, other.results, strict=True))
        if theirs.match_ranks and ours.match_ranks
    ]
    differences = [(i, ours.average_precision - theirs.average_precision) for i, theirs, ours in pairs]
    first = [(i, theirs.match_ranks[0] == 1, ours.match_ranks[0] == 1) for i, theirs, ours in pairs]
    return QueryChange(
        other.name,
        gained=tuple(i for i, was, now in first if now and not was),
        lost=tuple(i for i, was, now in first if was and not now),
        better=tuple(i for i, difference in differences if difference > 0),
        worse=tuple(i for i, difference in differences if difference < 0),
        mean=math.fsum(difference for _, difference in differences) / len(differences) if differences else math.nan,
    )


def change_table(reference: ComparedRun, changes: Sequence[QueryChange]) -> Table:
    """Numbers of queries gained and lost by each run."""
    rows: list[list[Value]] = [
        [
            change.name,
            len(change.gained),
            len(change.lost),
            len(change.better),
            len(change.worse),
            f"{100 * change.mean:+.2f}",
        ]
        for change in changes
    ]
    header = [
        f"against {reference.name}",
        "gained at rank 1",
        "lost at rank 1",
        "better AP",
        "worse AP",
        "mean AP, points",
    ]
    return Table(f"Queries gained and lost against {reference.name}", header, rows)


def disagreements(runs: Sequence[ComparedRun], count: int) -> list[int]:
    """The queries on which runs differ most in average precision, the largest difference first, equal ones by index."""
    gaps = []
    for i, results in enumerate(zip(*(run.results for run in runs), strict=True)):
        precisions = [result.average_precision for result in results]
        gap = max(precisions) - min(precisions)  # NaN or not by chance where one of them is
        if gap > 0 and not any(map(math.isnan, precisions)):
            gaps.append((gap, i))
    return [i for _, i in sorted(gaps, key=lambda pair: (-pair[0], pair[1]))][:count]


def overlaid_curves(runs: Sequence[ComparedRun]) -> list[tuple[str, str, list[Curve]]]:
    """Title, label of the horizontal axis and a curve for each run of what at least one of them measured.

    The total loss and the retrieval are always among them, another loss where several runs have it, the learning rate
    where it differs.
    """
    charts = [("Loss", "step", _overlaid(runs, "total", "step"))]
    for name in dict.fromkeys(name for run in runs for row in run.history for name in row if is_loss(name)):
        curves = _overlaid(runs, name, "step")
        if name not in (*SUMMARY, "total") and len(curves) > 1:
            titles = {key: title for run in runs for key, title in run.loss_titles.items()}
            charts.append((f"Loss {label(name, titles)}", "step", curves))
    charts += [(label(name), "epoch", _overlaid(runs, name, "epoch")) for name in ("mAP", "rank1")]
    rates = _overlaid(runs, "learning_rate", "epoch")
    if len({(tuple(curve.x), tuple(curve.y)) for curve in rates}) > 1:
        charts.append(("Learning rate", "epoch", rates))
    return [chart for chart in charts if chart[2]]


def _overlaid(runs: Sequence[ComparedRun], name: str, x: str) -> list[Curve]:
    """The run's values of one number by step or by epoch; losses of a run too short for steps are its epochs' means."""
    curves = []
    for run in runs:
        rows = [row for row in run.history if name in row and (x == "epoch" or row["kind"] == "step")]
        rows = rows or [row for row in run.history if name in row]
        points = [(float(row[x]), float(row[name])) for row in rows if is_finite(row[name])]
        if points:
            curves.append(Curve(run.name, [at for at, _ in points], [value for _, value in points]))
    return curves


def change_rows(runs: Sequence[ComparedRun]) -> list[list[Value]]:
    """A header and a row for each query, for a CSV file: average precision and first match's rank in each run."""
    header: list[Value] = ["query", "identity", "camera"]
    header += [f"{name} of {run.name}" for run in runs for name in ("average_precision", "first_match_rank")]
    rows = [header]
    for results in zip(*(run.results for run in runs), strict=True):
        row: list[Value] = [results[0].name, results[0].identity, results[0].camera]
        for result in results:
            row.append("" if math.isnan(result.average_precision) else result.average_precision)
            row.append(result.match_ranks[0] if result.match_ranks else "")
        rows.append(row)
    return rows
