"""The nearest features by inner product, exactly, in bounded memory.

A cheap product comes first, with a bound on its error; only items that the bound leaves a chance are multiplied in
fp64. So the results are those of an fp64 product of every pair, whatever the blocks, the threads and the shards were.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from signal_reid.evaluation.distances import exact_products

_NO_ROW = torch.iinfo(torch.int64).max
_AT_ONCE = 2**22  # numbers that are multiplied in fp64 at a time
_UNIT = 2.0**-24  # of rounding to fp32
_ENCODED = 2**19  # numbers that are encoded at a time, few enough for a cache and for the allocator to keep
_WIDEST_FACTOR = 256  # of a rotation: each row takes 2 d times the sum of the factors


class Nearest:
    """The best items of each query so far: highest score first, equal scores by row.

    Args:
        queries: (m, d) fp32, of unit length.
        top: items per query.
    """

    def __init__(self, queries: Tensor, top: int) -> None:
        self.queries = queries
        self.scores = torch.full((len(queries), top), -torch.inf)  # (m, top)
        self.rows = torch.full((len(queries), top), _NO_ROW)  # (m, top)

    def offer(self, query: int, rows: Tensor, scores: Tensor) -> None:
        """Take what is better of these items: rows (c,) int64, scores (c,) fp32."""
        rows, scores = torch.cat([self.rows[query], rows]), torch.cat([self.scores[query], scores])
        by_row = rows.argsort()
        order = by_row[scores[by_row].argsort(descending=True, stable=True)][: self.rows.shape[1]]
        self.rows[query], self.scores[query] = rows[order], scores[order]

    def floor(self, lower: Tensor) -> Tensor:
        """(m,) a score that the worst item of each final list reaches, given lower bounds (m, n) of further items."""
        top = self.scores.shape[1]
        if lower.shape[1] < top:
            return self.scores[:, -1]
        return torch.maximum(self.scores[:, -1], lower.topk(top, dim=1).values[:, -1])


def merge(queries: Tensor, top: int, parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The best of several searches of the same queries: scores and rows (m, top) of each in, and of all out."""
    nearest = Nearest(queries, top)
    for scores, rows in parts:
        for query in range(len(queries)):
            nearest.offer(query, rows[query], scores[query])
    return nearest.scores, nearest.rows


