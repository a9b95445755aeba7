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


class _Axis(NamedTuple):
    """Where the sample points lie along one axis."""

    tokens: Tensor
    """(B, 2, Hk, Wk) int64, the token before and the one after; the last token has itself after it."""
    weight: Tensor
    """(B, 2, Hk, Wk), theirs."""
    slope: Tensor
    """(B, Hk, Wk), pixels per unit of shift, 0 where clamped."""


def forward(tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float) -> Tensor:
    """(B, rows * columns, C) and (B, Hk, Wk) -> (B, Hk * Wk, C); see `signal_reid.ops.deformable_sample`."""
    y, x, _ = _locate(tokens, offsets, rows, columns, offset_range)
    weight = _corners(y.weight, x.weight, torch.mul)  # (B, 4, P)
    return (_gather(tokens, y, x, columns) * weight[..., None]).sum(1).to(tokens.dtype)


def backward(
    grad: Tensor, tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the offsets, given `grad` (B, Hk * Wk, C)."""
    B, N, C = tokens.shape
    y, x, squashed = _locate(tokens, offsets, rows, columns, offset_range)
    grad = grad.to(squashed.dtype)

    weight = _corners(y.weight, x.weight, torch.mul)
    # Summed in the tokens' dtype, as few tokens are a corner twice and a wide copy of all of them takes a CPU long.
    spread = (weight[..., None] * grad[:, None]).to(tokens.dtype)  # (B, 4, P, C)
    row = torch.arange(B, device=grad.device)[:, None, None] * N + _corners(y.tokens * columns, x.tokens, torch.add)
    grad_tokens = spread.new_zeros(B * N, C).index_add_(0, row.flatten(), spread.flatten(0, 2)).view(B, N, C)

    value = (_gather(tokens, y, x, columns) * grad[:, None]).sum(-1).view(B, 2, 2, *offsets.shape[1:])
    along_y = (x.weight * (value[:, 1] - value[:, 0])).sum(1)  # (B, Hk, Wk)
    along_x = (y.weight * (value[:, :, 1] - value[:, :, 0])).sum(1)
    grad_offsets = offset_range * (1 - squashed * squashed) * (along_y * y.slope + along_x * x.slope)
    return grad_tokens, grad_offsets.to(offsets.dtype)


def _locate(
    tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float
) -> tuple[_Axis, _Axis, Tensor]:
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


def _axis(reference: Tensor, shift: Tensor, sampled: int, size: int) -> _Axis:
    position = reference + shift / (sampled - 1)
    inside = (position >= -1) & (position <= 1)
    pixel = (position.clamp(-1, 1) + 1) / 2 * (size - 1)
    low = pixel.floor()
    fraction = pixel - low
    index = low.nan_to_num(0).long()  # a NaN makes NaN weights, not a bad index
    return _Axis(
        torch.stack([index, (index + 1).clamp(max=size - 1)], 1),
        torch.stack([1 - fraction, fraction], 1),
        inside.to(pixel.dtype) * ((size - 1) / (2 * (sampled - 1))),
    )


def _corners(y: Tensor, x: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(B, 2, Hk, Wk) twice -> (B, 4, P): the four corners of each point, row by row."""
    return combine(y[:, :, None], x[:, None]).flatten(1, 2).flatten(2)


def _gather(tokens: Tensor, y: _Axis, x: _Axis, columns: int) -> Tensor:
    """The tokens at the corners of each point, (B, 4, P, C), in fp32 or wider."""
    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
    found = tokens[batch, _corners(y.tokens * columns, x.tokens, torch.add)]
    return found.to(torch.promote_types(tokens.dtype, torch.float32))
