"""Images in rows and columns, and what is drawn over them cell by cell of the grid of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from signal_reid.figures.style import HEAT, INK, SMALL, SOFT, USUAL, WIDTHS, Width, legible, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Area = tuple[float, float, float, float]
Segment = tuple[tuple[float, float], tuple[float, float]]
STROKE = "#8c8c8c"

LABELS = 0.72
"""Inches left of the images, for the labels of rows."""
MARGIN = 0.04
GAP, BLOCK_GAP, GROUP_GAP = 0.04, 0.14, 0.2
HEADS = 0.14
"""Inches of one line of text above or below images."""
TALLEST = 8.9
"""Inches of a paper's page that images may fill."""
SMALLEST = 0.6
"""Inches of an image's width below which a line takes fewer of them."""
LEAST = 0.4
"""Inches of an image's width below which a picture grows longer than a page."""


@dataclass(frozen=True)
class Places:
    """Where the images of a figure are, in inches."""

    width: Width
    height: float
    image: tuple[float, float]
    """Width and height of each image."""
    lefts: list[list[list[float]]]
    """[group in its line][block][column]."""
    per_line: int
    """Groups side by side."""
    line_height: float
    row_tops: list[float]
    """Places of each row, down from the top of its line."""
    middle: tuple[float, float]
    """See `image_grid`."""


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """A figure of images: groups (samples) of blocks (models) of columns (modalities), and rows."""

    figure: Figure
    axes: list[list[list[list[Axes]]]]
    """[group][block][row][column]."""
    below: tuple[float, float, float, float]
    """Left, bottom, width, height of what was kept free, in inches."""


def image_grid(
    groups: Sequence[str],
    blocks: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    aspect: float,
    *,
    captions: Sequence[int] = (),
    below: float = 0.0,
    width: Width | None = None,
    middle: tuple[float, float] = (0.5, 0.5),
) -> ImageGrid:
    """Make a figure with a place for each image; call it inside `drawing_style`.

    Args:
        groups: titles of the groups, such as names of samples; as many stand side by side as have room.
        blocks: titles of the blocks in each group; one without a title takes no line.
        rows: labels of the rows, which may have several lines.
        columns: heads of each block's columns.
        aspect: height over width of an image.
        captions: numbers of the rows below whose images a line of text has room.
        below: inches to leave free below the images, over the whole width.
        width: of a paper's column or page; none: a column where all fits into it.
        middle: where labels of rows and heads of columns stand, as shares of an image's height and width.
    """
    titled = any(blocks)
    places = _places(len(groups), len(blocks), len(rows), len(columns), aspect, titled, captions, below, width, middle)
    figure = new_figure(places.width, places.height)
    axes = []
    for index, title in enumerate(groups):
        line, place = divmod(index, places.per_line)
        top = MARGIN + line * places.line_height
        if place == 0:
            _label_rows(figure, places, rows, top)
        axes.append(_group(figure, places, place, top, title, blocks if titled else [], len(rows), columns))
    return ImageGrid(figure, axes, (0.0, 0.0, WIDTHS[places.width], below))


