"""What is asked of a page besides its run: how much it shows, how large it may be, and what stands for before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from signal_reid.report.page import SIZE_LIMIT
from signal_reid.runtime.errors import InputError

PRETRAINED = "pretrained"
"""Instead of a file of weights: the model as its training began."""


@dataclass(frozen=True)
class PageRequest:
    """How much a page shows.

    Args:
        count: queries with a ranked list, at most; none: 24 of one run, 12 of several.
        top: gallery items of each.
        size_limit: bytes of the page; its images are scaled down together until it fits.
        queries: names of the queries to list, instead of `count` by `order`. Of one run, like what follows.
        order: `spread` from the best to the worst, or the `worst` or the `best` first.
        limit: test samples that a distribution is taken over, at most. Running a large model on a CPU takes about a
            second for each.
        before: weights to draw beside the run's, or `pretrained`; none: the model as training began, if it is at hand.

    Raises:
        InputError: a number below 1.
    """

    count: int | None = None
    top: int = 10
    size_limit: int = SIZE_LIMIT
    queries: Sequence[str] = ()
    order: Literal["spread", "worst", "best"] = "spread"
    limit: int = 64
    before: str | None = None

    def __post_init__(self) -> None:
        for name in ("count", "top", "size_limit", "limit"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")


USUAL = PageRequest()
"""Where nothing is asked for."""
