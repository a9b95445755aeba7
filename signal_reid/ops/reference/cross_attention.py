"""Multi-head attention of queries over the tokens of all modalities times their mask, as it is written in textbooks.

With x_n = mask_n token_n, per head of d channels: q = W_q query + b_q, k_n = W_k x_n + b_k, v_n = W_v x_n + b_v,
p = softmax_n(q . k_n / sqrt(d)), and the head is o = sum_n p_n v_n. The heads stand side by side.

Backward: dp_n = do . v_n, ds = p (dp - sum_n p_n dp_n), dq = sum_n ds_n k_n / sqrt(d), dk_n = sum_q ds_n q / sqrt(d),
dv_n = sum_q p_n do; then of each projection y = W x + b: dW = sum dy x^T, db = sum dy, dx = W^T dy.

The other backends never project a token: with u = W_k^T q / sqrt(d) the logits are u . x_n + (q . b_k) / sqrt(d), whose
second term the softmax drops, and o = W_v z + b_v with z = sum_n p_n x_n, as p sums to one. So the gradient of b_k is
zero, of W_k it is sum_q q du^T / sqrt(d), and of W_v it is sum_q do z^T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    queries: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, list[Tensor]]:
    """(B, L, C), (B, M, N, C), (B, M, N), (3 C, C) and (3 C,) -> (B, L, C), and what the backward wants kept."""
    _, _, _, v, p = _attention(queries, tokens, mask, weight, bias, heads)
    return _side_by_side(p.to(v.dtype) @ v), []


def to_keep(queries: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, heads: int) -> list[Tensor]:
    """Tensors that nothing has written, of the shapes and dtypes that `forward` keeps: here none."""
    return []


def backward(
    grad: Tensor,
    queries: Tensor,
    tokens: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    kept: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, tokens (in the queries' dtype), weight and bias, given `grad` (B, L, C)."""
    x, q, k, v, p = _attention(queries, tokens, mask, weight, bias, heads)
    scale = q.shape[-1] ** -0.5
    grad = grad.unflatten(-1, (heads, queries.shape[2] // heads)).transpose(1, 2)  # (B, h, L, d)
    dp = (grad @ v.mT).to(p.dtype)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).to(q.dtype) * scale  # (B, h, L, M * N)
    projected = ((ds @ k, queries), (ds.mT @ q, x), (p.to(q.dtype).mT @ grad, x))
    grads = [(_side_by_side(dy).flatten(0, 1), y.flatten(0, 1)) for dy, y in projected]
    grad_weight = torch.cat([dy.mT @ y for dy, y in grads])
    grad_bias = torch.cat([dy.sum(0) for dy, _ in grads])
    of_query, of_key, of_value = (dy @ w for (dy, _), w in zip(grads, weight.chunk(3), strict=True))
    of_tokens = (of_key + of_value).view(tokens.shape) * mask.unsqueeze(-1)
    return of_query.view(queries.shape), of_tokens, grad_weight, grad_bias


def _attention(
    queries: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (B, M * N, C); q, k and v (B, h, L or M * N, d); and p (B, h, L, M * N) in fp32 or wider."""
    x = (tokens.to(queries.dtype) * mask.unsqueeze(-1)).flatten(1, 2)
    inputs = zip((queries, x, x), weight.chunk(3), bias.chunk(3), strict=True)
    d = queries.shape[2] // heads
    q, k, v = (F.linear(y, w, b).unflatten(-1, (heads, d)).transpose(1, 2) for y, w, b in inputs)
    logits = q @ k.mT * d**-0.5
    return x, q, k, v, logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _side_by_side(x: Tensor) -> Tensor:
    """(B, h, L, d) -> (B, L, h * d)."""
    return x.transpose(1, 2).flatten(2)
