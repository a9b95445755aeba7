"""Ranked lists of chosen queries: which queries, and the picture of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from signal_reid.data import Dataset, Sample, decode
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.evaluation.trained import Trained, load_beside
from signal_reid.figures import Picture, Table
from signal_reid.figures.style import INK, SMALL, SOFT, USUAL, WIDTHS, Width, drawing_style, legible, new_figure
from signal_reid.report.contents import QueryResult, RankedItem, RankedList, Value, camera_caption
from signal_reid.report.pictures import GeneralPicture, Request
from signal_reid.report.selection import Ranking, choose_queries
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.text import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Order = Literal["spread", "worst", "best", "disagreement"]
QUERIES, TOP = 3, 10
RIGHT, WRONG = "#00703c", "#b3161f"
GAP = 0.05
"""Inches between triplets."""
HEAD, FOOT = 0.32, 0.3
"""Inches of the lines above a list, and of those below it."""


class Named(Protocol):
    """What has a name, such as a sample or the result of a query."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Wanted:
    """Which queries to show.

    Args:
        names: of queries, in the order to show; the directory and the suffix may be left out. Nothing else is asked.
        order: `spread` from the best to the worst; the `worst` or the `best` first; `disagreement` of two runs, the
            largest difference of average precision first.
        camera, identity: only queries of these; the camera as the files name it.
        count: how many at most.
    """

    names: Sequence[str] = ()
    order: Order = "spread"
    camera: str | None = None
    identity: int | None = None
    count: int = QUERIES


def choose(results: Sequence[QueryResult], wanted: Wanted, others: Sequence[QueryResult] = ()) -> list[int]:
    """The queries that were asked for.

    Args:
        results: of every query.
        wanted: which.
        others: of the same queries by another run.

    Returns:
        Indices in the order to show. A query without a match in the gallery is taken only by its name.

    Raises:
        InputError: no query is as asked for, or there is no other run to disagree with.
    """
    if wanted.names:
        return [find_query(results, name) for name in wanted.names]
    precision = torch.tensor([result.average_precision for result in results], dtype=torch.float64)
    for attribute in ("camera", "identity"):
        asked = getattr(wanted, attribute)
        if asked is not None:
            differs = torch.tensor([getattr(result, attribute) != asked for result in results])
            precision = precision.masked_fill(differs, torch.nan)
    if wanted.order == "spread":
        chosen = choose_queries(precision.numpy(), wanted.count)
    else:
        keys = _keys(precision, wanted.order, others)
        chosen = [i for i in keys.argsort(stable=True).tolist() if keys[i].isfinite()][: wanted.count]
    if not chosen:
        places = [f"{name} {value}" for name in ("camera", "identity") if (value := getattr(wanted, name)) is not None]
        what = " on which the runs disagree" if wanted.order == "disagreement" else " with a match in the gallery"
        raise InputError(f"there is no query{' of ' + ' and '.join(places) if places else ''}{what}")
    return chosen


def _keys(precision: Tensor, order: Order, others: Sequence[QueryResult]) -> Tensor:
    """Numbers that sort queries as asked, not finite for those to leave out."""
    if order == "disagreement":
        if not others:
            raise InputError("order=disagreement needs the weights of another run: --against FILE")
        theirs = torch.tensor([result.average_precision for result in others], dtype=torch.float64)
        gap = (precision - theirs).abs()
        return torch.where(gap > 0, -gap, torch.nan)
    return precision if order == "worst" else -precision


def find_query(queries: Sequence[Named], name: str) -> int:
    """The place of the query of that name; the directory and the suffix may be left out.

    Raises:
        InputError: there is none, or several have the short name.
    """
    for same in (str, lambda full: full.rsplit("/", 1)[-1], lambda full: Path(full).stem):
        found = [i for i, query in enumerate(queries) if same(query.name) == name]
        if len(found) > 1:
            raise InputError(f"{len(found)} queries are named {name!r}: {', '.join(queries[i].name for i in found)}")
        if found:
            return found[0]
    raise InputError(f"no query is named {name!r}; such as {', '.join(query.name for query in queries[:3])}")


def check_camera(dataset: Dataset, camera: str | None) -> None:
    """Refuse what no camera of a data set is called.

    Raises:
        InputError: naming those that there are.
    """
    names = list(dataset.camera_names.values())
    if camera is not None and camera not in names:
        known = f"must be one of {', '.join(names)}" if names else f"needs cameras, and {dataset.name} knows none"
        raise InputError(f"camera {known}; got {shown(camera)}")


