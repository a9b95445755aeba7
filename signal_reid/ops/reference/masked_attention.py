"""Attention of few queries over the tokens of all modalities times their mask, in plain PyTorch.

z = sum_n p_n x_n with p = softmax_n(u . x_n) and x_n = mask_n token_n, for each query u. A token that is masked out is
a zero vector: it takes part in the softmax, with the logit zero.

Backward, with dp_n = dz . x_n and ds = p (dp - sum_n p_n dp_n), the gradient of u . x:

    du = sum_n ds_n x_n,    dtoken_n = mask_n sum_u (ds_n u + p_n dz)

A kernel that has z at hand takes the sum in ds from it, as sum_n p_n dp_n = dz . z.

What a backend keeps for its own backward is its own affair: `to_keep` says its shapes, and a backend that is given what
another one kept, as happens where the choice changes between the two passes, computes its own anew.
"""

import torch
from torch import Tensor


def forward(queries: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(B, Q, C), (B, M, N, C) and (B, M, N) -> z (B, Q, C) of the queries' dtype, and what the backward wants kept."""
    x, p = _attention(queries, tokens, mask)
    return p.to(queries.dtype) @ x, []


def to_keep(queries: Tensor, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """Tensors that nothing has written, of the shapes and dtypes that `forward` keeps: here none."""
    return []


def backward(
    grad: Tensor, queries: Tensor, tokens: Tensor, mask: Tensor, attended: Tensor, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of the tokens in the queries' dtype, given `grad` (B, Q, C) and z."""
    x, p = _attention(queries, tokens, mask)
    dp = (grad @ x.mT).to(p.dtype)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).to(queries.dtype)  # (B, Q, M * N)
    dx = ds.mT @ queries + p.to(queries.dtype).mT @ grad  # (B, M * N, C)
    return ds @ x, dx.view(tokens.shape) * mask.unsqueeze(-1)


def _attention(queries: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, M * N, C) in the queries' dtype, and p (B, Q, M * N) in fp32 or wider."""
    x = (tokens.to(queries.dtype) * mask.unsqueeze(-1)).flatten(1, 2)
    return x, (queries @ x.mT).softmax(dim=-1, dtype=torch.promote_types(queries.dtype, torch.float32))
