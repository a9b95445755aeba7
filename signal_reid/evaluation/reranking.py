"""k-reciprocal re-ranking (Zhong et al., CVPR 2017) in sparse rows, without a loop over the items.

Encodings, their running sums and the Jaccard distance are kept in half precision, like in the implementation that
published numbers come from: in single precision mAP moves by about 2e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from signal_reid.evaluation.distances import CHUNK_BYTES, SquaredDistances, distances_within, key_columns, order_keys
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.threads import map_on_threads, split_rows, stream_on_threads

_BYTES_PER_PAIR = 40  # distance, sort key and what sorting takes of an item and another
_VISITS = 2**19  # weights that a step of the Jaccard distance visits on a CPU, in 32 MiB


@dataclass(frozen=True)
class RerankingParameters:
    """The sizes of the neighbourhoods and the weight of the original distance.

    Args:
        k1: neighbours whose reciprocity is asked for.
        k2: neighbours over which the encodings are averaged, the item itself included; 1 leaves them alone.
        lambda_value: weight of the original distance, the Jaccard distance has the rest.

    Raises:
        ValueError: a value outside its range.
    """

    k1: int = 50
    k2: int = 15
    lambda_value: float = 0.3

    def __post_init__(self) -> None:
        for name in ("k1", "k2"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.lambda_value <= 1:
            raise ValueError(f"lambda_value must be in 0..1, got {self.lambda_value}")

    def check(self, queries: int, gallery: int) -> None:
        """Check that the neighbourhoods fit into a set of this many queries and gallery items.

        Raises:
            ValueError: k1 or k2 larger than the set.
        """
        total = queries + gallery
        for name, value, limit in (("k1", self.k1, total - 1), ("k2", self.k2, total)):
            if value > limit:
                raise InputError(
                    f"{name} must be in 1..{limit} for {queries} queries and {gallery} gallery items, got {value}"
                )


@dataclass(frozen=True)
class _SparseRows:
    """A matrix by its non-zero entries: row i has `length[i]` of them from `start[i]` on, in ascending columns."""

    start: Tensor
    length: Tensor
    column: Tensor
    value: Tensor

    @staticmethod
    def compress(rows: Callable[[slice], Tensor], parts: Sequence[slice], device: torch.device) -> _SparseRows:
        """The matrix of which `rows` computes some dense rows (c, N); the parts are all rows in their order."""

        def compressed(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            chunk = rows(part)
            row, column = chunk.nonzero(as_tuple=True)
            return torch.bincount(row, minlength=len(chunk)), column, chunk[row, column]

        # Not a list of all results: small ones among the memory of freed temporaries would keep it from being reused.
        length = torch.empty(parts[-1].stop, dtype=torch.int64, device=device)
        column, value, used = length[:0], length[:0].half(), 0
        for part, found in zip(parts, stream_on_threads(compressed, parts, device), strict=True):
            length[part], columns, values = found
            column, value = _appended(column, used, columns), _appended(value, used, values)
            used += len(columns)
        return _SparseRows(length.cumsum(0) - length, length, column[:used], value[:used])

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All entries of the rows asked for: which of `rows` each is of, its column and its value."""
        length = self.length[rows]
        owner = torch.repeat_interleave(length)
        before = length.cumsum(0) - length
        entry = (self.start[rows] - before).index_select(0, owner)
        entry += torch.arange(len(owner), device=rows.device)
        return owner, self.column.index_select(0, entry), self.value.index_select(0, entry)

    def first(self, count: int) -> _SparseRows:
        """The first rows, without the memory of the others."""
        entries = int(self.length[:count].sum())
        parts = (self.start[:count], self.length[:count], self.column[:entries], self.value[:entries])
        return _SparseRows(*(part.clone() for part in parts))

    def transposed(self, rows: Tensor) -> _SparseRows:
        """The chosen rows as columns of the result."""
        owner, column, value = self.entries(rows)
        order = column.argsort(stable=True)
        length = torch.bincount(column, minlength=len(self.length))
        return _SparseRows(length.cumsum(0) - length, length, owner[order], value[order])


