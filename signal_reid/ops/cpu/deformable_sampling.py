"""Shift-aware deformable bilinear sampling with token gradients that are summed in the tokens' dtype.

Few tokens are the corner of two points, so next to nothing is lost; zeroing, summing and rounding a wide copy of all
of them takes a CPU longer than all the rest.
"""

from torch import Tensor

from signal_reid.ops.reference import deformable_sampling as reference

forward = reference.forward


def backward(
    grad: Tensor, tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the offsets, given `grad` (B, Hk * Wk, C)."""
    B, N, C = tokens.shape
    y, x, squashed = reference.locate(tokens, offsets, rows, columns, offset_range)
    grad = grad.to(squashed.dtype)
    spread = reference.spread_over_corners(grad, y, x).to(tokens.dtype).flatten(0, 2)  # (B * 4 * P, C)
    grad_tokens = spread.new_zeros(B * N, C).index_add_(0, reference.corner_rows(y, x, N, columns), spread)
    grad_offsets = reference.offset_gradient(grad, tokens, y, x, squashed, columns, offset_range)
    return grad_tokens.view(B, N, C), grad_offsets.to(offsets.dtype)
