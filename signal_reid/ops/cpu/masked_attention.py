"""Masked attention with both terms of the tokens' gradient in one product, so that the largest is written once.

The small factor of that product is masked and laid out anew first: a CPU multiplies it faster so.
"""

import torch
from torch import Tensor

from signal_reid.ops.reference import masked_attention as reference

forward = reference.forward


def backward(grad: Tensor, queries: Tensor, p: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of the tokens in the queries' dtype, given `grad` (B, Q, C)."""
    dp = (grad @ x.mT).to(p.dtype)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))  # (B, Q, M * N)
    ds_and_p = torch.cat([ds, p], 1) * mask.flatten(1).unsqueeze(1)  # (B, 2 * Q, M * N)
    weight = ds_and_p.to(queries.dtype).mT.contiguous()
    dx = weight @ torch.cat([queries, grad], 1)
    return ds.to(queries.dtype) @ x, dx.view(*mask.shape, x.shape[-1])
