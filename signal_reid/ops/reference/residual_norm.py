"""Residual addition and layer normalisation, in plain PyTorch.

s = x + r; y = w n + b with n = (s - mean(s)) / d and d = sqrt(var(s) + eps), over the C channels of a row.

Backward, from g = dL/dy and h = dL/ds that comes back along the residual stream. As
dn_i / ds_j = (delta_ij - 1 / C - n_i n_j / C) / d, with a = w g:
dL/dx = dL/dr = h + (a - mean(a) - n mean(a n)) / d; dL/dw = sum of g n and dL/db = sum of g, both over the rows.
"""

import torch
from torch import Tensor


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(..., C) twice and (C,) twice -> s and y, the latter in `out_dtype`; s is x itself without a branch."""
    total = x if branch is None else (x + branch).contiguous()
    normed, _ = _normalise(total, eps)
    return total, (normed * weight + bias).to(out_dtype).contiguous()


def backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    branch_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of s and, as (2, C), of weight and bias from those of y and s, the latter None for zero.

    If `branch_dtype` is given, the gradient of s follows once more in that dtype.
    """
    normed, deviation = _normalise(total, eps)
    grad = grad_normed.to(normed.dtype)
    scaled = grad * weight
    grad_x = scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True)
    grad_x = grad_x / deviation
    if grad_total is not None:
        grad_x = grad_x + grad_total
    grad_x = grad_x.contiguous()
    rows = (-1, total.shape[-1])
    grad_affine = torch.stack([part.reshape(rows).sum(0) for part in (grad * normed, grad)])
    copy = [] if branch_dtype is None else [grad_x.to(branch_dtype)]
    return [grad_x.to(total.dtype), grad_affine.to(weight.dtype), *copy]


def _normalise(total: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n and d, in at least fp32."""
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation, deviation
