"""Where LAM samples: its reference points, and how far its offsets move them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from signal_reid.figures import Picture, Table
from signal_reid.figures.charts import histogram_lines
from signal_reid.figures.grid import Area, draw_image, image_grid, inches
from signal_reid.figures.style import INK, SOFT, Width, drawing_style
from signal_reid.methods.base import Method
from signal_reid.methods.pictures import MethodPicture, Shown, Subjects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from signal_reid.methods.signal.model import Signal

SATURATED = 0.95
"""Share of the largest shift: beyond it tanh is flat, so that an offset hardly learns."""
CHART = 1.6
"""Inches of the distribution's height."""
POINT = "#b03a00"


@dataclass(frozen=True, eq=False)
class Shifts:
    """How far LAM's offsets move its reference points, of some samples.

    Args:
        shifts: (B, M, Hk, Wk), `offset_range * tanh(offset)`; 1 moves a point by half a step of the reference points.
        grid_size: (H, W), rows and columns of tokens.
        offset_range: the largest shift.
        title: of the model; may be empty.
    """

    shifts: Tensor
    grid_size: tuple[int, int]
    offset_range: float
    title: str = ""

    @property
    def steps(self) -> tuple[float, float]:
        """How many tokens a shift of 1 moves a point down and to the right."""
        (H, W), (Hk, Wk) = self.grid_size, self.shifts.shape[-2:]
        return (H - 1) / (2 * (Hk - 1)), (W - 1) / (2 * (Wk - 1))

    @property
    def references(self) -> Tensor:
        """(Hk, Wk, 2), row and column in tokens of each reference point, 0 being the first token's centre.

        The last of each axis lies beyond the last token, as in the authors' code.
        """
        Hk, Wk = self.shifts.shape[-2:]
        (down, right), like = self.steps, self.shifts
        rows, columns = (2 * torch.arange(n).to(like) + 1 for n in (Hk, Wk))
        return torch.stack(torch.meshgrid(rows * down, columns * right, indexing="ij"), -1)

    @property
    def moved(self) -> Tensor:
        """(B, M, Hk, Wk, 2), the points after their shift, wherever that is."""
        return self.references + self.shifts[..., None] * self.shifts.new_tensor(self.steps)

    @property
    def sampled(self) -> Tensor:
        """(B, M, Hk, Wk, 2), where tokens are sampled: the moved points, brought into the map."""
        last = self.shifts.new_tensor(self.grid_size) - 1
        return torch.minimum(self.moved.clamp_min(0), last)


def find_shifts(model: Signal, inputs: Tensor, cameras: Tensor | None = None, title: str = "") -> Shifts:
    """Run a model and tell how far it moves its sampling points.

    Args:
        model: with LAM.
        inputs: (B, M, 3, H, W) normalised images.
        cameras: (B,) int64, or none.
        title: of the model.
    """
    alignment = model.local_alignment
    assert alignment is not None
    offsets = alignment.offsets(model.encode(inputs, cameras).tokens).float()
    return Shifts(offsets.tanh().cpu() * alignment.offset_range, alignment.grid_size, alignment.offset_range, title)


def draw_shifts(
    found: Sequence[Shifts],
    everywhere: Sequence[Shifts],
    images: Tensor,
    names: Sequence[str],
    modalities: Sequence[str],
    area: Area,
    width: Width | None = None,
) -> Figure:
    """Draw where LAM samples, and how its shifts are distributed.

    Args:
        found: of the samples, of one model or of several to stand side by side.
        everywhere: of a data set, of the same models.
        images: (B, M, 3, H, W) uint8.
        names: of the samples.
        modalities: of a sample's images.
        area: the part of an image that the grid of tokens divides evenly: top, left, bottom, right in pixels.
        width: of a paper's column or page; none: what suits the number of images.

    Returns:
        A row for each modality whose points are shown: arrows over its own image, from each reference point to where
        it is sampled, and the same places over the other images. Below, the shifts of the data set.
    """
    first = found[0]
    outermost = torch.cat([first.references.flatten(0, 1), *(shifts.moved.flatten(0, 3) for shifts in found)]).amax(0)
    high, wide = _extent(in_pixels(outermost, first.grid_size, area), images.shape[-2:])
    rows = [f"points\nof {name}" for name in modalities]
    middle = images.shape[-2] / high / 2, images.shape[-1] / wide / 2
    with drawing_style():
        titles = [shifts.title for shifts in found]
        grid = image_grid(names, titles, rows, modalities, high / wide, below=CHART, width=width, middle=middle)
        for sample, group in enumerate(grid.axes):
            for block, shifts in zip(group, found, strict=True):
                for m, row in enumerate(block):
                    for n, axes in enumerate(row):
                        draw_image(axes, (images[sample, n].float() * 0.75 + 64).to(torch.uint8))  # lighter
                        axes.set_xlim(0, wide)
                        axes.set_ylim(high, 0)
                        _draw_points(axes, shifts, sample, m, images.shape[-2:], area, arrows=m == n)
        _draw_distributions(grid.figure, everywhere, modalities)
    return grid.figure


