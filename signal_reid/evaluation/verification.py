"""Verification: whether two samples show one identity, by a threshold on their distance; ROC and false-accept rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from signal_reid.evaluation.distances import CHUNK_BYTES
from signal_reid.evaluation.features import FeatureSet
from signal_reid.evaluation.metrics import distance_chunks
from signal_reid.evaluation.protocols import Candidates, SameIdentity
from signal_reid.evaluation.reranking import RerankingParameters
from signal_reid.runtime.errors import InputError

Chunks = Callable[[], Iterator[tuple[slice, Tensor, SameIdentity]]]


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold comes to: a pair is accepted whose squared distance is at most `threshold`.

    Args:
        threshold: squared Euclidean distance; None where every threshold that accepts a genuine pair accepts too many
            impostor pairs.
        false_accept_rate: share of the impostor pairs (two identities) that are accepted.
        true_accept_rate: share of the genuine pairs (one identity) that are accepted.
    """

    threshold: float | None
    false_accept_rate: float
    true_accept_rate: float


@dataclass(frozen=True, eq=False)
class ROC:
    """The receiver operating characteristic of all pairs that a protocol keeps, exact.

    Each distance of a genuine pair is a threshold; between two of them no genuine pair is gained.

    Args:
        thresholds: (T,) squared distances, ascending.
        true_accepts: (T,) genuine pairs at most so far apart.
        false_accepts: (T,) impostor pairs at most so far apart.
        ties: (T,) impostor pairs exactly so far apart.
        genuine, impostors: the numbers of pairs.
    """

    thresholds: np.ndarray
    true_accepts: np.ndarray
    false_accepts: np.ndarray
    ties: np.ndarray
    genuine: int
    impostors: int

    @property
    def true_accept_rates(self) -> np.ndarray:
        return np.asarray(self.true_accepts / self.genuine)

    @property
    def false_accept_rates(self) -> np.ndarray:
        return np.asarray(self.false_accepts / self.impostors)

    @property
    def area(self) -> float:
        """The area under the curve: how often a genuine pair is nearer than an impostor pair, a tie counting half."""
        gained = np.diff(self.true_accepts, prepend=0)
        farther = self.impostors - self.false_accepts + self.ties / 2
        return float(gained @ farther / (self.genuine * self.impostors))

    def at(self, false_accept_rate: float) -> OperatingPoint:
        """The threshold that accepts most genuine pairs without exceeding a false-accept rate in [0, 1].

        Of the thresholds that accept the same genuine pairs it is the smallest.
        """
        if not 0 <= false_accept_rate <= 1:
            raise InputError(f"false_accept_rate must be in 0..1, got {false_accept_rate}")
        allowed = int(np.searchsorted(self.false_accepts / self.impostors, false_accept_rate, side="right"))
        if allowed == 0:
            return OperatingPoint(None, 0.0, 0.0)
        at = allowed - 1
        return OperatingPoint(
            float(self.thresholds[at]), float(self.false_accept_rates[at]), float(self.true_accept_rates[at])
        )


def roc(
    query: FeatureSet,
    gallery: FeatureSet,
    protocol: str = "camera",
    normalize: bool = True,
    reranking: RerankingParameters | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> ROC:
    """Compare every query with every gallery item that the protocol keeps.

    Distances are computed twice: first those of the genuine pairs are gathered and sorted, then the impostor pairs are
    counted between them. So only the genuine pairs are held in memory, beside a chunk.

    Args:
        query, gallery, protocol, normalize, reranking, chunk_bytes: as in `retrieval_metrics`.

    Raises:
        ValueError: sets that do not fit together or to the protocol, no genuine pair, or no impostor pair.
    """

    def chunks() -> Iterator[tuple[slice, Tensor, SameIdentity]]:
        return distance_chunks(query, gallery, protocol, normalize, reranking, chunk_bytes)

    own = [distances.gather(1, same.columns)[same.match] for distances, same in _candidates(chunks)]
    thresholds, counts = torch.cat(own).unique(return_counts=True)
    if not len(thresholds):
        raise InputError(f"no genuine pair under the {protocol} protocol, so there is no ROC")
    below, ties, impostors = _count_impostors(chunks, thresholds)
    if impostors == 0:
        raise InputError("no impostor pair: query and gallery show one identity, so there is no ROC")
    accepts = counts.cumsum(0)
    found = (thresholds.double(), accepts, below.cumsum(0), ties)
    curve = [values.cpu().numpy() for values in found]
    return ROC(curve[0], curve[1], curve[2], curve[3], int(accepts[-1]), impostors)


def _candidates(chunks: Chunks) -> Iterator[tuple[Tensor, Candidates]]:
    for rows, distances, same in chunks():
        yield distances, same.candidates(rows)


def _count_impostors(chunks: Chunks, thresholds: Tensor) -> tuple[Tensor, Tensor, int]:
    """How many impostor pairs lie above the threshold before and up to each (T,), exactly at it (T,), and in all."""
    size = len(thresholds)
    within, ties = thresholds.new_zeros(size + 1, dtype=torch.int64), thresholds.new_zeros(size, dtype=torch.int64)
    impostors = 0
    for distances, same in _candidates(chunks):
        kept = torch.ones_like(distances, dtype=torch.bool)
        kept.scatter_(1, same.columns, ~(same.match | same.drop))
        for row, keep in zip(distances, kept, strict=True):  # a row at a time: indices take twice a distance's memory
            others = row[keep]
            slot = torch.searchsorted(thresholds, others)
            within += torch.bincount(slot, minlength=size + 1)
            inside = slot < size
            ties += torch.bincount(slot[inside][thresholds[slot[inside]] == others[inside]], minlength=size)
            impostors += len(others)
    return within[:size], ties, impostors
