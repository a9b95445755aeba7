"""Which gallery items a query may not be matched with."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from signal_reid.evaluation.features import FeatureSet

Protocol = Literal["camera", "scene"]

# A gallery item is dropped when it agrees with the query in all of these.
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "camera": ("identities", "cameras"),  # RGBNT201, RGBNT100
    "scene": ("identities", "scenes"),  # MSVR310
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
            if getattr(items, attribute) is None:
                raise ValueError(f"protocol {protocol} needs {attribute}, and the {name} set has none")


def dropped(protocol: str, query: FeatureSet, gallery: FeatureSet) -> Tensor:
    """The pairs that the protocol leaves out of the ranking: (q, g) bool.

    Args:
        protocol: `camera` drops the gallery items of the query's identity and camera, `scene` those of its identity
            and scene.

    Raises:
        ValueError: an unknown protocol, or a set without scenes under the scene protocol.
    """
    check_protocol(protocol, query, gallery)
    mask = torch.ones(len(query), len(gallery), dtype=torch.bool, device=gallery.features.device)
    for attribute in PROTOCOLS[protocol]:
        mask &= getattr(query, attribute)[:, None] == getattr(gallery, attribute)[None, :]
    return mask


class Candidates(NamedTuple):
    """The gallery items of each query's identity, in ascending order; a query with fewer has some repeated."""

    columns: Tensor
    """(q, S) their indices; any where a query has none."""
    valid: Tensor
    """(q, S) bool: not a repetition."""
    drop: Tensor
    """(q, S) bool: the protocol drops it, repeated or not; the others are matches."""


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
        self._query, self._gallery, self._attributes = query, gallery, PROTOCOLS[protocol]
        identities, self._order = gallery.identities.sort(stable=True)  # ascending indices within an identity
        self._first = torch.searchsorted(identities, query.identities)  # (q,)
        self._count = torch.searchsorted(identities, query.identities, right=True) - self._first
        self.most = int(self._count.max())

    def candidates(self, rows: slice) -> Candidates:
        """Those of some queries."""
        first, count = self._first[rows, None], self._count[rows, None]
        slot = torch.arange(self.most, device=first.device)
        valid = slot < count
        place = first + torch.minimum(slot, count - 1)
        columns = self._order.take(place.clamp_(0, len(self._order) - 1))
        drop = (count > 0).expand_as(columns)
        for attribute in self._attributes:
            if attribute != "identities":  # they agree
                values = getattr(self._gallery, attribute).take(columns)
                drop = drop & (values == getattr(self._query, attribute)[rows, None])
        return Candidates(columns, valid, drop)