def _extent(outermost: Tensor, size: Sequence[int]) -> tuple[float, float]:
    """Height and width in pixels of an image with the points that lie outside of it, of which y and x are given."""
    high, wide = (max(side, point + 0.03 * side) for side, point in zip(size, outermost.tolist(), strict=True))
    return high, wide


def in_pixels(points: Tensor, grid_size: tuple[int, int], area: Area) -> Tensor:
    """(..., 2) rows and columns in tokens -> y and x in pixels of the image."""
    top, left, bottom, right = area
    cell = points.new_tensor([(bottom - top) / grid_size[0], (right - left) / grid_size[1]])
    return points.new_tensor([top, left]) + (points + 0.5) * cell


def _draw_points(
    axes: Axes, shifts: Shifts, sample: int, m: int, size: Sequence[int], area: Area, arrows: bool
) -> None:
    """The points of modality m over an image of that size, with arrows where it is its own."""
    from matplotlib.patches import Rectangle

    axes.set_axis_off()
    height, width = size
    axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor=SOFT, linewidth=0.4))
    ends = in_pixels(shifts.sampled[sample, m], shifts.grid_size, area).flatten(0, 1)  # (P, 2)
    if arrows:
        starts = in_pixels(shifts.references, shifts.grid_size, area).flatten(0, 1)
        moved = in_pixels(shifts.moved[sample, m], shifts.grid_size, area).flatten(0, 1)
        for start, middle, end in zip(starts.tolist(), moved.tolist(), ends.tolist(), strict=True):
            _arrow(axes, start, middle, "-")
            if middle != end:
                _arrow(axes, middle, end, ":")
        axes.plot(starts[:, 1], starts[:, 0], "o", ms=2.6, mfc="white", mec=INK, mew=0.5, clip_on=False, zorder=4)
    axes.plot(ends[:, 1], ends[:, 0], "o", ms=3.0, mfc=POINT, mec="white", mew=0.4, clip_on=False, zorder=5)


def _arrow(axes: Axes, start: Sequence[float], end: Sequence[float], dashes: str) -> None:
    """From one (y, x) to another, with a white seam; a head where there is room for one."""
    from matplotlib.patheffects import Normal, Stroke

    span = math.dist(axes.transData.transform(start[::-1]), axes.transData.transform(end[::-1]))
    head = span * 72 / axes.figure.dpi > 5
    how = {"arrowstyle": "-|>" if head else "-", "mutation_scale": 4.5, "linewidth": 0.8, "color": INK}
    how |= {"shrinkA": 0, "shrinkB": 1.2 if head else 0, "linestyle": dashes}
    tip, tail = (end[1], end[0]), (start[1], start[0])
    drawn = axes.annotate("", tip, tail, annotation_clip=False, arrowprops=how, zorder=3)
    assert drawn.arrow_patch is not None
    if dashes == "-":
        drawn.arrow_patch.set_path_effects([Stroke(linewidth=1.8, foreground="white"), Normal()])


def _draw_distributions(figure: Figure, everywhere: Sequence[Shifts], modalities: Sequence[str]) -> None:
    across = figure.get_size_inches()[0]
    each = (across - 0.1) / len(everywhere)
    shared: list[Axes] = []
    highest = 0.0
    most = max(shifts.shifts.abs().max().item() for shifts in everywhere) * 1.05 or 1.0
    limit = min(most, max(shifts.offset_range for shifts in everywhere))
    for i, shifts in enumerate(everywhere):
        axes = figure.add_axes(inches(figure, (0.5 + i * each, 0.42, each - 0.6, CHART - 0.7)))
        shared.append(axes)
        series = dict(zip(modalities, shifts.shifts.transpose(0, 1).flatten(1), strict=True))
        highest = max(highest, histogram_lines(axes, series, (-limit, limit)))
        down, right = shifts.steps
        axes.set_xlabel(f"shift; 1 is {down:.3g} tokens down, {right:.3g} to the right")
        axes.set_ylabel("share of points")
        what = f"{shifts.title}, shifts" if shifts.title else "Shifts"
        axes.set_title(f"{what} of {len(shifts.shifts)} samples", loc="left")
    for axes in shared:
        axes.set_ylim(0, 1.05 * highest)
    shared[0].legend(loc="best", handlelength=1.8)


