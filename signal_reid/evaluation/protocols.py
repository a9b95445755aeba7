"""Which gallery items a query may not be matched with."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from signal_reid.evaluation.features import FeatureSet
from signal_reid.runtime.errors import InputError

Protocol = Literal["camera", "scene", "none"]

# A gallery item is dropped when it agrees with the query in all of these.
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "camera": ("identities", "cameras"),  # RGBNT201, RGBNT100
    "scene": ("identities", "scenes"),  # MSVR310
    "none": ("identities", "items"),  # one's own images without cameras: the query itself alone
}


def check_protocol(protocol: str, query: FeatureSet, gallery: FeatureSet) -> None:
    """Check that the protocol exists and that both sets have what it compares.

    Raises:
        ValueError: an unknown protocol, or a set without scenes under the scene protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    for attribute in PROTOCOLS[protocol]:
        for name, items in (("query", query), ("gallery", gallery)):
            if attribute != "items" and getattr(items, attribute) is None:
                raise lacks(protocol, attribute, name)


def lacks(protocol: str, attribute: str, name: str) -> InputError:
    """The error of a set without what the protocol compares."""
    return InputError(
        f"protocol {protocol} needs {attribute}, and the {name} set has none; evaluation.protocol=none does without"
    )


def no_match(protocol: str, queries: int, gallery: int) -> InputError:
    """The error of queries of which the protocol leaves none a match."""
    sizes = f"{queries} queries, {gallery} gallery items"
    return InputError(f"no query has a match in the gallery under the {protocol} protocol ({sizes})")


def dropped(protocol: str, query: FeatureSet, gallery: FeatureSet) -> Tensor:
    """The pairs that the protocol leaves out of the ranking: (q, g) bool.

    Args:
        protocol: `camera` drops the gallery items of the query's identity and camera, `scene` those of its identity
            and scene, `none` the query itself where it is in the gallery: where `items` are equal or, without them,
            where both sets are one object.

    Raises:
        ValueError: an unknown protocol, or a set without scenes under the scene protocol.
    """
    check_protocol(protocol, query, gallery)
    mask = torch.ones(len(query), len(gallery), dtype=torch.bool, device=gallery.features.device)
    for of_query, of_gallery in ((query.identities, gallery.identities), *_compared(protocol, query, gallery)):
        mask &= of_query[:, None] == of_gallery[None, :]
    return mask


def _compared(protocol: str, query: FeatureSet, gallery: FeatureSet) -> list[tuple[Tensor, Tensor]]:
    """What query and gallery have to agree in, besides the identity, for an item to be dropped."""
    pairs = []
    for name in PROTOCOLS[protocol]:
        one, other = getattr(query, name), getattr(gallery, name)
        if name == "items" and (one is None or other is None):
            one = torch.arange(len(query), device=query.features.device)
            other = one if query is gallery else torch.full_like(gallery.identities, -1)
        if name != "identities":
            pairs.append((one, other))
    return pairs


class Candidates(NamedTuple):
    """For each query S different gallery items, among them all of its identity."""

    columns: Tensor
    """(q, S) their indices; those of the query's identity come first, in ascending order."""
    match: Tensor
    """(q, S) bool: of the query's identity, and the protocol keeps it."""
    drop: Tensor
    """(q, S) bool: the protocol drops it."""


class SameIdentity:
    """The gallery items of each query's identity, found by one sort: all that a protocol can drop or a ranking find.

    Args:
        query: q items.
        gallery: g items on the same device.
        protocol: see `dropped`.

    Attributes:
        most: S, the largest number of them that a query has.
    """

    def __init__(self, query: FeatureSet, gallery: FeatureSet, protocol: str) -> None:
        identities, order = gallery.identities.sort(stable=True)  # ascending indices within an identity
        self._first = torch.searchsorted(identities, query.identities)  # (q,)
        self._count = torch.searchsorted(identities, query.identities, right=True) - self._first
        self.most = int(self._count.max())
        self._order = torch.cat([order, order[: self.most]])  # around the end: S from anywhere are different items
        compared = _compared(protocol, query, gallery)
        self._attributes = [(of_query, of_gallery[self._order]) for of_query, of_gallery in compared]

    def candidates(self, rows: slice) -> Candidates:
        """The same for some of the queries."""
        first, count = self._first[rows], self._count[rows, None]
        match = torch.arange(self.most, device=first.device) < count
        drop = match
        for of_query, in_order in self._attributes:
            drop = drop & (self._runs(in_order, first) == of_query[rows, None])
        return Candidates(self._runs(self._order, first), match & ~drop, drop)

    def _runs(self, values: Tensor, first: Tensor) -> Tensor:
        """The S values from each of some places on: (n + S,), (q,) -> (q, S)."""
        return values.unfold(0, self.most, 1).index_select(0, first)
