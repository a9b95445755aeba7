"""Masked attention with both terms of the tokens' gradient in one product, so that the largest is written once.

The small factor of that product is masked and laid out anew first: a CPU multiplies it faster so. The softmax and the
masked tokens are kept for the backward, which would take a pass over the tokens longer without them.
"""

import torch
from torch import Tensor


def forward(queries: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(B, Q, C), (B, M, N, C) and (B, M, N) -> z (B, Q, C), and [p, x] for the backward."""
    x = (tokens.to(queries.dtype) * mask.unsqueeze(-1)).flatten(1, 2).contiguous()
    p = (queries @ x.mT).softmax(dim=-1, dtype=_wide(queries))
    return p.to(queries.dtype) @ x, [p, x]


def to_keep(queries: Tensor, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """p (B, Q, M * N) in fp32 or wider and x (B, M * N, C) in the queries' dtype, unwritten."""
    B, Q, C = queries.shape
    MN = mask.shape[1] * mask.shape[2]
    return [queries.new_empty(B, Q, MN, dtype=_wide(queries)), queries.new_empty(B, MN, C)]


def backward(
    grad: Tensor, queries: Tensor, tokens: Tensor, mask: Tensor, attended: Tensor, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of the tokens in the queries' dtype, given `grad` (B, Q, C) and z."""
    p, x = kept if len(kept) == 2 else forward(queries, tokens, mask)[1]  # another backend keeps another number
    dp = (grad @ x.mT).to(p.dtype)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))  # (B, Q, M * N)
    ds_and_p = torch.cat([ds, p], 1) * mask.flatten(1).unsqueeze(1)  # (B, 2 * Q, M * N)
    weight = ds_and_p.to(queries.dtype).mT.contiguous()
    dx = weight @ torch.cat([queries, grad], 1)
    return ds.to(queries.dtype) @ x, dx.view(tokens.shape)


def _wide(queries: Tensor) -> torch.dtype:
    return torch.promote_types(queries.dtype, torch.float32)