def numbers(shifts: Shifts, modalities: Sequence[str]) -> Table:
    """How the shifts of a data set are distributed, for each modality."""
    rows: list[list[str | float]] = []
    edge = (shifts.moved != shifts.sampled).any(-1)  # (B, M, Hk, Wk)
    for m, name in enumerate(modalities):
        values = shifts.shifts[:, m]  # (B, Hk, Wk)
        rows.append(
            [
                name,
                values.mean().item(),
                values.std(unbiased=False).item(),
                values.std(0, unbiased=False).mean().item(),
                values.min().item(),
                values.max().item(),
                (values.abs() > SATURATED * shifts.offset_range).float().mean().item(),
                edge[:, m].float().mean().item(),
            ]
        )
    title = f"Shifts of {len(shifts.shifts)} samples" + (f", {shifts.title}" if shifts.title else "")
    header = ["modality", "mean", "deviation", "between samples", "least", "largest", "saturated", "at the edge"]
    return Table(title, header, rows)


def remarks(shifts: Shifts) -> list[str]:
    """What the shifts of a data set say, in whole sentences."""
    edge = (shifts.moved != shifts.sampled).any(-1).float().mean().item()
    outside = (shifts.references > shifts.references.new_tensor(shifts.grid_size) - 1).any(-1).float().mean().item()
    between = shifts.shifts.std(0, unbiased=False).mean().item()
    whole = shifts.shifts.std(unbiased=False).item()
    said = [
        f"{edge:.0%} of the points are brought back into the map and sample its edge; {outside:.0%} of the "
        "reference points lie beyond the last row or column, as in the authors' code."
    ]
    if len(shifts.shifts) > 1:
        said.append(
            f"The shift of one place differs between samples by {between:.3g} (standard deviation); over places, "
            f"modalities and samples it differs by {whole:.3g}."
        )
    return [f"{shifts.title}: {sentence}" if shifts.title else sentence for sentence in said]


class Offsets(MethodPicture):
    """What `signal-reid show offsets` draws."""

    name = "offsets"
    title = "Sampling points of local alignment"
    about = "LAM's reference points, where each is sampled, and the distribution of its shifts"
    parts = ("local_alignment",)

    def draw(self, models: Mapping[str, Method], subjects: Subjects, width: Width | None = None) -> Picture:
        shown = subjects.chosen(1 if len(models) > 1 else 3)
        signals = cast("Mapping[str, Signal]", models)
        found = [find_shifts(model, shown.inputs, shown.cameras, title) for title, model in signals.items()]
        everywhere = _everywhere(signals, subjects)
        area = next(iter(models.values())).backbone.token_area
        parts = (shown.images, shown.names, subjects.modalities, area, width)
        figure = draw_shifts(found, everywhere, *parts)
        tables = [numbers(shifts, subjects.modalities) for shifts in everywhere]
        notes = [sentence for shifts in everywhere for sentence in remarks(shifts)]
        tables += [places(shifts, shown, subjects.modalities) for shifts in found]
        return Picture(self.name, self.title, figure, CAPTION, notes, tables)


CAPTION = (
    "Where local alignment samples tokens. A row shows the sampling points of one modality: over its own image a line "
    "leads from each reference point (ring) to where it is sampled (dot); over the other images are the same places. "
    "Solid: the shift that was learned. Dotted: a point outside the map is brought back to its edge; the last row and "
    "column of reference points lie outside. Below: the distribution of the shifts over the data set."
)


def _everywhere(models: Mapping[str, Signal], subjects: Subjects) -> list[Shifts]:
    """The shifts of all samples, of each model."""
    parts: dict[str, list[Shifts]] = {title: [] for title in models}
    for shown in subjects.all():
        for title, model in models.items():
            parts[title].append(find_shifts(model, shown.inputs, shown.cameras, title))
    return [
        Shifts(torch.cat([part.shifts for part in some]), some[0].grid_size, some[0].offset_range, title)
        for title, some in parts.items()
    ]


def places(shifts: Shifts, shown: Shown, modalities: Sequence[str]) -> Table:
    """Where each drawn point is sampled, in tokens."""
    rows: list[list[str | float]] = []
    for name, sampled, moved in zip(shown.names, shifts.sampled, shifts.shifts, strict=True):
        for m, modality in enumerate(modalities):
            for i, j in torch.cartesian_prod(*(torch.arange(n) for n in moved.shape[1:])).tolist():
                reference = shifts.references[i, j].tolist()
                rows.append([name, modality, *reference, *sampled[m, i, j].tolist(), moved[m, i, j].item()])
    title = "Sampling points of the drawn samples, in tokens" + (f", {shifts.title}" if shifts.title else "")
    header = ["sample", "modality", "reference row", "column", "sampled row", "column", "shift"]
    return Table(title, header, rows)
