"""The page of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from signal_reid.figures import Table
from signal_reid.report import history
from signal_reid.report.charts import line_chart
from signal_reid.report.contents import PagePicture, RunReport
from signal_reid.report.history import Curve
from signal_reid.report.page import SIZE_LIMIT, percent, write_page
from signal_reid.report.tables import curve_table, query_rows


def write_report(path: str | Path, report: RunReport, size_limit: int = SIZE_LIMIT) -> None:
    """Write a report: one HTML file with its style, curves and images inside, whole or not at all.

    Args:
        path: the file to replace.
        report: what to show.
        size_limit: bytes of the file; its images are scaled down together until it fits.

    Raises:
        FileNotFoundError: no such directory.
        InputError: the page does not fit even with the smallest images.
    """
    charts = history_charts(report.history, report.loss_titles)
    header, rows = history.epoch_table(report.history)
    write_page(
        path,
        "report.html.j2",
        size_limit,
        title=report.title,
        sections=_sections(report, bool(charts)),
        report=report,
        charts=charts,
        epochs=Table("What was measured of each epoch", header, rows),
        query_rows=query_rows(report.queries),
    )


def history_charts(rows: Sequence[Mapping[str, Any]], loss_titles: Mapping[str, str]) -> list[PagePicture]:
    """The curves of what the history has, with their numbers."""
    charts = []
    if curves := history.loss_curves(rows, loss_titles):
        description = f"Training loss and its parts by step; the total ends at {curves[0].y[-1]:.4g}."
        total = curves[0].label == history.label("total")
        chart = line_chart("loss", description, curves, "step", first_is_total=total)
        table = curve_table(curves, "step", "Losses by step")
        charts.append(PagePicture("Loss", description, Markup(chart), tables=[table]))
    charts += _part_charts(history.part_curves(rows, loss_titles))
    if curves := history.retrieval_curves(rows):
        best = ", ".join(f"{curve.label} at best {percent(max(curve.y))} percent" for curve in curves)
        held_out = history.choosing(rows) == "validation"
        where = "Retrieval on held-out training identities" if held_out else "Retrieval"
        marks = _best_and_last(rows)
        named = "; ".join(mark.label for mark in marks)
        description = f"{where} by epoch: {best}; {named}."
        chart = line_chart("retrieval", description, curves, "epoch", percent=True, marks=marks)
        table = curve_table(curves, "epoch", f"{where} by epoch, as fractions")
        charts.append(PagePicture(where, description, Markup(chart), tables=[table]))
    if curves := history.learning_rate_curves(rows):
        description = f"Learning rate by epoch, at most {max(curves[0].y):.3g}."
        chart = line_chart("rate", description, curves, "epoch")
        table = curve_table(curves, "epoch", "Learning rate by epoch")
        charts.append(PagePicture("Learning rate", description, Markup(chart), tables=[table]))
    return charts


def _part_charts(parts: Mapping[str, Sequence[Curve]]) -> list[PagePicture]:
    """What the method tells of its losses by epoch, such as the accuracy of its heads."""
    charts = []
    for number, (part, curves) in enumerate(parts.items()):
        name, fractions = history.label(part), part in history.FRACTIONS
        title = name[:1].upper() + name[1:]
        ends = ", ".join(f"{curve.label} {format(curve.y[-1], '.1%' if fractions else '.4g')}" for curve in curves)
        description = f"{title} by epoch; at the end: {ends}."
        chart = line_chart(f"part-{number}", description, curves, "epoch", percent=fractions)
        table = curve_table(curves, "epoch", f"{title} by epoch{', as fractions' if fractions else ''}")
        charts.append(PagePicture(title, description, Markup(chart), tables=[table]))
    return charts


def _best_and_last(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Where mAP stood in the best epoch and in the last one."""
    found = (("best epoch", history.best_row(rows)), ("last epoch", history.last_row(rows)))
    return [
        Curve(f"{what}: {row['epoch']}", [float(row["epoch"])], [float(row["mAP"])])
        for what, row in found
        if row is not None
    ]


def _sections(report: RunReport, trained: bool) -> list[tuple[str, str]]:
    """Ids and names of the sections that the page has."""
    there = {
        ("results", "Results"): report.headlines,
        ("training", "Training"): trained,
        ("pictures", "What the model sees"): report.pictures,
        ("queries", "Queries"): report.ranked_lists or report.queries,
        ("details", "Details"): report.dataset or report.environment or report.config,
    }
    return [section for section, content in there.items() if content]
