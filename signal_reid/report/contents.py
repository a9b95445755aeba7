"""What a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from markupsafe import Markup
from torch import Tensor

from signal_reid.data.layouts import UNNAMED
from signal_reid.evaluation import Metrics
from signal_reid.figures import Table
from signal_reid.runtime.text import is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = str | int | float


def camera_caption(name: str, longest: int = 14) -> str:
    """A camera's name where there is little room and nothing else says what it is: `cam1`, but `cam 3` for a number.

    Args:
        name: of the camera.
        longest: characters, at least 6, beyond which the middle of the name is left out.
    """
    says_more = any(character.isalpha() for character in name) and name != UNNAMED
    name = name if len(name) <= longest else f"{name[: longest - 5]}…{name[-4:]}"  # names often differ at the end
    return name if says_more else f"cam {name}"


@dataclass(frozen=True)
class Headline:
    """One row of the table of results; fractions in [0, 1]."""

    name: str
    mAP: float  # noqa: N815 - the field's name
    rank1: float
    rank5: float
    rank10: float

    def __post_init__(self) -> None:
        values = (self.mAP, self.rank1, self.rank5, self.rank10)
        if not isinstance(self.name, str) or not all(map(is_number, values)):
            raise TypeError("a row of results is a name and four numbers")

    @classmethod
    def of(cls, name: str, metrics: Metrics) -> Headline:
        """The row of a measurement."""
        return cls(name, metrics.mAP, metrics.rank(1), metrics.rank(5), metrics.rank(10))


@dataclass(frozen=True)
class Marks:
    """Marks over an image, which the page switches on and off together.

    Args:
        name: on the switch; the panels of one picture share their names.
        paths: data of SVG paths in pixels of the image, each with its opacity.
        kind: `line` around cells, `veil` over cells, or `heat` by value.
    """

    name: str
    paths: Sequence[tuple[str, float]]
    kind: Literal["line", "veil", "heat"] = "line"


@dataclass(frozen=True, eq=False)
class Panel:
    """One image of a picture, with marks over it.

    Args:
        title: what the image is, such as its modality.
        image: (3, H, W) uint8.
        marks: over the image.
    """

    title: str
    image: Tensor
    marks: Sequence[Marks] = ()

    def __post_init__(self) -> None:
        _check_images(self.image[None])


@dataclass(frozen=True, eq=False)
class PagePicture:
    """A picture as the page shows it: panels with switches, a drawing in the page's colours, or a figure as printed.

    Args:
        title: its heading.
        description: what a reader who cannot see it should know.
        drawing: an `<svg>` element, from `charts.for_page`.
        figure: drawn for paper, with images in it; the page has it as an image.
        panels: images with marks, side by side.
        exclusive: of the panels' marks one at a time is shown.
        notes: how to read the picture, and what its numbers say.
        tables: its numbers.
    """

    title: str
    description: str
    drawing: Markup | None = None
    figure: Figure | None = None
    panels: Sequence[Panel] = ()
    exclusive: bool = False
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()

    @property
    def switches(self) -> list[str]:
        """Names of the marks; the page begins with the first one's."""
        return list(dict.fromkeys(marks.name for panel in self.panels for marks in panel.marks))


@dataclass(frozen=True)
class QueryResult:
    """What the ranking of one query came to.

    Args:
        name: of the query.
        identity, camera: of the query; the camera as its files name it.
        average_precision: in [0, 1]; NaN where the gallery has no match.
        match_ranks: of all the gallery items of its identity that the protocol keeps, ascending, from 1.
        nearest: name of the gallery item at rank 1; empty where there is none.
        nearest_identity: of that item, -1 where there is none.
    """

    name: str
    identity: int
    camera: str
    average_precision: float
    match_ranks: Sequence[int]
    nearest: str = ""
    nearest_identity: int = -1


@dataclass(frozen=True, eq=False)
class RankedItem:
    """One gallery item of a ranked list.

    Args:
        images: (M, 3, H, W) uint8.
        identity, camera: of the item; the camera as its files name it.
        distance: to the query.
        correct: whether it shows the query's identity.
        name: its file, where known.
    """

    images: Tensor
    identity: int
    camera: str
    distance: float
    correct: bool
    name: str = ""

    def __post_init__(self) -> None:
        _check_images(self.images)


@dataclass(frozen=True, eq=False)
class RankedList:
    """A query and its nearest gallery items, nearest first.

    Args:
        images: (M, 3, H, W) uint8, the query.
        identity, camera: of the query; the camera as its files name it.
        average_precision: of the whole ranking, in [0, 1]; NaN where the gallery has no match.
        results: the items.
        name: the query's file, where known.
        match_ranks: of all the items of its identity in the whole ranking, ascending, from 1, where known.
        pictures: what the method has to show of the query.
    """

    images: Tensor
    identity: int
    camera: str
    average_precision: float
    results: Sequence[RankedItem]
    name: str = ""
    match_ranks: Sequence[int] = ()
    pictures: Sequence[PagePicture] = ()

    def __post_init__(self) -> None:
        _check_images(self.images)


@dataclass(frozen=True, eq=False)
class RunReport:
    """Everything in a report; empty parts are left out of it.

    Args:
        title: of the page.
        dataset: rows of name and value.
        headlines: results in the order to show, the one that counts last.
        history: rows of `metrics.jsonl`. `kind` is `step` (losses by step), `epoch` (mean losses, `learning_rate`,
            `triplets_per_second`, ...) or `eval` (`mAP`, `rank1`, ...); each has `epoch` and `step`.
        ranked_lists: queries with their nearest items.
        config: the configuration as YAML.
        environment: rows of name and value.
        modalities: the names of the images in a sample, in order.
        loss_titles: names of the method's losses for readers, where they differ from those in the history.
        queries: the results of every query.
        pictures: of the whole data set.
        seen_note: what the pictures of a query are drawn of.
    """

    title: str
    dataset: Sequence[tuple[str, Value]] = ()
    headlines: Sequence[Headline] = ()
    history: Sequence[Mapping[str, Any]] = ()
    ranked_lists: Sequence[RankedList] = ()
    config: str = ""
    environment: Sequence[tuple[str, Value]] = ()
    modalities: Sequence[str] = field(default=("RGB", "NI", "TI"))
    loss_titles: Mapping[str, str] = field(default_factory=dict)
    queries: Sequence[QueryResult] = ()
    pictures: Sequence[PagePicture] = ()
    seen_note: str = ""

    def __post_init__(self) -> None:
        for ranked in self.ranked_lists:
            for images in (ranked.images, *(item.images for item in ranked.results)):
                if len(images) != len(self.modalities):
                    raise ValueError(
                        f"images must have one for each of {', '.join(self.modalities)}, got {len(images)}"
                    )


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (M, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}")
