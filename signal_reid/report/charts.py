"""Line charts as SVG elements that stand in an HTML page and take its colours."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from signal_reid.figures import style
from signal_reid.report.history import Curve, spread

Colour = tuple[float, ...]

# Drawn in colours that nothing else has, which then become the page's: it may be light or dark.
INK, GRID = "#010101", "#020202"
SERIES = [f"#0303{i:02x}" for i in range(6)]
PAGE_COLOURS = {
    INK: "currentColor",
    GRID: "var(--line)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
    style.INK: "currentColor",
    style.SOFT: "var(--soft)",
    style.LINE: "var(--line)",
    style.PAPER: "var(--card)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(style.SERIES)},
}
"""What becomes of the colours of curves, and of those that pictures for paper are drawn in."""
LIGHT, DARK, CONTRAST = (1.0, 1.0, 1.0), (0.094, 0.114, 0.141), 3.0
"""The page's two backgrounds, and the contrast (WCAG) that any other colour is given against both."""
POINTS = 72
"""Dots per inch of an SVG file, whose unit is a point."""
HOVER_POINTS = 500
"""The most points of a curve that the page shows values of."""
LEGEND_CHARACTERS = 56
"""Characters across a chart; a legend's line beside its text is as wide as five."""
NOTHING: Mapping[str, str] = {}
DASHES = ["-", "--", "-.", ":"]
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "signal-reid",  # the same chart is the same file
    "text.parse_math": False,
    "font.size": 12,
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
    slots: Sequence[int] | None = None,
    marks: Sequence[Curve] = (),
) -> str:
    """Draw curves over whole numbers.

    Args:
        name: unique in the page; starts the ids inside the chart.
        description: what a reader who cannot see it should know.
        curves: at least one; they differ in dashes and markers as well as in colour.
        x_label: of the horizontal axis.
        percent: the values are fractions, shown in percent from 0.
        first_is_total: the first curve is the weighted sum of the others, and drawn the strongest.
        slots: what each curve takes its colour and dashes by, where charts are to agree in them; by default its place.
        marks: points that a ring goes around, each kind larger than the one before, with a place in the legend.

    Returns:
        An `<svg>` element; its attribute `data-hover` holds the points, from which the page shows values.
    """
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's own style was not made for this page
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(5.2, 3.1), dpi=POINTS, layout="constrained", frameon=False)
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            total = first_is_total and i == 0
            slot = slots[i] if slots is not None else i - first_is_total
            axes.plot(
                curve.x,
                curve.y,
                label=_legend_label(curve.label),
                color=INK if total else SERIES[slot % len(SERIES)],
                linestyle="-" if total else DASHES[slot % len(DASHES)],
                linewidth=2.0 if total or len(curves) < 3 else 1.3,
                marker="os"[(i if slots is None else slot) % 2] if len(curve.x) <= 60 else "",
                markersize=3,
            )
        for i, mark in enumerate(marks):
            ring: dict[str, Any] = {"marker": "o", "markersize": 8 + 5 * i, "markerfacecolor": "none"}
            axes.plot(mark.x, mark.y, label=mark.label, color=INK, linestyle="", clip_on=False, **ring)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
            axes.set_ylim(0, min(1.02, 1.15 * max(max(curve.y) for curve in curves) or 1))
        if len(curves) > 1:
            columns = len(curves) if len(curves) <= 3 else math.ceil(len(curves) / 2)
            fit = LEGEND_CHARACTERS // (5 + max(len(curve.label) for curve in curves))
            figure.legend(loc="outside upper left", ncols=max(1, min(columns, fit)), frameon=False, handlelength=1.6)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text)
        hover = _hover(axes, curves, x_label, percent)
    return for_page(text.getvalue(), name, description, {"data-hover": json.dumps(hover)})


def _legend_label(text: str) -> str:
    """A legend leaves out what begins with an underscore, as the name of a run may."""
    text = style.legible(text)
    return f" {text}" if text.startswith("_") else text


def _hover(axes: Axes, curves: Sequence[Curve], x_label: str, percent: bool) -> dict[str, Any]:
    """What the page needs to show values: each x with its place in the drawing, and each curve's value at it."""
    points = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    every = spread(sorted({x for curve in curves for x in curve.x}), HOVER_POINTS)
    box, height = axes.bbox, axes.figure.bbox.height

    def shown(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.1%}" if percent else f"{value:.4g}"

    return {
        "label": x_label,
        "x": [f"{x:g}" for x in every],
        "place": [round(float(axes.transData.transform((x, 0))[0]), 1) for x in every],
        "top": round(height - box.y1, 1),
        "bottom": round(height - box.y0, 1),
        "curves": [[c.label, [shown(p.get(x)) for x in every]] for c, p in zip(curves, points, strict=True)],
    }


def for_page(document: str, name: str, description: str, attributes: Mapping[str, str] = NOTHING) -> str:
    """The `<svg>` element of a document that matplotlib drew in `STYLE`, fit to stand in a page.

    It has no namespaces, metadata or style sheet, which would reach out of the drawing, and no `style` attributes,
    which the page's policy forbids: presentation attributes say the same.

    Args:
        document: what `FigureCanvasSVG.print_svg` wrote.
        name: unique in the page; starts the ids inside the drawing.
        description: what a reader who cannot see it should know.
        attributes: of the element, on top.
    """
    root = ElementTree.fromstring(document)
    for parent in root.iter():
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _own(_local(key), value, name) for key, value in _attributes(element.attrib)}
        if "id" in element.attrib:
            element.attrib["id"] = f"{name}-{element.attrib['id']}"
        element.tail = None
    view = root.attrib["viewBox"]
    root.attrib = {"viewBox": view, "class": "chart", "role": "img", "aria-label": description, **attributes}
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(attributes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Attributes of an element with its `style` as presentation attributes; of a text's font only the size is kept."""
    for key, value in attributes.items():
        if key != "style":
            yield key, value
            continue
        for declaration in filter(str.strip, value.split(";")):
            name, _, setting = (part.strip() for part in declaration.partition(":"))
            if name == "font":
                size = re.search(r"([\d.]+)px", setting)
                yield "font-size", size[1] if size else "10"
            elif name not in ("font-family", "-webkit-text-stroke"):
                yield name, setting


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _own(key: str, value: str, name: str) -> str:
    """The value of an attribute with references to ids of this drawing, and the page's colours."""
    if key == "href":
        return re.sub(r"^#", f"#{name}-", value)
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: page_colour(found[0]), value)


def page_colour(drawn: str) -> str:
    """What the page has for a drawn colour, `#rrggbb`; of another one a lighter or a darker shade."""
    if drawn in PAGE_COLOURS:
        return PAGE_COLOURS[drawn]
    colour = _rgb(drawn)
    return f"light-dark({_apart(colour, LIGHT, (0.0, 0.0, 0.0))}, {_apart(colour, DARK, (1.0, 1.0, 1.0))})"


def _apart(colour: Colour, background: Colour, towards: Colour) -> str:
    """The colour, mixed with another until it stands out from the background."""
    mixed = colour
    for share in (i / 20 for i in range(21)):
        mixed = tuple((1 - share) * a + share * b for a, b in zip(colour, towards, strict=True))
        light, dark = sorted((_luminance(mixed), _luminance(background)), reverse=True)
        if (light + 0.05) / (dark + 0.05) >= CONTRAST:
            break
    return "#" + "".join(f"{round(255 * part):02x}" for part in mixed)


def _rgb(colour: str) -> Colour:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _luminance(colour: Colour) -> float:
    """Relative luminance (WCAG 2.2) of sRGB in [0, 1]."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