def _places(
    groups: int,
    blocks: int,
    rows: int,
    columns: int,
    aspect: float,
    titled: bool,
    captions: Sequence[int],
    below: float,
    width: Width | None,
    middle: tuple[float, float],
) -> Places:
    width = width or ("column" if groups * blocks * columns <= 4 else "page")
    room, heads = WIDTHS[width] - LABELS - 2 * MARGIN, HEADS * (3 if titled else 2)

    def group_width(image: float) -> float:
        return blocks * (columns * image + (columns - 1) * GAP) + (blocks - 1) * BLOCK_GAP

    between = [GAP + (HEADS if row in captions else 0.0) for row in range(rows)]
    around = heads + sum(between) + 2 * GAP

    def across(per_line: int) -> float:
        """The width of an image with which a line of groups is full."""
        fixed = group_width(0) * per_line + GROUP_GAP * (per_line - 1)
        return (room - fixed) / (per_line * blocks * columns)

    def fitting(per_line: int) -> float:
        """The width of an image with which neither a line nor the page is more than full."""
        lines = math.ceil(groups / per_line)
        return min(across(per_line), ((TALLEST - below) / lines - around) / rows / aspect)

    fewest = max(1, min(groups, int((room + GROUP_GAP) / (group_width(SMALLEST) + GROUP_GAP))))
    per_line = max(range(fewest, groups + 1), key=fitting)
    image = max(fitting(per_line), min(LEAST, across(per_line)))  # more samples than a page has room for make it longer
    lefts = []
    for place in range(per_line):
        start = LABELS + MARGIN + place * (group_width(image) + GROUP_GAP)
        steps = [start + b * (group_width(image) + BLOCK_GAP) / blocks for b in range(blocks)]
        lefts.append([[step + c * (image + GAP) for c in range(columns)] for step in steps])
    tops = [heads + r * image * aspect + sum(between[:r]) for r in range(rows)]
    line_height = rows * image * aspect + around
    height = 2 * MARGIN + math.ceil(groups / per_line) * line_height - GAP + below
    return Places(width, height, (image, image * aspect), lefts, per_line, line_height, tops, middle)


def _label_rows(figure: Figure, places: Places, rows: Sequence[str], top: float) -> None:
    for label, down in zip(rows, places.row_tops, strict=True):
        middle = top + down + places.image[1] * places.middle[0]
        _text(figure, places, LABELS - 0.04, middle, label, ha="right", va="center", linespacing=1.1)


def _group(
    figure: Figure,
    places: Places,
    place: int,
    top: float,
    title: str,
    blocks: Sequence[str],
    rows: int,
    columns: Sequence[str],
) -> list[list[list[Axes]]]:
    image_width, _ = places.image
    lefts = places.lefts[place]
    left, right = lefts[0][0], lefts[-1][-1] + image_width
    shown = _fitting(title, right - left)
    _text(figure, places, (left + right) / 2, top + HEADS / 2, shown, ha="center", va="center", fontsize=USUAL)
    axes = []
    for number, block in enumerate(lefts):
        down = top + HEADS
        if blocks:
            middle = (block[0] + block[-1] + image_width) / 2
            _text(figure, places, middle, down + HEADS / 2, blocks[number], ha="center", va="center", style="italic")
            down += HEADS
        for x, name in zip(block, columns, strict=True):
            _text(
                figure,
                places,
                x + image_width * places.middle[1],
                down + HEADS / 2,
                name,
                ha="center",
                va="center",
                color=SOFT,
            )
        axes.append(
            [[_image_axes(figure, places, x, top + places.row_tops[row]) for x in block] for row in range(rows)]
        )
    return axes


def _fitting(title: str, width: float) -> str:
    """The title, shortened in its middle where it would be wider than that many inches."""
    most = max(8, int(width / (0.6 * USUAL / 72)))
    if len(title) <= most:
        return title
    return f"{title[: most // 2 - 1]}…{title[len(title) - (most - most // 2 - 1) :]}"


def _text(figure: Figure, places: Places, x: float, down: float, text: str, **how: Any) -> None:
    how = {"fontsize": SMALL, "color": INK, **how}
    shown = "\n".join(map(legible, text.split("\n")))  # the labels of rows have several lines
    figure.text(x / WIDTHS[places.width], 1 - down / places.height, shown, **how)


def _image_axes(figure: Figure, places: Places, x: float, down: float) -> Axes:
    width, height = places.image
    bottom = places.height - down - height
    box = (x / WIDTHS[places.width], bottom / places.height, width / WIDTHS[places.width], height / places.height)
    axes = figure.add_axes(box)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(True)
        side.set_linewidth(0.4)
    return axes


