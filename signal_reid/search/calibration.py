"""The score from which on two items are taken for one identity, at a stated rate of false acceptance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from signal_reid.runtime.errors import InputError

_ROWS = 1024  # items whose scores are in memory at a time
_MOST_KEPT = 2**26  # scores of the highest, in memory


@dataclass(frozen=True)
class Threshold:
    """A score, and how it does on the labelled items that it was chosen on.

    Args:
        score: the least that is accepted.
        false_accept_rate: share of the pairs of different identities that reach it.
        true_accept_rate: share of the pairs of one identity that reach it.
        impostor_pairs, genuine_pairs: how many pairs there were.
    """

    score: float
    false_accept_rate: float
    true_accept_rate: float
    impostor_pairs: int
    genuine_pairs: int


def calibrate(features: Tensor, identities: Tensor, rate: float) -> Threshold:
    """The lowest threshold at which no more than `rate` of the pairs of different identities are accepted.

    Args:
        features: (n, d) of unit length.
        identities: (n,) int64.
        rate: in [0, 1).

    Raises:
        InputError: another rate, no pair of different identities or none of one, or more false pairs than fit memory.
    """
    if not 0 <= rate < 1:
        raise InputError(f"the false-accept rate must be in [0, 1), got {rate:g}")
    counts = identities.unique(return_counts=True)[1]
    genuine = int((counts * (counts - 1) // 2).sum())
    impostors = len(identities) * (len(identities) - 1) // 2 - genuine
    if not genuine or not impostors:
        raise InputError(
            f"a threshold needs items of two identities and two items of one: got {len(identities)} items with a "
            f"known identity, {impostors} pairs of different identities and {genuine} of one"
        )
    allowed = math.floor(rate * impostors)
    if allowed >= _MOST_KEPT:
        raise InputError(f"a rate of {rate:g} of {impostors} pairs is more than {_MOST_KEPT}; take fewer items")
    highest, same = _scores(features.float(), identities, allowed + 1)
    refused = highest[-1] if len(highest) > allowed else highest.new_tensor(-2.0)
    score = float(np.nextafter(np.float32(refused), np.float32(2)))
    false, true = int((highest >= score).sum()), int((same >= score).sum())
    return Threshold(score, false / impostors, true / genuine, impostors, genuine)


def _scores(features: Tensor, identities: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` highest scores of pairs of different identities, descending, and all scores of pairs of one."""
    highest, same = torch.empty(0), []
    for start in range(0, len(features), _ROWS):
        rows = slice(start, start + _ROWS)
        scores = features[rows] @ features[start:].t()  # (r, n - start)
        later = torch.ones_like(scores, dtype=torch.bool).triu_(1)
        alike = identities[rows, None] == identities[start:]
        same.append(scores[alike & later])
        others = scores[~alike & later]
        highest = torch.cat([highest, others.topk(min(keep, len(others))).values])
        highest = highest.sort(descending=True).values[:keep]
    return highest, torch.cat(same)
