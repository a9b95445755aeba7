"""What a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from signal_reid.evaluation import Metrics
from signal_reid.runtime.text import is_number

Value = str | int | float


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


@dataclass(frozen=True, eq=False)
class RankedItem:
    """One gallery item of a ranked list.

    Args:
        images: (M, 3, H, W) uint8.
        identity, camera: of the item.
        distance: to the query.
        correct: whether it shows the query's identity.
    """

    images: Tensor
    identity: int
    camera: int
    distance: float
    correct: bool

    def __post_init__(self) -> None:
        _check_images(self.images)


@dataclass(frozen=True, eq=False)
class RankedList:
    """A query and its nearest gallery items, nearest first.

    Args:
        images: (M, 3, H, W) uint8, the query.
        identity, camera: of the query.
        average_precision: of the whole ranking, in [0, 1]; NaN where the gallery has no match.
        results: the items.
        name: the query's file, where known.
    """

    images: Tensor
    identity: int
    camera: int
    average_precision: float
    results: Sequence[RankedItem]
    name: str = ""

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
