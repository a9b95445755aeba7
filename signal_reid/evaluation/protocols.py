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


class Pairs(NamedTuple):
    """Pairs of one identity, in ascending order of row and column of a matrix (q, g)."""

    row: Tensor
    """(P,) query."""
    column: Tensor
    """(P,) gallery item."""
    slot: Tensor
    """(P,) which of its row's pairs it is, from 0."""
    drop: Tensor
    """(P,) bool: the protocol drops it; the others are matches."""


class SameIdentity:
    """The gallery items of each query's identity, found by one sort: all that a protocol can drop or a ranking find.

    Args:
        query: q items.
        gallery: g items on the same device.
        protocol: see `dropped`.

    Attributes:
        most: the largest number of them that a query has.
    """

    def __init__(self, query: FeatureSet, gallery: FeatureSet, protocol: str) -> None:
        self._query, self._gallery, self._attributes = query, gallery, PROTOCOLS[protocol]
        identities, self._order = gallery.identities.sort(stable=True)  # ascending indices within an identity
        self._first = torch.searchsorted(identities, query.identities)  # (q,)
        self._count = torch.searchsorted(identities, query.identities, right=True) - self._first
        self.most = int(self._count.max())

    def pairs(self, rows: slice) -> Pairs:
        """All pairs of some queries; their rows are counted from the first of them."""
        count = self._count[rows]
        row = torch.repeat_interleave(count)
        slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        column = self._order[self._first[rows][row] + slot]
        drop = torch.ones_like(row, dtype=torch.bool)
        for attribute in self._attributes:
            if attribute != "identities":  # they agree
                drop &= getattr(self._query, attribute)[rows][row] == getattr(self._gallery, attribute)[column]
        return Pairs(row, column, slot, drop)
