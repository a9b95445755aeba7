"""Mean average precision, cumulative matching characteristic and ranked lists of a query set against a gallery."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from signal_reid.evaluation.distances import (
    CHUNK_BYTES,
    LAST,
    SquaredDistances,
    distances_within,
    key_columns,
    order_keys,
)
from signal_reid.evaluation.features import FeatureSet
from signal_reid.evaluation.protocols import Candidates, SameIdentity, check_protocol, no_match
from signal_reid.evaluation.reranking import RerankedDistances, RerankingParameters, rows_at_once
from signal_reid.ops import sort_rows
from signal_reid.runtime.distributed import ALONE, Processes

_BYTES_PER_PAIR, _BYTES_PER_PAIR_ON_CPU = 48, 12  # distance and key of a query and a gallery item, the sort's copies
_FEW = 2**16  # gallery items, above which equal fp32 distances in a row are the rule
_BYTES_PER_CANDIDATE = 96  # indices, masks, distance, key and rank of a gallery item of the query's identity


@dataclass(frozen=True, eq=False)
class Metrics:
    """How well the queries found their identities; all numbers are fractions in [0, 1].

    Args:
        mAP: mean average precision over the valid queries.
        cmc: (max_rank,) entry r - 1 is the fraction of valid queries with a match among the first r.
        minp: mean inverse negative penalty (Ye et al., TPAMI 2021): matches over the rank of the last one.
        average_precision: (q,) of each query, NaN for a query without a match in its gallery.
        num_valid_queries: queries with a match in their gallery.
    """

    mAP: float  # noqa: N815 - the field's name
    cmc: np.ndarray
    minp: float
    average_precision: np.ndarray
    num_valid_queries: int

    def __str__(self) -> str:
        ranks = ", ".join(f"R-{r} {self.rank(r):.1%}" for r in (1, 5, 10))
        return f"mAP {self.mAP:.1%}, {ranks}"

    def rank(self, r: int) -> float:
        """The fraction of valid queries with a match among the first `r`; of a smaller gallery, among all of it."""
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        return float(self.cmc[min(r, len(self.cmc)) - 1])

    def summary(self) -> dict[str, float]:
        """The numbers one reports, for a log: mAP, rank1, rank5, rank10, mINP."""
        ranks = {f"rank{r}": self.rank(r) for r in (1, 5, 10)}
        return {"mAP": self.mAP, **ranks, "mINP": self.minp}


def retrieval_metrics(
    query: FeatureSet,
    gallery: FeatureSet,
    protocol: str = "camera",
    max_rank: int = 50,
    normalize: bool = True,
    reranking: RerankingParameters | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    processes: Processes = ALONE,
) -> Metrics:
    """Rank the gallery for each query by squared Euclidean distance and measure the rankings.

    Equal distances rank by gallery index. Plain numbers are sorted, no indices: a match's rank is where its distance
    stands among the sorted ones. Only the items of the query's own identity are looked at one by one.

    Several processes that hold the same sets share the chunks of queries and gather what each query measures: all
    return the same numbers. Whole chunks are shared because a product of other rows would round otherwise, so these
    are one process's numbers too, and a set of a single chunk keeps one process busy. Each process that has a chunk
    makes all encodings that re-ranking compares.

    Args:
        query: q items on one device.
        gallery: g items on the same device; the very object `query` where they are one set, which halves the products.
        protocol: which gallery items a query may not be matched with; see `dropped`.
        max_rank: the last rank of the CMC; a smaller gallery cuts it.
        normalize: scale features to unit length first.
        reranking: rank by k-reciprocal re-ranked distances; see `RerankedDistances` for the memory that it takes more.
        chunk_bytes: working memory beside the features; queries are taken in chunks that fit, at least one.
        processes: that share the work; each gives the same arguments.

    Raises:
        ValueError: sets that do not fit together or to the protocol, or no query has a match.
        LostProcessError: a process ended.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    chunks = distance_chunks(query, gallery, protocol, normalize, reranking, chunk_bytes, processes)
    # Not a result per chunk: small ones among the memory of freed temporaries would keep it from being used again.
    measured = torch.empty(len(query), 3, dtype=torch.float64, device=query.features.device)
    count = 0
    for rows, distances, same in chunks:
        part = _measure(*_match_positions(distances, same.candidates(rows)))
        measured[count : count + len(part)] = part
        count += len(part)
    gathered = processes.gather(measured[:count], query.features.device)
    assert gathered is not None
    precision, penalty, first = gathered.cpu().numpy().T

    valid = ~np.isnan(precision)
    if not valid.any():
        raise no_match(protocol, len(query), len(gallery))
    ranks = np.arange(min(max_rank, len(gallery)))
    return Metrics(
        mAP=float(precision[valid].mean()),
        cmc=(first[valid][:, None] <= ranks).mean(axis=0),
        minp=float(penalty[valid].mean()),
        average_precision=precision,
        num_valid_queries=int(valid.sum()),
    )


