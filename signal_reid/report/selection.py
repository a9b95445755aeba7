"""Which queries a report shows, and their ranked lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from signal_reid.evaluation import FeatureSet
from signal_reid.report.contents import RankedItem, RankedList
from signal_reid.runtime.text import escaped


def choose_queries(average_precision: np.ndarray, count: int) -> list[int]:
    """Queries spread evenly from the best to the worst: the best, the worst and, of an odd count, the median.

    Args:
        average_precision: (q,) of each query; NaN for a query without a match, which is never chosen.
        count: how many, fewer where there are not so many.

    Returns:
        Indices, the best first; equal ones by index.
    """
    order = np.argsort(-average_precision, kind="stable")
    order = order[~np.isnan(average_precision[order])]
    positions = np.linspace(0, len(order) - 1, min(count, len(order)))
    return [int(order[round(position)]) for position in positions]


def ranked_lists(
    queries: Sequence[int],
    query: FeatureSet,
    gallery: FeatureSet,
    ranking: tuple[Tensor, Tensor, Tensor],
    average_precision: np.ndarray,
    query_images: Callable[[int], Tensor],
    gallery_images: Callable[[int], Tensor],
    names: Sequence[str] | None = None,
) -> list[RankedList]:
    """The ranked lists of some queries, with their images.

    Args:
        queries: indices into the query set.
        query, gallery: the sets that were ranked.
        ranking: what `rank_gallery` gave for the whole query set: indices, distances, valid, each (q, top).
        average_precision: (q,).
        query_images, gallery_images: from an index to the sample's images (M, 3, H, W) uint8.
        names: of the queries, where known.
    """
    indices, distances, valid = (part.cpu() for part in ranking)
    query, gallery = query.to("cpu"), gallery.to("cpu")

    def item(identity: int, j: int, distance: float) -> RankedItem:
        found = int(gallery.identities[j])
        return RankedItem(gallery_images(j), found, int(gallery.cameras[j]), distance, found == identity)

    def one(i: int) -> RankedList:
        identity, kept = int(query.identities[i]), valid[i]
        nearest = zip(indices[i][kept].tolist(), distances[i][kept].tolist(), strict=True)
        results = [item(identity, j, distance) for j, distance in nearest]
        precision, name = float(average_precision[i]), escaped(names[i]) if names else ""
        return RankedList(query_images(i), identity, int(query.cameras[i]), precision, results, name)

    return [one(i) for i in queries]
