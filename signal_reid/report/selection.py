"""Which queries a report shows, and their ranked lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from signal_reid.config import Config
from signal_reid.data import Dataset
from signal_reid.evaluation import FeatureSet, match_ranks, rank_gallery
from signal_reid.evaluation.evaluator import Evaluation, reranking_parameters
from signal_reid.report.contents import QueryResult, RankedItem, RankedList
from signal_reid.runtime.text import escaped

_Item = TypeVar("_Item")


def choose_queries(average_precision: np.ndarray, count: int) -> list[int]:
    """Queries spread evenly from the best to the worst: the best, the worst and, of an odd count, the median.

    Args:
        average_precision: (q,) of each query; NaN for a query without a match, which is never chosen.
        count: how many, fewer where there are not so many.

    Returns:
        Indices, the best first; equal ones by index.
    """
    order = np.argsort(-average_precision, kind="stable")
    return evenly(order[~np.isnan(average_precision[order])].tolist(), count)


def evenly(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of the items, evenly apart from the first to the last."""
    positions = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[round(position)] for position in positions]


@dataclass(frozen=True, eq=False)
class Ranking:
    """How a query set ranks a gallery.

    Args:
        query, gallery: the sets that were ranked.
        nearest: what `rank_gallery` gave for the whole query set: indices, distances, valid, each (q, top).
        average_precision: (q,).
        match_ranks: what `match_ranks` gave; empty where it was not asked.
        query_names, gallery_names: of the items, where known.
        camera_name: from the number of a camera to what it is called; the number where nothing else is known.
    """

    query: FeatureSet
    gallery: FeatureSet
    nearest: tuple[Tensor, Tensor, Tensor]
    average_precision: np.ndarray
    match_ranks: Sequence[Sequence[int]] = ()
    query_names: Sequence[str] = ()
    gallery_names: Sequence[str] = ()
    camera_name: Callable[[int], str] = str

    @classmethod
    def of(cls, evaluation: Evaluation, config: Config, top: int, dataset: Dataset) -> Ranking:
        """The ranking that an evaluation of a data set measured, with its `top` nearest items."""
        sets, settings = (evaluation.query, evaluation.gallery), config.evaluation
        reranking = reranking_parameters(config)
        indices, distances, valid = rank_gallery(*sets, settings.protocol, top, settings.normalize, reranking)
        ranks = match_ranks(*sets, settings.protocol, settings.normalize, reranking)
        return cls(
            evaluation.query.to("cpu"),
            evaluation.gallery.to("cpu"),
            (indices.cpu(), distances.cpu(), valid.cpu()),
            evaluation.metrics.average_precision,
            ranks,
            [sample.name for sample in dataset.query],
            [sample.name for sample in dataset.gallery],
            dataset.camera_name,
        )

    def results(self) -> list[QueryResult]:
        """What the ranking of each query came to."""
        return [self._result(i) for i in range(len(self.query))]

    def lists(
        self, queries: Sequence[int], query_images: Callable[[int], Tensor], gallery_images: Callable[[int], Tensor]
    ) -> list[RankedList]:
        """The ranked lists of some queries, with their images.

        Args:
            queries: indices into the query set.
            query_images, gallery_images: from an index to the triplet's images (M, 3, H, W) uint8.
        """
        return [self._list(i, query_images, gallery_images) for i in queries]

    def _result(self, i: int) -> QueryResult:
        first = int(self.nearest[0][i, 0])  # -1 where the protocol leaves nothing
        return QueryResult(
            _name(self.query_names, i),
            int(self.query.identities[i]),
            self.camera_name(int(self.query.cameras[i])),
            float(self.average_precision[i]),
            self._matches(i),
            _name(self.gallery_names, first) if first >= 0 else "",
            int(self.gallery.identities[first]) if first >= 0 else -1,
        )

    def _list(
        self, i: int, query_images: Callable[[int], Tensor], gallery_images: Callable[[int], Tensor]
    ) -> RankedList:
        indices, distances, valid = (part[i] for part in self.nearest)
        identity, camera = int(self.query.identities[i]), self.camera_name(int(self.query.cameras[i]))
        results = []
        for j, distance in zip(indices[valid].tolist(), distances[valid].tolist(), strict=True):
            found = int(self.gallery.identities[j])
            place, name = self.camera_name(int(self.gallery.cameras[j])), _name(self.gallery_names, j)
            results.append(RankedItem(gallery_images(j), found, place, distance, found == identity, name))
        return RankedList(
            query_images(i),
            identity,
            camera,
            float(self.average_precision[i]),
            results,
            _name(self.query_names, i),
            self._matches(i),
        )

    def _matches(self, i: int) -> Sequence[int]:
        return self.match_ranks[i] if self.match_ranks else ()


def _name(names: Sequence[str], i: int) -> str:
    return escaped(names[i]) if names else ""
