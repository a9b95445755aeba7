"""Sorting the rows of a matrix, in plain PyTorch."""

from torch import Tensor


def sort_rows(values: Tensor) -> None:
    """Sort each row of (m, n) in place, ascending, NaN last."""
    values.copy_(values.sort(dim=1).values)
