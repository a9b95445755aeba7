"""Writes a report as one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from signal_reid.report import history
from signal_reid.report.charts import line_chart
from signal_reid.report.contents import RunReport
from signal_reid.runtime.files import write_atomically

THUMBNAIL = (192, 192)
"""The largest width and height of an image in the file, in pixels."""


def write_report(path: str | Path, report: RunReport) -> None:
    """Write a report: one HTML file with its style, curves and images inside, whole or not at all.

    Raises:
        FileNotFoundError: no such directory.
    """
    environment = Environment(
        loader=PackageLoader("signal_reid.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, thumbnails=thumbnails)
    header, rows = history.epoch_table(report.history)
    text = environment.get_template("report.html.j2").render(
        report=report, charts=_charts(report.history, report.loss_titles), epoch_header=header, epoch_rows=rows
    )
    write_atomically(Path(path), text.encode(errors="backslashreplace"))


def percent(fraction: float) -> str:
    """A fraction in percent with one decimal, as papers give it."""
    return "n/a" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def thumbnails(images: Tensor) -> list[Markup]:
    """Each image of (M, 3, H, W) uint8 as a data URI of a small JPEG."""
    return [_thumbnail(image) for image in images.cpu()]


def _thumbnail(image: Tensor) -> Markup:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail(THUMBNAIL, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return Markup(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")


def _charts(rows: Sequence[Any], loss_titles: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """Titles and charts of what the history has."""
    charts = []
    if curves := history.loss_curves(rows, loss_titles):
        description = f"Training loss and its parts by step; the total ends at {curves[0].y[-1]:.4g}."
        chart = line_chart(
            "loss", description, curves, "step", first_is_total=curves[0].label == history.label("total")
        )
        charts.append(("Loss", chart))
    if curves := history.retrieval_curves(rows):
        best = ", ".join(f"{curve.label} at best {percent(max(curve.y))} percent" for curve in curves)
        chart = line_chart("retrieval", f"Retrieval by epoch: {best}.", curves, "epoch", percent=True)
        charts.append(("Retrieval", chart))
    if curves := history.learning_rate_curves(rows):
        description = f"Learning rate by epoch, at most {max(curves[0].y):.3g}."
        charts.append(("Learning rate", line_chart("rate", description, curves, "epoch")))
    return [(title, Markup(chart)) for title, chart in charts]