def inches(figure: Figure, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """A box in inches from the lower left as the fractions of a figure that `add_axes` takes."""
    width, height = figure.get_size_inches()
    left, bottom, across, up = box
    return left / width, bottom / height, across / width, up / height


def draw_image(axes: Axes, image: Tensor) -> None:
    """An image (3, H, W) uint8, in coordinates of its pixels."""
    _, height, width = image.shape
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0), interpolation="bilinear", aspect="auto")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def draw_marked(axes: Axes, cells: Tensor, area: Area) -> None:
    """Veil and strike out the cells that are not marked, and draw a line around those that are.

    Args:
        axes: with an image.
        cells: (rows, columns) bool.
        area: see `LayeredImages`.
    """
    from matplotlib.collections import LineCollection

    veil = torch.ones(*cells.shape, 4)
    veil[..., 3] = torch.where(cells, 0.0, 0.8)
    _over(axes, veil, area)
    axes.add_collection(LineCollection(strokes(~cells, area), colors=STROKE, linewidths=0.4))  # veiled white is white
    draw_outline(axes, cells, area)


def draw_heat(axes: Axes, values: Tensor, area: Area, image: Tensor) -> None:
    """Colour the cells by value, with the image showing through.

    Args:
        axes: empty.
        values: (rows, columns) in [0, 1].
        area: see `LayeredImages`.
        image: (3, H, W) uint8.
    """
    import matplotlib as mpl

    grey = image.float().mean(0) / 255  # (H, W)
    rows, columns = _pixels_of_cells(image.shape[1:], values.shape, area)
    heat = torch.from_numpy(mpl.colormaps[HEAT](values.clamp(0, 1).numpy())[..., :3]).float()
    mixed = (0.85 * heat[rows][:, columns] + 0.15 * grey[..., None]).clamp(0, 1)
    draw_image(axes, (mixed * 255).to(torch.uint8).permute(2, 0, 1))


def draw_outline(axes: Axes, cells: Tensor, area: Area, color: str = INK, width: float = 0.5) -> None:
    """A line around the marked cells, (rows, columns) bool."""
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(outline(cells, area), colors=color, linewidths=width, capstyle="projecting"))


def strokes(cells: Tensor, area: Area) -> list[Segment]:
    """A stroke through each marked cell of (rows, columns), as segments of (x, y) in pixels."""
    rows, columns = cells.shape
    top, left, bottom, right = area
    high, wide = (bottom - top) / rows, (right - left) / columns
    return [
        ((left + c * wide, top + (r + 1) * high), (left + (c + 1) * wide, top + r * high))
        for r, c in cells.nonzero().tolist()
    ]


def outline(cells: Tensor, area: Area) -> list[Segment]:
    """The edges between marked and unmarked cells (rows, columns), as segments of (x, y) in pixels."""
    rows, columns = cells.shape
    top, left, bottom, right = area
    high, wide = (bottom - top) / rows, (right - left) / columns
    framed = torch.nn.functional.pad(cells.to(torch.int8), (1, 1, 1, 1))
    across = (framed[1:, 1:-1] != framed[:-1, 1:-1]).nonzero().tolist()  # between a cell and the one above it
    down = (framed[1:-1, 1:] != framed[1:-1, :-1]).nonzero().tolist()  # between a cell and the one left of it
    level = [((left + c * wide, top + r * high), (left + (c + 1) * wide, top + r * high)) for r, c in across]
    return level + [((left + c * wide, top + r * high), (left + c * wide, top + (r + 1) * high)) for r, c in down]


def _over(axes: Axes, colours: Tensor, area: Area) -> None:
    top, left, bottom, right = area
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(colours.numpy(), extent=(left, right, bottom, top), interpolation="nearest", aspect="auto")
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _pixels_of_cells(size: Sequence[int], grid: Sequence[int], area: Area) -> tuple[Tensor, Tensor]:
    """The row of cells of each row of pixels, and likewise of columns; pixels outside the area take the nearest."""
    found = []
    for pixels, cells, start, end in zip(size, grid, area[:2], area[2:], strict=True):
        centres = torch.arange(pixels) + 0.5
        found.append(((centres - start) / (end - start) * cells).floor().long().clamp(0, cells - 1))
    return found[0], found[1]