def exact_scores(query: Tensor, features: Tensor) -> Tensor:
    """Inner products (n,) of a query (d,) and features (n, d), summed in fp64 and rounded to fp32."""
    step = max(1, _AT_ONCE // features.shape[1])
    wide = query.double()
    return torch.cat([(part.double() * wide).sum(1) for part in features.split(step)]).float()


def search_block(nearest: Nearest, first: int, features: Tensor) -> None:
    """Search some features that are in memory.

    Args:
        nearest: what was found before, and what is found.
        first: the row of the first of them.
        features: (n, d) fp16 or fp32.
    """
    queries, wide = nearest.queries, features.float()
    with exact_products(torch.float32):
        rough = queries @ wide.t()  # (m, n)
    # A sum of d products in fp32 is off by less than (d + 1) units times the sum of their sizes (Higham, section 3.1).
    error = 2 * (queries.shape[1] + 1) * _UNIT * wide.norm(dim=1) + _UNIT  # (n,)
    chosen = (rough + error) >= nearest.floor(rough - error)[:, None]
    for query in range(len(queries)):
        rows = chosen[query].nonzero()[:, 0]
        nearest.offer(query, rows + first, exact_scores(queries[query], features[rows]))


class Rotation(NamedTuple):
    """An orthogonal matrix, the Kronecker product of two: it spreads what a few numbers of a feature hold over all."""

    left: Tensor  # (a, a)
    right: Tensor  # (b, b), a b = d

    def __call__(self, features: Tensor) -> Tensor:
        """Features (n, d) fp32 seen from other axes; their inner products stay."""
        grid = features.unflatten(1, (len(self.left), len(self.right)))
        return ((grid @ self.right).transpose(1, 2) @ self.left).flatten(1)


def make_rotation(dimension: int) -> Rotation:
    """A rotation of features of this size, the same everywhere; none where it has no two small factors."""
    a = next(a for a in range(int(dimension**0.5), 0, -1) if dimension % a == 0)
    factors = (a, dimension // a) if max(a, dimension // a) <= _WIDEST_FACTOR else (1, 1)
    generator = torch.Generator().manual_seed(0)
    made = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in factors]
    if factors == (1, 1):
        return Rotation(torch.ones(1, 1), torch.ones(1, 1))
    return Rotation(made[0].float(), made[1].float())


class Codes:
    """Features as 8-bit codes, a quarter of fp32: the cheap product of a search reads nothing else.

    Every item has the norm of what its code leaves out, so that by Cauchy and Schwarz each product's error is bounded.
    A search reads d bytes an item, and only the items that are left are read from the features themselves.

    Args:
        rows: n.
        dimension: d.
    """

    def __init__(self, rows: int, dimension: int) -> None:
        self.codes = torch.empty(rows, dimension, dtype=torch.int8)
        self.scale = torch.empty(rows)
        self.residual = torch.empty(rows)  # |feature - code|
        self.norm = torch.empty(rows)  # |code|
        self.rotation = make_rotation(dimension)
        self._step = max(1, _ENCODED // dimension)
        self._integer = _multiplies_integers(dimension)

    def fill(self, first: int, features: Tensor) -> None:
        """Encode features (n, d) as the rows from `first`."""
        for part in features.split(self._step):
            rows = slice(first, first + len(part))
            self.codes[rows], self.scale[rows], self.residual[rows], self.norm[rows] = self._encode(part.float())
            first = rows.stop

    def search(self, nearest: Nearest, first: int, features: np.ndarray) -> None:
        """Search all rows.

        Args:
            nearest: what was found before, and what is found.
            first: the number of row 0.
            features: (n, d) the features that were encoded; few of them are read.
        """
        queries = nearest.queries
        code, scale, residual, _ = self._encode(queries)
        rough = self._products(code) * scale[:, None]  # (m, n)
        rough *= self.scale
        # |q x - q' x'| <= |q| |x - x'| + |q - q'| |x'|; rotating in fp32 adds a few units for each number summed.
        rounding = 8 * (sum(map(len, self.rotation)) + queries.shape[1]) * _UNIT
        error = (
            torch.outer(queries.norm(dim=1), self.residual).addmm_(residual[:, None], self.norm[None]).add_(rounding)
        )
        chosen = (rough + error) >= nearest.floor(rough - error)[:, None]
        for query in range(len(queries)):
            rows = chosen[query].nonzero()[:, 0]
            for part in rows.split(max(1, _AT_ONCE // queries.shape[1])):
                search_few(nearest, query, first, part, torch.from_numpy(features[part.numpy()]))

    def _encode(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        turned = self.rotation(features) if len(self.rotation.right) > 1 else features.clone()
        least, most = turned.aminmax(dim=1)
        scale = torch.maximum(-least, most).clamp_(min=1e-30) / 127
        steps = (turned / scale[:, None]).round_().clamp_(-127, 127)
        residual = turned.addcmul_(steps, scale[:, None], value=-1)
        return steps.to(torch.int8), scale, residual.norm(dim=1), steps.norm(dim=1) * scale

    def _products(self, query: Tensor) -> Tensor:
        """Products (m, n) of the queries' codes (m, d) with all codes."""
        if self._integer:
            at_once = (
                1 if len(query) < 3 else len(query)
            )  # a product with one column is a pass over memory, others are not
            return torch.cat([torch._int_mm(self.codes, part.t()).t() for part in query.split(at_once)]).float()
        result = torch.empty(len(query), len(self.codes))
        wide = query.float()
        for part, out in zip(self.codes.split(self._step), result.split(self._step, dim=1), strict=True):
            torch.mm(wide, part.float().t(), out=out)
        return result


def search_few(nearest: Nearest, query: int, first: int, rows: Tensor, features: Tensor) -> None:
    """Search some rows for one query: first in fp32, then in fp64 those that are left.

    Args:
        rows: (c,) int64.
        features: (c, d) of these rows.
    """
    if not len(rows):
        return
    one = Nearest(nearest.queries[query : query + 1], nearest.scores.shape[1])
    one.scores[0], one.rows[0] = nearest.scores[query], nearest.rows[query]
    wide = features.float()
    with exact_products(torch.float32):
        rough = one.queries @ wide.t()  # (1, c)
    error = 2 * (one.queries.shape[1] + 1) * _UNIT * wide.norm(dim=1) + _UNIT
    chosen = ((rough + error) >= one.floor(rough - error)[:, None])[0].nonzero()[:, 0]
    nearest.offer(query, rows[chosen] + first, exact_scores(one.queries[0], features[chosen]))


def _multiplies_integers(dimension: int) -> bool:
    """Whether PyTorch multiplies 8-bit integers here without losing a digit: old processors saturate 16-bit sums."""
    largest = torch.full((32, dimension), 127, dtype=torch.int8)
    try:
        product = torch._int_mm(largest, largest[:1].t())
    except (AttributeError, RuntimeError):
        return False
    return bool((product == 127 * 127 * dimension).all())
