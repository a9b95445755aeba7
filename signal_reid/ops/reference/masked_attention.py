"""Attention of few queries over the tokens of all modalities times their mask, in plain PyTorch.

z = sum_n p_n x_n with p = softmax_n(u . x_n) and x_n = mask_n token_n, for each query u. A token that is masked out is
a zero vector: it takes part in the softmax, with the logit zero.

Backward, with dp_n = dz . x_n and ds = p (dp - sum_n p_n dp_n), the gradient of u . x:

    du = sum_n ds_n x_n,    dtoken_n = mask_n sum_u (ds_n u + p_n dz)
"""

import torch
from torch import Tensor


def forward(queries: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, Q, C), (B, M, N, C) and (B, M, N) -> z (B, Q, C), and for the backward p (B, Q, M * N) and x (B, M * N, C).

    Both z and x are of the queries' dtype, p of fp32 or wider.
    """
    x = (tokens.to(queries.dtype) * mask.unsqueeze(-1)).flatten(1, 2).contiguous()
    p = (queries @ x.mT).softmax(dim=-1, dtype=torch.promote_types(queries.dtype, torch.float32))
    return p.to(queries.dtype) @ x, p, x


def backward(grad: Tensor, queries: Tensor, p: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of the tokens in the queries' dtype, given `grad` (B, Q, C)."""
    dp = (grad @ x.mT).to(p.dtype)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).to(queries.dtype)  # (B, Q, M * N)
    dx = ds.mT @ queries + p.to(queries.dtype).mT @ grad  # (B, M * N, C)
    return ds @ x, dx.view(*mask.shape, x.shape[-1]) * mask.unsqueeze(-1)