def reranked_distances(
    query: Tensor,
    gallery: Tensor,
    parameters: RerankingParameters,
    normalize: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """All re-ranked distances at once, (q, g) fp32; see `RerankedDistances` for arguments, values and errors."""
    reranked = RerankedDistances(query, gallery, parameters, normalize, chunk_bytes)
    result = query.new_empty(len(query), len(gallery), dtype=torch.float32)
    for start in range(0, len(query), reranked.rows_at_once):
        rows = slice(start, min(start + reranked.rows_at_once, len(query)))
        result[rows] = reranked(rows)
    return result


def _appended(buffer: Tensor, used: int, more: Tensor) -> Tensor:
    """A buffer, or one of twice the size where its room ends, with more behind the part of it that is used."""
    stop = used + len(more)
    if stop > len(buffer):
        smaller, buffer = buffer, buffer.new_empty(max(2 * used, stop))
        buffer[:used] = smaller[:used]
    buffer[used:stop] = more
    return buffer


class RerankedDistances:
    """Distances that take the neighbourhoods of both items into account, some queries at a time.

    Each of the N = q + g items is encoded by weights over its k-reciprocal neighbours and theirs (equation 7 of the
    paper), averaged over its nearest items; two encodings compare by Jaccard distance (equation 10), blended with the
    squared Euclidean distance relative to the query's farthest item (equation 12).

    Memory beside the features and a copy of them: `chunk_bytes`; 9 bytes for each of the max(k1 + 1, k2) neighbours of
    an item; and at most 72 bytes for each weight of the encodings while they are made, 10 after. No item has more than
    k2 (k1 + 1) (k1 / 2 + 2) weights, and items of real features have some hundred. Nothing is N x N or q x g, unless
    it fits in `chunk_bytes`.

    Args:
        query: (q, d) features.
        gallery: (g, d) features on the same device.
        parameters: k1 up to N - 1, k2 up to N.
        normalize: scale features to unit length first.
        chunk_bytes: working memory for dense rows, of which there is at least one for each thread.

    Attributes:
        rows_at_once: about how many queries should be asked for at once.

    Raises:
        ValueError: k1 or k2 larger than the set.
    """

    def __init__(
        self,
        query: Tensor,
        gallery: Tensor,
        parameters: RerankingParameters,
        normalize: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        parameters.check(len(query), len(gallery))
        features = torch.cat([query, gallery])  # (N, d)
        total = len(features)
        self.rows_at_once = rows_at_once(total, chunk_bytes)
        self._queries, self._size, self._chunk_bytes = len(query), len(gallery), chunk_bytes
        self._lambda = parameters.lambda_value
        self._relative = _RelativeDistances(features, normalize, self.rows_at_once, keep=4 * total**2 <= chunk_bytes)
        neighbours = _neighbours(self._relative, max(parameters.k1 + 1, parameters.k2))
        encodings = _encodings(self._relative, neighbours, parameters.k1, chunk_bytes)
        if parameters.k2 > 1:
            encodings = _averages(encodings, neighbours[:, : parameters.k2], chunk_bytes)
        gallery_items = torch.arange(len(query), total, device=features.device)
        self._gallery = encodings.transposed(gallery_items)
        self._encodings = encodings.first(len(query))

    def __call__(self, rows: slice) -> Tensor:
        """The distances of some queries to the gallery: (c, g) fp32, not negative, about 1 at most."""
        device, count = self._encodings.length.device, rows.stop - rows.start
        result = torch.empty(count, self._size, device=device)
        relative = self._relative.of(rows)[:, self._queries :]

        def compute(part: slice) -> None:
            queries = slice(rows.start + part.start, rows.start + part.stop)
            jaccard = _jaccard_distances(self._encodings, self._gallery, queries, self._size, visits_at_once)
            # A tensor as the factor: it is rounded to half precision too.
            result[part] = jaccard.mul_(torch.full_like(jaccard[:1, :1], 1 - self._lambda))
            result[part].add_(relative[part], alpha=self._lambda)

        visits_at_once = min(_VISITS, self._chunk_bytes // (64 * _threads(device)))
        at_most = count
        if device.type != "cpu":
            at_most = self._chunk_bytes // (64 * max(1, int(self._gallery.length.max())))
        map_on_threads(compute, split_rows(count, at_most, device), device)
        return result


def rows_at_once(items: int, chunk_bytes: int) -> int:
    """How many rows of N items fit into the working memory, with what is computed of them; at least one."""
    return max(1, chunk_bytes // (_BYTES_PER_PAIR * items))


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


def _parts(count: int, bytes_of_row: int, chunk_bytes: int, device: torch.device) -> list[slice]:
    """Slices of `count` rows, as many of which fit into the working memory as there are threads."""
    return split_rows(count, chunk_bytes // (bytes_of_row * _threads(device)), device)


class _RelativeDistances:
    """Squared distances of all items to all (N, N), as fractions of each row's largest.

    Args:
        features: (N, d).
        normalize: scale features to unit length first.
        rows_at_once: how many rows a chunk has.
        keep: hold all of them; else each chunk is computed whenever it is asked for.
    """

    def __init__(self, features: Tensor, normalize: bool, rows_at_once: int, keep: bool) -> None:
        self.rows_at_once, self.total, self.device = rows_at_once, len(features), features.device
        self._kept = _as_fractions(distances_within(features, normalize)) if keep else None
        self._to_all = None if keep else SquaredDistances(features, normalize)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The distances of all items, some rows (c, N) at a time, to be read only."""
        for start in range(0, self.total, self.rows_at_once):
            rows = slice(start, min(start + self.rows_at_once, self.total))
            yield rows, self.of(rows)

    def of(self, rows: slice) -> Tensor:
        """The distances of some items (c, N), to be read only."""
        if self._to_all is None:
            assert self._kept is not None
            return self._kept[rows]
        return _as_fractions(self._to_all(self._to_all.features[rows]))


def _as_fractions(distances: Tensor) -> Tensor:
    farthest = distances.amax(dim=1, keepdim=True)
    # Where all items coincide, every distance is zero already.
    return distances.div_(farthest.where(farthest > 0, 1))


def _neighbours(relative: _RelativeDistances, count: int) -> Tensor:
    """The nearest items of each (N, count), nearest first, ties by index."""
    # Not a result per chunk: small ones among the memory of freed temporaries would keep it from being used again.
    nearest = torch.empty(relative.total, count, dtype=torch.int64, device=relative.device)
    for rows, distances in relative.chunks():

        def find(part: slice, found: Tensor = nearest[rows], distances: Tensor = distances) -> None:
            found[part] = key_columns(order_keys(distances[part]).topk(count, dim=1, largest=False).values)

        map_on_threads(find, split_rows(len(distances), len(distances), relative.device), relative.device)
    return nearest


def _encodings(relative: _RelativeDistances, neighbours: Tensor, k1: int, chunk_bytes: int) -> _SparseRows:
    """The weights of each item over its expanded k-reciprocal neighbours, summing to 1: (N, N) fp16."""
    near = neighbours[:, : k1 + 1]
    half_near = neighbours[:, : round(k1 / 2) + 1]
    bytes_of_row = 32 * near.shape[1] * half_near.shape[1] + 40 * len(near)
    parts = _parts(len(near), bytes_of_row, chunk_bytes, near.device)
    mutual, half_mutual = (_mutual(items, parts) for items in (near, half_near))

    def encode(rows: slice) -> Tensor:
        expanded = _expand(near[rows], mutual[rows], half_near, half_mutual)
        # Among many duplicates an item may not be one of its own nearest; it always has a weight.
        expanded.diagonal(rows.start).fill_(True)
        weights = relative.of(rows).neg().exp_().mul_(expanded)
        return (weights / weights.sum(dim=1, keepdim=True)).half()

    return _SparseRows.compress(encode, parts, near.device)


def _expand(near: Tensor, mutual: Tensor, half_near: Tensor, half_mutual: Tensor) -> Tensor:
    """The mutual neighbours of some items and of the neighbours that join them: (c, N) bool.

    A neighbour joins with its own mutual neighbours, of the nearest half, where more than two thirds are the item's.

    Args:
        near, mutual: (c, k) of the items.
        half_near, half_mutual: (N, h) of all items.
    """
    total = len(half_near)
    members = near.new_zeros(len(near), total + 1, dtype=torch.bool)  # the last column takes what does not join
    members.scatter_(1, near, mutual)
    theirs, is_mutual = half_near[near], half_mutual[near]  # (c, k, h)
    shared = members.gather(1, theirs.flatten(1)).view_as(theirs).logical_and_(is_mutual).sum(dim=2)
    joins = mutual & (3 * shared > 2 * is_mutual.sum(dim=2))  # (c, k)
    theirs.masked_fill_(~is_mutual.logical_and_(joins[:, :, None]), total)
    return members.scatter_(1, theirs.flatten(1), True)[:, :total]


def _mutual(near: Tensor, parts: Sequence[slice]) -> Tensor:
    """Whether each neighbour counts the item among its own neighbours: (N, k) bool."""
    items = torch.arange(len(near), device=near.device)

    def counts_it(rows: slice) -> Tensor:
        return (near[near[rows]] == items[rows, None, None]).any(dim=2)

    return torch.cat(map_on_threads(counts_it, parts, near.device))


def _averages(encodings: _SparseRows, nearest: Tensor, chunk_bytes: int) -> _SparseRows:
    """The mean of the encodings of each item's nearest (N, k2): (N, N) fp16."""
    total, k2 = nearest.shape
    bytes_of_row = 16 * total + 64 * k2 * int(encodings.length.max())

    def average(rows: slice) -> Tensor:
        row, column, value = encodings.entries(nearest[rows].flatten())
        # Weights are at most 1 and multiples of 2^-24, so fp64 adds them without rounding, in whatever order.
        mean = torch.zeros((rows.stop - rows.start) * total, dtype=torch.float64, device=nearest.device)
        mean.index_add_(0, (row // k2).mul_(total).add_(column), value.double())
        return mean.view(-1, total).float().div_(k2).half()

    parts = _parts(total, bytes_of_row, chunk_bytes, nearest.device)
    return _SparseRows.compress(average, parts, nearest.device)


def _jaccard_distances(
    encodings: _SparseRows, gallery: _SparseRows, queries: slice, size: int, visits_at_once: int
) -> Tensor:
    """1 - sum(min) / sum(max) of the encodings of some queries (rows) and of each gallery item (columns): (c, g) fp16.

    Rows sum to 1, so sum(max) = 2 - sum(min); and the minimum is zero but where both have a weight, so of the gallery
    only the weights in a column that the query uses are visited.

    Args:
        size: g.
        visits_at_once: about how many weights of the gallery are visited at a time on a CPU.
    """
    shared = encodings.value.new_zeros(queries.stop - queries.start, size)
    cells = shared.view(-1)
    first_cells = torch.arange(0, len(cells), size, device=cells.device)
    first_cell = torch.repeat_interleave(first_cells, encodings.length[queries])
    first = int(encodings.start[queries.start])
    for entry in _in_order(encodings, gallery.length, queries, visits_at_once):
        owner, item, value = gallery.entries(encodings.column[entry])
        smaller = torch.minimum(encodings.value[entry].index_select(0, owner), value)
        cells.index_add_(0, item.add_(first_cell[entry - first].index_select(0, owner)), smaller)
    return shared.div_(2 - shared).neg_().add_(1).clamp_(min=0)


def _in_order(encodings: _SparseRows, visits: Tensor, rows: slice, visits_at_once: int) -> Iterator[Tensor]:
    """The entries of some rows, a block at a time, so that sums over them round alike on every device.

    Half precision rounds every sum, so a row's entries must be added in one order. A CPU's `index_add_` keeps the
    order of what it is given: any number of entries at once. A GPU's does not: it is given one entry of each row.

    Args:
        visits: (N,) how many weights of the gallery a column has.
        visits_at_once: about how many of them a block has on a CPU.
    """
    start, length = encodings.start[rows], encodings.length[rows]
    if visits.device.type != "cpu":
        for slot in range(int(length.max())):
            yield start[length > slot] + slot
        return
    entries = torch.arange(int(start[0]), int(start[-1] + length[-1]))
    block = visits[encodings.column[entries]].cumsum(0).div_(max(1, visits_at_once), rounding_mode="floor")
    yield from entries.split(torch.unique_consecutive(block, return_counts=True)[1].tolist())
