r"""Shift-aware deformable bilinear sampling, in plain PyTorch.

With s = offset_range tanh(o), a sample point of an (Hk, Wk) map lies at the normalised coordinates

    y = clamp(2 (i + 0.5) / (Hk - 1) - 1 + s / (Hk - 1), -1, 1),    x likewise with j and Wk,

-1 and 1 being the centres of the outer tokens, so at the pixel (y + 1) / 2 (H - 1). Between the rows r, r + 1 and the
columns c, c + 1 around it, with fractions f and g, it is worth

    sum_ab Y_a X_b token_ab,    Y = (1 - f, f),    X = (1 - g, g).

Backward, with v_ab = grad . token_ab: every token gets Y_a X_b grad from each point that it is a corner of, and

    d/df = sum_b X_b (v_1b - v_0b),    d/dg = sum_a Y_a (v_a1 - v_a0),
    d/do = offset_range (1 - tanh(o)^2) (d/df (H - 1) / (2 (Hk - 1)) + d/dg (W - 1) / (2 (Wk - 1))),

each axis only where its clamp does not act.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """Where the sample points lie along one axis."""

    tokens: Tensor
    """(B, 2, Hk, Wk) int64, the token before and the one after; the last token has itself after it."""
    weight: Tensor
    """(B, 2, Hk, Wk), theirs."""
    slope: Tensor
    """(B, Hk, Wk), pixels per unit of shift, 0 where clamped."""


def forward(tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float) -> Tensor:
    """(B, rows * columns, C) and (B, Hk, Wk) -> (B, Hk * Wk, C); see `signal_reid.ops.deformable_sample`."""
    y, x, _ = locate(tokens, offsets, rows, columns, offset_range)
    weight = corners(y.weight, x.weight, torch.mul)  # (B, 4, P)
    return (gather(tokens, y, x, columns) * weight[..., None]).sum(1).to(tokens.dtype).contiguous()


def backward(
    grad: Tensor, tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the offsets, given `grad` (B, Hk * Wk, C)."""
    B, N, C = tokens.shape
    y, x, squashed = locate(tokens, offsets, rows, columns, offset_range)
    spread = spread_over_corners(grad, y, x)  # (B, 4, P, C)
    grad_tokens = spread.new_zeros(B * N, C).index_add_(0, corner_rows(y, x, N, columns), spread.flatten(0, 2))
    grad_offsets = offset_gradient(grad, tokens, y, x, squashed, columns, offset_range)
    return grad_tokens.view(B, N, C).to(tokens.dtype), grad_offsets.to(offsets.dtype)


def spread_over_corners(grad: Tensor, y: Axis, x: Axis) -> Tensor:
    """(B, P, C) -> (B, 4, P, C): what each corner of a point gets of its gradient, in fp32 or wider."""
    return corners(y.weight, x.weight, torch.mul)[..., None] * grad[:, None]


def corner_rows(y: Axis, x: Axis, tokens: int, columns: int) -> Tensor:
    """The rows of those corners among the tokens of all maps, (B * 4 * P,)."""
    row = corners(y.tokens * columns, x.tokens, torch.add)
    return (torch.arange(row.shape[0], device=row.device)[:, None, None] * tokens + row).flatten()


def offset_gradient(
    grad: Tensor, tokens: Tensor, y: Axis, x: Axis, squashed: Tensor, columns: int, offset_range: float
) -> Tensor:
    """(B, P, C) -> (B, Hk, Wk), in fp32 or wider."""
    value = (gather(tokens, y, x, columns) * grad[:, None]).sum(-1).view(-1, 2, 2, *squashed.shape[1:])
    along_y = (x.weight * (value[:, 1] - value[:, 0])).sum(1)  # (B, Hk, Wk)
    along_x = (y.weight * (value[:, :, 1] - value[:, :, 0])).sum(1)
    gradient = offset_range * (1 - squashed * squashed) * (along_y * y.slope + along_x * x.slope)
    return gradient.contiguous()


def locate(tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float) -> tuple[Axis, Axis, Tensor]:
    """Both axes, and tanh of the offsets, in fp32 or wider."""
    Hk, Wk = offsets.shape[1:]
    squashed = offsets.to(torch.promote_types(tokens.dtype, torch.float32)).tanh()
    shift = squashed * offset_range
    y = _axis(_reference_points(Hk, shift)[:, None], shift, Hk, rows)
    x = _axis(_reference_points(Wk, shift), shift, Wk, columns)
    return y, x, squashed


def _reference_points(size: int, like: Tensor) -> Tensor:
    """Centres of the windows over size - 1, as the authors have them: the last one lies beyond 1."""
    return 2 * (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / (size - 1) - 1


def _axis(reference: Tensor, shift: Tensor, sampled: int, size: int) -> Axis:
    position = reference + shift / (sampled - 1)
    inside = (position >= -1) & (position <= 1)
    pixel = (position.clamp(-1, 1) + 1) / 2 * (size - 1)
    low = pixel.floor()
    fraction = pixel - low
    index = low.nan_to_num(0).long()  # a NaN makes NaN weights, not a bad index
    return Axis(
        torch.stack([index, (index + 1).clamp(max=size - 1)], 1),
        torch.stack([1 - fraction, fraction], 1),
        inside.to(pixel.dtype) * ((size - 1) / (2 * (sampled - 1))),
    )


def corners(y: Tensor, x: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(B, 2, Hk, Wk) twice -> (B, 4, P): the four corners of each point, row by row."""
    return combine(y[:, :, None], x[:, None]).flatten(1, 2).flatten(2)


def gather(tokens: Tensor, y: Axis, x: Axis, columns: int) -> Tensor:
    """The tokens at the corners of each point, (B, 4, P, C), in fp32 or wider."""
    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
    found = tokens[batch, corners(y.tokens * columns, x.tokens, torch.add)]
    return found.to(torch.promote_types(tokens.dtype, torch.float32))
