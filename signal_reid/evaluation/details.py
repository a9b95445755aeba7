"""Beyond the summary of a ranking: precision at k, confidence intervals, breakdowns, the results of each query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from signal_reid.evaluation.distances import CHUNK_BYTES
from signal_reid.evaluation.features import FeatureSet
from signal_reid.evaluation.metrics import match_ranks
from signal_reid.evaluation.reranking import RerankingParameters
from signal_reid.runtime.errors import InputError

_DRAWS_AT_ONCE = 2**20  # queries that the bootstrap draws at a time


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a mean: fractions in [0, 1]."""

    low: float
    high: float
    level: float
    """The share of the resampled means that lie within it."""
    resamples: int


@dataclass(frozen=True)
class Group:
    """What the queries of one camera or identity came to; numbers are None where none of them has a match."""

    label: int
    """The camera or the identity."""
    queries: int
    valid_queries: int
    """Queries with a match in their gallery."""
    mAP: float | None  # noqa: N815 - the field's name
    rank1: float | None


@dataclass(frozen=True, eq=False)
class QueryRanks:
    """Where the matches of each query stand in its ranking.

    Args:
        query: the q queries.
        ranks: for each query the ranks of all its matches, ascending, from 1; see `match_ranks`.
    """

    query: FeatureSet
    ranks: Sequence[Sequence[int]]

    @property
    def average_precision(self) -> np.ndarray:
        """(q,) of each query, NaN for one without a match."""
        return np.array([np.mean(np.arange(1, len(r) + 1) / np.asarray(r)) if r else np.nan for r in self.ranks])

    def precision_at(self, k: int) -> float:
        """The share of matches among the first `k`, averaged over the queries that have a match.

        A gallery that leaves a query fewer than `k` items counts the absent ones as wrong.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        return float(np.mean([np.searchsorted(found, k, side="right") / k for found in self.ranks if found]))

    def by_camera(self) -> list[Group]:
        """What the queries of each camera came to, by camera."""
        return self._groups(self.query.cameras.cpu().numpy())

    def by_identity(self) -> list[Group]:
        """What the queries of each identity came to, by identity."""
        return self._groups(self.query.identities.cpu().numpy())

    def _groups(self, labels: np.ndarray) -> list[Group]:
        precision = self.average_precision
        first = np.array([found[0] if found else 0 for found in self.ranks])
        groups = []
        for label in np.unique(labels):
            members = labels == label
            valid = members & (first > 0)
            known = bool(valid.any())
            mean, rank1 = (float(precision[valid].mean()), float((first[valid] == 1).mean())) if known else (None, None)
            groups.append(Group(int(label), int(members.sum()), int(valid.sum()), mean, rank1))
        return groups


def query_ranks(
    query: FeatureSet,
    gallery: FeatureSet,
    protocol: str = "camera",
    normalize: bool = True,
    reranking: RerankingParameters | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> QueryRanks:
    """Rank the gallery and say where the matches of each query stand.

    Args:
        query, gallery, protocol, normalize, reranking, chunk_bytes: as in `retrieval_metrics`.

    Raises:
        ValueError: see `match_ranks`.
    """
    return QueryRanks(query, match_ranks(query, gallery, protocol, normalize, reranking, chunk_bytes))


def bootstrap_interval(values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The percentile bootstrap interval of the mean, such as of mAP over queries.

    Args:
        values: (q,) of each query, such as `Metrics.average_precision`; NaN is left out.
        level: of confidence, between 0 and 1.
        resamples: how often as many queries are drawn, with replacement.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: no value, or a level or number that cannot be.

    Source: Efron, Bootstrap Methods: Another Look at the Jackknife (1979); the percentile interval.
    """
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1, got {level}")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}")
    values = values[~np.isnan(values)]
    if not len(values):
        raise InputError("values must hold at least one number, got none")
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // len(values))
    for start in range(0, resamples, step):
        drawn = random.integers(len(values), size=(min(step, resamples - start), len(values)))
        means[start : start + step] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, resamples)
