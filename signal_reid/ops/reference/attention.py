"""Scaled dot-product attention, in plain PyTorch.

o = p v with p = softmax(q k^T / sqrt(d)) over the keys. Backward, with dp = do v^T and ds = p (dp - sum(p dp)), the
gradient of q k^T / sqrt(d):

    dq = ds k / sqrt(d),    dk = ds^T q / sqrt(d),    dv = p^T do
"""

import torch
from torch import Tensor


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(3, B, heads, L, d), q, k and v -> o (B, heads, L, d) and p (B, heads, L, L)."""
    q, k, v = qkv.unbind(0)
    p = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
    return p @ v, p


def backward(grad: Tensor, qkv: Tensor, p: Tensor) -> Tensor:
    """Gradient of q, k and v, given `grad` (B, heads, L, d) and p."""
    q, k, v = qkv.unbind(0)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return torch.stack([ds @ k, ds.mT @ q, p.mT @ grad])
