"""What distinguishes an identity: levels of independent attributes, drawn evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Choice = TypeVar("Choice")


class AttributeDraw:
    """Draws an identity's attributes one after another.

    Of every run of `n` identities each takes another one of an attribute's `n` choices, so that few identities show
    them all. The draw depends on the seed, the identity and the attribute alone, not on how many identities there are.
    """

    def __init__(self, seed: int, identity: int) -> None:
        self._seed, self._identity, self._attribute = seed, identity, 0

    def pick(self, choices: Sequence[Choice]) -> Choice:
        run, place = divmod(self._identity, len(choices))
        order = generator(self._seed, "attribute", self._attribute, run).permutation(len(choices))
        self._attribute += 1
        return choices[order[place]]


def generator(seed: int, *key: str | int) -> np.random.Generator:
    """A random stream of its own for each key."""
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in key]
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))
