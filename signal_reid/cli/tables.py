"""The tables that `eval` prints."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from signal_reid.config import EvaluationConfig
from signal_reid.evaluation.detailed import Details
from signal_reid.evaluation.evaluator import Evaluation
from signal_reid.evaluation.missing import STANDS_FOR_ABSENT, MissingTable


def summary_table(title: str, evaluation: Evaluation, settings: EvaluationConfig) -> Table:
    """The numbers of an evaluation; where something is done to them at test, the plain ones stand apart."""
    summary = evaluation.metrics.summary()
    if evaluation.plain is None:
        table = _table(title, [], list(summary))
        table.add_row(*_percent(summary))
        return table
    done = {"flip": settings.flip, "query expansion": settings.expansion, "re-ranking": settings.reranking}
    table = _table(title, ["ranking"], list(summary))
    table.add_row("plain", *_percent(evaluation.plain.summary()))
    table.add_row("with " + ", ".join(name for name, wanted in done.items() if wanted), *_percent(summary))
    return table


def missing_table(found: MissingTable) -> Table:
    """A row for each setting, after the complete one, and the mean where there is one."""
    complete = found.complete.metrics.summary()
    table = _table(STANDS_FOR_ABSENT[found.absent], ["query lacks", "gallery lacks"], list(complete))
    table.add_row("nothing", "nothing", *_percent(complete))
    for setting, metrics in found.rows:
        if not any(found.missing(side) for side in setting):
            continue  # the complete one, which any-to-any lists too
        lacks = (Text(", ".join(found.missing(side)) or "nothing") for side in setting)
        table.add_row(*lacks, *_percent(metrics.summary()))
    if found.mean is not None:
        table.add_section()
        table.add_row("mean where both", "lack the same", *_percent(found.mean))
    return table


def details_tables(details: Details) -> list[Table]:
    """Precision at k and the interval of mAP; thresholds at false-accept rates; the numbers of each camera."""
    interval, curve = details.interval, details.curve
    percent = f"{interval.level:.0%} of {interval.resamples} resamples of the queries"
    first = _table(f"mAP in {percent}", [], ["from", "to", *(f"P@{k}" for k in details.PRECISIONS)])
    precisions = (details.ranks.precision_at(k) for k in details.PRECISIONS)
    first.add_row(*(f"{value:.1%}" for value in (interval.low, interval.high, *precisions)))
    title = f"{curve.genuine} genuine and {curve.impostors} impostor pairs; area under the ROC {curve.area:.4f}"
    points = _table(title, [], ["false accepts", "squared distance", "true accepts"])
    for rate, point in details.points():
        threshold = "none" if point.threshold is None else f"{point.threshold:.4f}"
        points.add_row(f"at most {rate:g}", threshold, f"{point.true_accept_rate:.1%}")
    cameras = _table("queries by camera", ["camera"], ["queries", "valid", "mAP", "rank1"])
    for name, group in details.cameras():
        numbers = ("n/a" if value is None else f"{value:.1%}" for value in (group.mAP, group.rank1))
        cameras.add_row(Text(name), str(group.queries), str(group.valid_queries), *numbers)
    return [first, points, cameras]


def _table(title: str, texts: list[str], numbers: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _percent(numbers: dict[str, float]) -> list[str]:
    return [f"{value:.1%}" for value in numbers.values()]
