"""The page of several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from signal_reid.figures import Table
from signal_reid.report.charts import line_chart
from signal_reid.report.comparison import (
    ComparedRun,
    Disagreement,
    caveats,
    change_rows,
    change_table,
    comparable,
    disagreements,
    overlaid_curves,
    query_change,
    results_table,
    setting_differences,
)
from signal_reid.report.contents import PagePicture
from signal_reid.report.page import SIZE_LIMIT, write_page
from signal_reid.report.tables import curve_table


@dataclass(frozen=True)
class Lead:
    """A table that the page begins with.

    Args:
        table: its numbers.
        notes: how to read it.
        downloads: names of files and their data URIs.
    """

    table: Table
    notes: Sequence[str] = ()
    downloads: Sequence[tuple[str, Markup]] = ()


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything on the page.

    Args:
        title: of the page.
        runs: at least two, the one that the others are compared with first.
        disagreements: queries with a ranked list of each comparable run.
        modalities: names of the images of a sample, in order.
        leads: what the page begins with.
        notes: more lines above everything.
    """

    title: str
    runs: Sequence[ComparedRun]
    disagreements: Sequence[Disagreement] = ()
    modalities: Sequence[str] = ()
    leads: Sequence[Lead] = ()
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True)
class _Changed:
    """A row of the table of queries."""

    name: str
    identity: int
    camera: str
    precisions: tuple[float, ...]

    @property
    def average_precision(self) -> float:
        return min(self.precisions)

    @property
    def gap(self) -> float:
        return max(self.precisions) - min(self.precisions)


def write_comparison(path: str | Path, comparison: Comparison, size_limit: int = SIZE_LIMIT) -> None:
    """Write the page: one HTML file with all that it shows inside, whole or not at all.

    Raises:
        FileNotFoundError: no such directory.
        InputError: the page does not fit even with the smallest images.
    """
    runs = comparison.runs
    compared = comparable(runs)
    charts = _charts(runs)
    contents: dict[str, Any] = {}
    if len(compared) > 1:
        contents = {
            "changes": change_table(compared[0], [query_change(compared[0], run) for run in compared[1:]]),
            "changed": _changed(compared),
            "query_rows": change_rows(compared),
        }
    sections = [("results", "Results"), ("settings", "Settings")]
    sections += [("training", "Training")] if charts else []
    sections += [("queries", "Queries")] if contents else []
    write_page(
        path,
        "comparison.html.j2",
        size_limit,
        title=comparison.title,
        sections=[("ablation", "Ablation"), *sections] if comparison.leads else sections,
        caveats=[*comparison.notes, *caveats(runs)],
        leads=comparison.leads,
        results=results_table(runs),
        settings=setting_differences(runs),
        charts=charts,
        compared=compared,
        disagreements=comparison.disagreements,
        modalities=comparison.modalities,
        **contents,
    )


def _charts(runs: Sequence[ComparedRun]) -> list[PagePicture]:
    charts, names = [], [run.name for run in runs]
    for number, (title, x_label, curves) in enumerate(overlaid_curves(runs)):
        percents = title in ("mAP", "R-1")
        ends = ", ".join(f"{curve.label} {curve.y[-1]:{'.1%' if percents else '.4g'}}" for curve in curves)
        description = f"{title} by {x_label} of each run; at the end: {ends}."
        slots = [names.index(curve.label) for curve in curves]
        drawn = Markup(line_chart(f"curve-{number}", description, curves, x_label, percents, slots=slots))
        table = curve_table(curves, x_label, f"{title} by {x_label}")
        charts.append(PagePicture(title, description, drawn, tables=[table]))
    return charts


def _changed(runs: Sequence[ComparedRun]) -> list[_Changed]:
    """The queries on which runs differ, the largest gap first."""
    chosen = disagreements(runs, len(runs[0].results))
    return [_row(runs, i) for i in chosen]


def _row(runs: Sequence[ComparedRun], i: int) -> _Changed:
    query = runs[0].results[i]
    return _Changed(query.name, query.identity, query.camera, tuple(run.results[i].average_precision for run in runs))
