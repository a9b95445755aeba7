"""Line charts as SVG elements that stand in an HTML page and take its colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from signal_reid.report.history import Curve

# Drawn in colours that nothing else has, which then become the page's: it may be light or dark.
INK, GRID = "#010101", "#020202"
SERIES = [f"#0303{i:02x}" for i in range(6)]
PAGE_COLOURS = {INK: "currentColor", GRID: "var(--line)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)
}
DASHES = ["-", "--", "-.", ":"]
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "signal-reid",  # the same chart is the same file
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "axes.formatter.limits": (-3, 4),
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def line_chart(
    name: str,
    description: str,
    curves: Sequence[Curve],
    x_label: str,
    percent: bool = False,
    first_is_total: bool = False,
) -> str:
    """Draw curves over whole numbers.

    Args:
        name: unique in the page; starts the ids inside the chart.
        description: what a reader who cannot see it should know.
        curves: at least one; they differ in dashes and markers as well as in colour.
        x_label: of the horizontal axis.
        percent: the values are fractions, shown in percent from 0.
        first_is_total: the first curve is the weighted sum of the others, and drawn the strongest.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's own style was not made for this page
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(5.2, 3.1), layout="constrained", frameon=False)
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            total = first_is_total and i == 0
            slot = i - first_is_total
            axes.plot(
                curve.x,
                curve.y,
                label=curve.label,
                color=INK if total else SERIES[slot % len(SERIES)],
                linestyle="-" if total else DASHES[slot % len(DASHES)],
                linewidth=2.0 if total or len(curves) < 3 else 1.3,
                marker="os"[i % 2] if len(curve.x) <= 60 else "",
                markersize=3,
            )
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_ylim(0, min(1.02, 1.15 * max(max(curve.y) for curve in curves) or 1))
        if len(curves) > 1:
            columns = len(curves) if len(curves) <= 5 else math.ceil(len(curves) / 2)
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=1.6)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text)
    return _for_page(text.getvalue(), name, description)


def _for_page(document: str, name: str, description: str) -> str:
    """The `<svg>` element alone: no namespaces, metadata or style sheet, which would reach out of the chart."""
    root = ElementTree.fromstring(document)
    for parent in root.iter():
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _own(value, name) for key, value in element.attrib.items()}
        if "id" in element.attrib:
            element.attrib["id"] = f"{name}-{element.attrib['id']}"
        element.tail = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "chart", "role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode")


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _own(value: str, name: str) -> str:
    """References to ids of this chart, and the page's colours."""
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    value = re.sub(r"^#(?=[a-zA-Z])", f"#{name}-", value)
    for drawn, colour in PAGE_COLOURS.items():
        value = value.replace(drawn, colour)
    return value