def rank_gallery(
    query: FeatureSet,
    gallery: FeatureSet,
    protocol: str = "camera",
    top: int = 10,
    normalize: bool = True,
    reranking: RerankingParameters | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest gallery items of each query that the protocol does not drop, nearest first, ties by index.

    Args:
        top: items per query; a smaller gallery cuts it. The rest as in `retrieval_metrics`.

    Returns:
        indices (q, top) int64 into the gallery, squared distances (q, top) fp32 and valid (q, top) bool. Where a
        query has fewer items left, the rest is index -1, distance infinity, not valid.

    Raises:
        ValueError: sets that do not fit together or to the protocol.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    top = min(top, len(gallery))
    indices = torch.empty(len(query), top, dtype=torch.int64, device=query.features.device)
    nearest, valid = torch.empty_like(indices, dtype=torch.float32), torch.empty_like(indices, dtype=torch.bool)
    for rows, distances, same in distance_chunks(query, gallery, protocol, normalize, reranking, chunk_bytes):
        keys = _ranking_keys(distances, same.candidates(rows)).topk(top, dim=1, largest=False).values
        torch.ne(keys, LAST, out=valid[rows])
        columns = key_columns(keys).masked_fill_(~valid[rows], 0)
        torch.gather(distances, 1, columns, out=nearest[rows])
        indices[rows] = columns
    return indices.masked_fill_(~valid, -1), nearest.masked_fill_(~valid, torch.inf), valid


def match_ranks(
    query: FeatureSet,
    gallery: FeatureSet,
    protocol: str = "camera",
    normalize: bool = True,
    reranking: RerankingParameters | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> list[list[int]]:
    """Where the matches of each query stand in its ranking, the one that `retrieval_metrics` measures.

    Args:
        query, gallery, protocol, normalize, reranking, chunk_bytes: as in `retrieval_metrics`.

    Returns:
        For each query the ranks of all its matches, ascending, from 1; an empty list for a query without a match. The
        mean of k / rank over the k-th of n matches is the query's average precision.

    Raises:
        ValueError: sets that do not fit together or to the protocol.
    """
    ranks: list[list[int]] = []
    for rows, distances, same in distance_chunks(query, gallery, protocol, normalize, reranking, chunk_bytes):
        positions, counts = _match_positions(distances, same.candidates(rows))
        matches = zip((positions + 1).tolist(), counts.tolist(), strict=True)
        ranks += [found[:count] for found, count in matches]
    return ranks


def distance_chunks(
    query: FeatureSet,
    gallery: FeatureSet,
    protocol: str,
    normalize: bool,
    reranking: RerankingParameters | None,
    chunk_bytes: int,
    processes: Processes = ALONE,
) -> Iterator[tuple[slice, Tensor, SameIdentity]]:
    """Rows of queries and their distances (rows, g), as many as fit the memory; the next overwrite them.

    Of several processes each gets the rows of its share, which may be none. See `retrieval_metrics` for the arguments.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    _check_sets(query, gallery)
    check_protocol(protocol, query, gallery)
    same = SameIdentity(query, gallery, protocol)
    bytes_per_pair = _BYTES_PER_PAIR_ON_CPU if query.features.device.type == "cpu" else _BYTES_PER_PAIR
    bytes_per_query = bytes_per_pair * len(gallery) + _BYTES_PER_CANDIDATE * same.most
    step = max(1, chunk_bytes // bytes_per_query)
    if reranking is not None:
        reranking.check(len(query), len(gallery))
        step = min(step, rows_at_once(len(query) + len(gallery), chunk_bytes))
    starts = processes.share(range(0, len(query), step))
    if not starts:
        return
    if reranking is not None:
        reranked = RerankedDistances(query.features, gallery.features, reranking, normalize, chunk_bytes)
        for start in starts:
            some = slice(start, min(start + step, len(query)))
            yield some, reranked(some), same
        return
    if len(query) <= step and query is gallery:
        yield slice(None), distances_within(query.features, normalize), same
        return
    distances_to_gallery = SquaredDistances(gallery.features, normalize)
    distances = torch.empty(min(step, len(query)), len(gallery), device=query.features.device)
    for start in starts:
        rows = query.features[start : start + step]
        yield slice(start, start + step), distances_to_gallery(rows, out=distances[: len(rows)]), same


def _check_sets(query: FeatureSet, gallery: FeatureSet) -> None:
    for name, items in (("query", query), ("gallery", gallery)):
        if not len(items):
            raise ValueError(f"{name} must hold at least one item, got none")
    if query.features.shape[1] != gallery.features.shape[1]:
        raise ValueError(
            "query and gallery features must be of one size, "
            f"got {query.features.shape[1]} and {gallery.features.shape[1]}"
        )
    if query.features.device != gallery.features.device:
        raise ValueError(
            f"query and gallery must be on one device, got {query.features.device} and {gallery.features.device}"
        )


def _match_positions(distances: Tensor, same: Candidates) -> tuple[Tensor, Tensor]:
    """Where each query's matches stand in its ranking.

    Plain distances are sorted, and a match's position is where its own stands among them. Where it is as far as another
    item, which comes first is a question of their indices: such queries are sorted once more, with indices.

    Args:
        distances: (q, g) fp32, not negative.
        same: gallery items with all of each query's identity among them.

    Returns:
        positions (q, S) counted from 0, ascending, where the first counts[i] of row i are meant; counts (q,).
    """
    counts = same.match.sum(dim=1)
    if distances.shape[1] > _FEW:
        return _positions_by_key(distances, same), counts
    ordered = distances.clone(memory_format=torch.contiguous_format)
    starts = torch.arange(0, ordered.numel(), ordered.shape[1], device=ordered.device)[:, None]
    places = same.columns + starts  # one index is much faster than two
    own = ordered.view(-1)[places]
    ordered.view(-1)[places] = own.masked_fill(same.drop, torch.inf)
    own = sort_rows(own.masked_fill_(~same.match, torch.nan))  # behind the others, and equal to nothing
    positions = torch.searchsorted(sort_rows(ordered), own)

    after = (positions + (starts + 1)).clamp_(max=ordered.numel() - 1)
    tied = ordered.view(-1)[after] == own  # if with the next row's first, this one is only sorted in vain
    if tied.any():
        at_once = max(1, len(distances) // 4)  # their distances are copied
        for rows in tied.any(dim=1).nonzero()[:, 0].split(at_once):
            positions[rows] = _positions_by_key(distances[rows], Candidates(*(part[rows] for part in same)))
    return positions, counts


def _positions_by_key(distances: Tensor, same: Candidates) -> Tensor:
    """As the positions of `_match_positions`, by sorting keys that hold the index too: slower, ties cost nothing."""
    keys = _ranking_keys(distances, same)
    own = keys.gather(1, same.columns).masked_fill_(~same.match, LAST)
    return sort_rows(torch.searchsorted(sort_rows(keys), own))


def _ranking_keys(distances: Tensor, same: Candidates) -> Tensor:
    """`order_keys` in which what the protocol drops comes last."""
    keys = order_keys(distances)
    return keys.scatter_(1, same.columns, keys.gather(1, same.columns).masked_fill_(same.drop, LAST))


def _measure(positions: Tensor, counts: Tensor) -> Tensor:
    """Average precision, inverse negative penalty and the first match's position: (q, 3) fp64.

    A query without a match has NaN in the first two.
    """
    found = torch.full((len(counts), 3), torch.nan, dtype=torch.float64, device=counts.device)
    if positions.shape[1]:
        ordinal = torch.arange(1, positions.shape[1] + 1, device=positions.device)
        precision = (ordinal / (positions + 1).double()).masked_fill_(ordinal > counts[:, None], 0)
        last = positions.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        found[:, 0] = precision.sum(dim=1) / counts
        found[:, 1] = (counts / (last + 1).double()).masked_fill_(counts == 0, torch.nan)
        found[:, 2] = positions[:, 0]
    return found