def draw_ranked(lists: Sequence[tuple[str, RankedList]], width: Width | None = None) -> Figure:
    """Draw ranked lists below each other.

    Args:
        lists: each with the title of its run, which may be empty.
        width: of a paper's column or page; none: a column where there are at most four items.

    Returns:
        A line for each list: the query, then the items by rank, each with all of its modalities from the top. A right
        item has a solid green frame and a check mark, a wrong one a dashed red frame and a cross.
    """
    columns = 1 + max(len(ranked.results) for _, ranked in lists)
    width = width or ("column" if columns <= 5 else "page")
    stacked = [
        [_stacked(images) for images in (ranked.images, *(item.images for item in ranked.results))]
        for _, ranked in lists
    ]
    across = (WIDTHS[width] - GAP) / columns - GAP
    heights = [across * line[0].shape[1] / line[0].shape[2] for line in stacked]
    with drawing_style():
        figure = new_figure(width, sum(heights) + len(lists) * (HEAD + FOOT) + GAP)
        total, top = figure.get_figheight(), 0.0
        for (title, ranked), images, height in zip(lists, stacked, heights, strict=True):
            items: list[RankedList | RankedItem] = [ranked, *ranked.results]
            for column, (item, image) in enumerate(zip(items, images, strict=True)):
                left = GAP + column * (across + GAP)
                box = (left / WIDTHS[width], 1 - (top + HEAD + height) / total, across / WIDTHS[width], height / total)
                axes = figure.add_axes(box)
                axes.imshow(image.permute(1, 2, 0).numpy(), aspect="auto")
                _frame(axes, item, column, across)
            told = f"{title + ': ' if title else ''}{_about(ranked)}"
            most = int((WIDTHS[width] - 2 * GAP) * 72 / (0.55 * USUAL))
            told = told if len(told) <= most else f"{told[: most - 1]}…"
            figure.text(GAP / WIDTHS[width], 1 - (top + 0.08) / total, legible(told), fontsize=USUAL, va="center")
            top += height + HEAD + FOOT
    return figure


def _about(ranked: RankedList) -> str:
    return f"average precision {100 * ranked.average_precision:.1f}, {ranked.name or f'identity {ranked.identity}'}"


def _stacked(images: Tensor) -> Tensor:
    """The modalities of (M, 3, H, W) below each other with white lines between: (3, M * H + ..., W)."""
    gap = images.new_full((3, max(1, images.shape[2] // 32), images.shape[3]), 255)
    return torch.cat([part for image in images for part in (image, gap)][:-1], 1)


def _frame(axes: Axes, item: RankedList | RankedItem, rank: int, across: float) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    colour, title = INK, "query"
    line: Any = "-"
    if isinstance(item, RankedItem):
        colour, line = (RIGHT, "-") if item.correct else (WRONG, (0, (2, 1.2)))
        title = f"{rank} {'✓' if item.correct else '✗'}"
    for side in axes.spines.values():
        side.set_visible(True)
        side.set(color=colour, linewidth=1.4 if isinstance(item, RankedItem) else 0.6, linestyle=line)
    axes.set_title(title, fontsize=SMALL, color=colour, pad=2)
    camera = legible(camera_caption(item.camera, max(6, int(across * 72 / (0.55 * SMALL)))))
    axes.set_xlabel(f"id {item.identity}\n{camera}", fontsize=SMALL, color=SOFT, labelpad=2)


def ranking_table(lists: Sequence[tuple[str, RankedList]]) -> Table:
    """What the picture shows in numbers."""
    titled = any(title for title, _ in lists)
    rows: list[list[Value]] = []
    for title, ranked in lists:
        nearest = ", ".join(f"{item.identity}{'✓' if item.correct else '✗'}" for item in ranked.results)
        ranks = ", ".join(map(str, ranked.match_ranks))
        row: list[Value] = [ranked.name, ranked.identity, ranked.camera, ranked.average_precision, ranks, nearest]
        rows.append([title, *row] if titled else row)
    header = ["query", "identity", "camera", "average precision", "ranks of all matches", "identities by rank"]
    return Table("Ranked lists", ["run", *header] if titled else header, rows)


class RankingPicture(GeneralPicture):
    """What `signal-reid show ranking` draws."""

    name = "ranking"
    title = "Ranked lists"
    about = "the nearest gallery items of chosen queries, right and wrong ones marked"

    def draw(self, trained: Trained, request: Request) -> Picture:
        config, dataset = trained.config, trained.dataset
        top = TOP if request.top is None else request.top
        count = QUERIES if request.count is None else request.count
        for asked, number in (("top", top), ("count", count)):
            if number < 1:
                raise InputError(f"{asked} must be at least 1, got {number}")
        check_camera(dataset, request.camera)
        evaluator = Evaluator(config, dataset, trained.device)
        models = {"": trained.model}
        if request.against is not None:
            other, _ = load_beside(config, trained.model, dataset, request.against)
            models = {"these weights": trained.model, "against": other}
        rankings = {title: Ranking.of(evaluator.run(model), config, top, dataset) for title, model in models.items()}
        results = [ranking.results() for ranking in rankings.values()]
        wanted = Wanted(
            request.queries,
            request.order or ("spread" if request.against is None else "disagreement"),
            request.camera,
            request.identity,
            count,
        )
        chosen = choose(results[0], wanted, results[1] if len(results) > 1 else ())
        images = [reader(samples, config.data.image_size) for samples in (dataset.query, dataset.gallery)]
        lists = [(title, ranking.lists([i], *images)[0]) for i in chosen for title, ranking in rankings.items()]
        figure = draw_ranked(lists, request.width)
        caption = (
            f"Queries and their nearest gallery items, {', '.join(dataset.modalities)} from the top. A solid frame and "
            "a check mark: the query's identity; a dashed frame and a cross: another one. Below: identity and camera."
        )
        return Picture(self.name, self.title, figure, caption, tables=[ranking_table(lists)])


def reader(samples: Sequence[Sample], size: tuple[int, int]) -> Callable[[int], Tensor]:
    """From an index to the sample's images (M, 3, H, W) uint8; a sample that is in several lists is read once."""
    return cache(lambda index: decode(samples[index], size, "bilinear"))
