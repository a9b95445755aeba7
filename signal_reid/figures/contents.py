"""A picture as a value: the figure, what it says in words, its numbers as tables, and layers that a page can toggle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from signal_reid.figures.saving import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = str | int | float


@dataclass(frozen=True)
class Table:
    """Numbers of a picture.

    Args:
        title: what the rows are.
        header: a name for each column.
        rows: each as long as the header; text, whole numbers, or numbers to be shown with four digits.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Value]]


@dataclass(frozen=True, eq=False)
class Layer:
    """What lies over each image, cell by cell of the grid of tokens, and can be switched on and off.

    Args:
        name: for the switch, a phrase such as `its own class token`.
        cells: (B, M, rows, columns); bool marks cells, floating point in [0, 1] colours them.
    """

    name: str
    cells: Tensor


@dataclass(frozen=True, eq=False)
class LayeredImages:
    """Images with the layers that belong over them.

    Args:
        images: (B, M, 3, H, W) uint8.
        names: of the samples.
        modalities: of a sample's images, in order.
        area: top, left, bottom, right in pixels: the part of an image that the grid of tokens divides evenly.
        layers: in the order to offer them.
        title: of these layers, such as `after training`; empty where there is but one such set.
    """

    images: Tensor
    names: Sequence[str]
    modalities: Sequence[str]
    area: tuple[float, float, float, float]
    layers: Sequence[Layer]
    title: str = ""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that was drawn, with all that a page or a script may want of it.

    Args:
        name: what it is asked for by, such as `tokens`.
        title: for readers.
        drawn: the figure, or what draws it when it is first asked for: a page of layers needs none.
        caption: what is to be seen, in whole sentences, for print and for readers who cannot see it.
        notes: what the numbers say, each a whole sentence.
        tables: the numbers.
        layers: for a page with switches; empty where the picture has none.
    """

    name: str
    title: str
    drawn: Figure | Callable[[], Figure]
    caption: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    layers: Sequence[LayeredImages] = ()

    @cached_property
    def figure(self) -> Figure:
        """The figure, to be shown or saved."""
        return self.drawn() if callable(self.drawn) else self.drawn

    def save(self, path: str | Path) -> None:
        """Write the figure; see `save_figure`."""
        save_figure(self.figure, path)
