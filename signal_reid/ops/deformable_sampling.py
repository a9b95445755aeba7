"""Shift-aware deformable bilinear sampling."""

import math
from typing import Any

import torch
from torch import Tensor

from signal_reid.ops import library  # noqa: F401 - defines torch.ops.signal_reid
from signal_reid.ops.checks import (
    check_floating,
    check_grid,
    check_number,
    check_same,
    in_transform,
    needs_gradient,
    refuse_second_derivative,
)
from signal_reid.ops.layout import as_autocast_promotes
from signal_reid.ops.reference import deformable_sampling as reference


def deformable_sample(tokens: Tensor, offsets: Tensor, grid_size: tuple[int, int], offset_range: float = 2.0) -> Tensor:
    """Sample a token map bilinearly at reference points that learned offsets move.

    The reference points of an (Hk, Wk) map are `2 (i + 0.5) / (Hk - 1) - 1` and likewise for columns; the same offset
    moves both axes, by `tanh(o) * offset_range / (Hk - 1)` in y and `/ (Wk - 1)` in x; the sum is clamped to [-1, 1]
    and read with `align_corners=True`. Coordinates are computed in fp32 (fp64 for fp64 input).

    Args:
        tokens: (B, H * W, C) fp32, fp16, bf16 or fp64, row by row; any strides but a unit last one.
        offsets: (B, Hk, Wk) of the same dtype, before tanh; Hk, Wk >= 2. Under autocast dtypes may differ; the widest
            serves, as in `grid_sample`.
        grid_size: (H, W), rows and columns of the token map.
        offset_range: largest shift, in units of half the map over (Hk - 1); positive.

    Returns:
        (B, Hk * Wk, C) of the tokens' dtype.

    Raises:
        ValueError: a shape, dtype, device or number outside of these.

    Source: Signal (AAAI 2026), local alignment module; Xia et al., Deformable Attention (CVPR 2022).
    """
    check_floating("tokens", tokens, "(B, H * W, C)", 3)
    check_floating("offsets", offsets, "(B, Hk, Wk)", 3)
    tokens, offsets = as_autocast_promotes(tokens, offsets)
    check_same("offsets", offsets, "tokens", tokens, (tokens.shape[0], *offsets.shape[1:]))
    check_grid(grid_size, tokens.shape[1], least=1)
    if min(offsets.shape[1:]) < 2:
        raise ValueError(f"offsets must be at least 2 x 2 (Hk, Wk), got {tuple(offsets.shape[1:])}")
    check_number("offset_range", offset_range)
    if not 0 < offset_range < math.inf:
        raise ValueError(f"offset_range must be positive and finite, got {offset_range}")
    arguments = tokens, offsets, *grid_size, float(offset_range)
    if in_transform():
        return reference.forward(*arguments)
    if needs_gradient(tokens, offsets):
        return _DeformableSample.apply(*arguments)
    return torch.ops.signal_reid.deformable_sample(*arguments)


class _DeformableSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float) -> Tensor:
        ctx.save_for_backward(tokens, offsets)
        ctx.settings = rows, columns, offset_range
        return torch.ops.signal_reid.deformable_sample(tokens, offsets, rows, columns, offset_range)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("deformable_sample", grad)
        gradients = torch.ops.signal_reid.deformable_sample_backward(grad, *ctx.saved_tensors, *ctx.settings)
        return *gradients, None, None, None
