"""Pictures that were drawn for paper, as a page shows them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from markupsafe import Markup
from torch import Tensor

from signal_reid.figures import Layer, LayeredImages, Picture, Table, svg_text
from signal_reid.figures.grid import outline
from signal_reid.report.charts import for_page
from signal_reid.report.contents import Marks, PagePicture, Panel

LEVELS = 8
"""Opacities of a layer of values."""

Area = tuple[float, float, float, float]


def page_picture(picture: Picture, name: str) -> PagePicture:
    """The whole picture: as a drawing in the page's colours, or as printed where it has images in it.

    Args:
        picture: what was drawn.
        name: unique in the page.
    """
    common = (picture.title, picture.caption)
    notes, tables = (picture.caption, *picture.notes), picture.tables
    if any(axes.images for axes in picture.figure.axes):
        return PagePicture(*common, figure=picture.figure, notes=notes, tables=tables)
    drawing = Markup(for_page(svg_text(picture.figure), name, picture.caption))
    return PagePicture(*common, drawing=drawing, notes=notes, tables=tables)


def sample_pictures(picture: Picture) -> dict[str, list[PagePicture]]:
    """The layers of a picture as panels with switches, by the name of the sample; empty where it has no layers."""
    found: dict[str, list[PagePicture]] = {}
    titles = [layered.title for layered in picture.layers]
    for layered in picture.layers:
        others = [f", {title}" for title in titles if title != layered.title]
        of_model = [table for table in picture.tables if not table.title.endswith(tuple(others))]
        title = f"{picture.title}, {layered.title}" if layered.title else picture.title
        for number, name in enumerate(layered.names):
            panels = [_panel(layered, number, m) for m in range(len(layered.modalities))]
            exclusive = any(layer.cells.is_floating_point() for layer in layered.layers)
            tables = [table for table in (_of_sample(table, name) for table in of_model) if table.rows]
            shown = PagePicture(title, picture.caption, panels=panels, exclusive=exclusive, tables=tables)
            found.setdefault(name, []).append(shown)
    return found


def _of_sample(table: Table, name: str) -> Table:
    """The rows that begin with the sample's name, without it."""
    rows = [row[1:] for row in table.rows if row and row[0] == name]
    return Table(table.title, table.header[1:], rows)


def _panel(layered: LayeredImages, sample: int, modality: int) -> Panel:
    marks = [
        marks
        for place, layer in enumerate(layered.layers)
        for marks in _marks(layer, layer.cells[sample, modality], layered.area, first=place == 0)
    ]
    return Panel(layered.modalities[modality], layered.images[sample, modality], marks)


def _marks(layer: Layer, cells: Tensor, area: Area, first: bool) -> list[Marks]:
    """A layer over one image: a line around marked cells, of the first layer with a veil over the others, or heat."""
    if cells.is_floating_point():
        levels = (cells.clamp(0, 1) * LEVELS).round().long()
        paths = [(_rectangles((levels == level).cpu(), area), level / LEVELS) for level in range(1, LEVELS + 1)]
        return [Marks(layer.name, [(path, opacity) for path, opacity in paths if path], "heat")]
    line = "".join(f"M{x0:g} {y0:g}L{x1:g} {y1:g}" for (x0, y0), (x1, y1) in outline(cells.cpu(), area))
    lines = [Marks(layer.name, [(line, 1.0)])] if line else [Marks(layer.name, [])]
    return [Marks(layer.name, [(_rectangles(~cells.cpu(), area), 0.8)], "veil"), *lines] if first else lines


def _rectangles(cells: Tensor, area: Area) -> str:
    """Path data of the marked cells of (rows, columns), those beside each other in a row as one."""
    rows, columns = cells.shape
    top, left, bottom, right = area
    high, wide = (bottom - top) / rows, (right - left) / columns
    parts = []
    for row, start, count in _runs(cells):
        x, y, length = left + start * wide, top + row * high, count * wide
        parts.append(f"M{x:g} {y:g}h{length:g}v{high:g}h-{length:g}z")
    return "".join(parts)


def _runs(cells: Tensor) -> Iterator[tuple[int, int, int]]:
    """Row, first column and length of each run of marked cells."""
    edges = torch.nn.functional.pad(cells.to(torch.int8), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        yield row, start, end - start
