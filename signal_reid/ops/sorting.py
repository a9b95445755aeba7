"""Sorting the rows of a matrix."""

import torch
from torch import Tensor

from signal_reid.ops import library  # noqa: F401 - defines torch.ops.signal_reid
from signal_reid.ops.checks import check_tensor, has_tangent


def sort_rows(values: Tensor) -> Tensor:
    """Sort each row of a matrix in place, ascending, and return it.

    Args:
        values: (m, n), real numbers of any dtype and strides, without a gradient or tangent; NaN comes last.

    Returns:
        `values` itself.

    Raises:
        ValueError: another shape, complex numbers, or a tensor that needs a gradient or has a tangent.
        BackendError: a backend was chosen that cannot serve.
    """
    check_tensor("values", values)
    if values.ndim != 2:
        raise ValueError(f"values must be (m, n), got shape {tuple(values.shape)}")
    if values.is_complex() or values.requires_grad or has_tangent(values):
        raise ValueError(
            f"values must be real and without gradient or tangent, got {values.dtype}, {values.requires_grad=}"
        )
    torch.ops.signal_reid.sort_rows(values)
    return values
