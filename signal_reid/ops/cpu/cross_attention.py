"""Cross-attention that never projects a token, with products by head that write where their result belongs.

The maths is in signal_reid/ops/reference. The gradients of the stacked weight and bias are written in place; through
`torch.unbind` and `torch.einsum` PyTorch would lay out six operands anew and stack three gradients.
"""

import torch
from torch import Tensor

from signal_reid.ops import dispatch


def forward(
    queries: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, list[Tensor]]:
    """(B, L, C), (B, M, N, C), (B, M, N), (3 C, C) and (3 C,) -> (B, L, C); kept are q, u, z and what attention keeps.

    q (B * L, C) is the projected query, u and z (B, L * h, C) go into the masked attention and come out of it.
    """
    B, L, C = queries.shape
    query_weight, key_weight, value_weight = _by_projection(weight, heads)
    query_bias, _, value_bias = bias.contiguous().view(3, C).unbind(0)
    q = torch.addmm(query_bias, queries.reshape(B * L, C), query_weight.view(C, C).T)
    u = _multiply_by_head(q.view(B * L, heads, C // heads), key_weight, _scale(C, heads)).view(B, L * heads, C)
    z, kept = torch.ops.signal_reid.attend_masked(u, tokens, mask)
    output = _multiply_by_head(z.view(B * L, heads, C), value_weight.mT).view(B, L, C)
    return output.add_(value_bias), [q, u, z, *kept]


def to_keep(queries: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, heads: int) -> list[Tensor]:
    """q, u and z, then what the masked attention keeps, unwritten."""
    B, L, C = queries.shape
    q, u, z = (queries.new_empty(shape) for shape in ((B * L, C), (B, L * heads, C), (B, L * heads, C)))
    return [q, u, z, *dispatch.call("masked_attention", "to_keep", u, tokens, mask)]


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
    if not kept:  # the reference keeps nothing
        _, kept = forward(queries, tokens, mask, weight, bias, heads)
    q, u, z, *of_attention = kept
    B, L, C = queries.shape
    by_head, of_queries, scale = (B * L, heads, C // heads), (B * L, heads, C), _scale(C, heads)
    query_weight, key_weight, value_weight = _by_projection(weight, heads)
    grad_weight, grad_bias = weight.new_empty(weight.shape), bias.new_zeros(3, C)  # that of the keys' bias stays zero
    of_query_weight, of_key_weight, of_value_weight = _by_projection(grad_weight, heads)

    grad = grad.reshape(by_head)
    torch.sum(grad.view(B * L, C), 0, out=grad_bias[2])
    _multiply_over_rows(grad, z.view(of_queries), out=of_value_weight)
    dz = _multiply_by_head(grad, value_weight).view(z.shape)
    du, dtokens = torch.ops.signal_reid.attend_masked_backward(dz, u, tokens, mask, z, of_attention)
    _multiply_over_rows(q.view(by_head), du.view(of_queries), scale, out=of_key_weight)
    dq = _multiply_by_head(du.view(of_queries), key_weight.mT, scale).view(B * L, C)
    torch.sum(dq, 0, out=grad_bias[0])
    torch.mm(dq.T, queries.reshape(B * L, C), out=of_query_weight.view(C, C))
    return torch.mm(dq, query_weight.view(C, C)).view(queries.shape), dtokens, grad_weight, grad_bias.view(-1)


def _by_projection(weight: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(3 C, C) -> the weights of queries, keys and values by head, each (h, d, C)."""
    C = weight.shape[1]
    return weight.contiguous().view(3, heads, C // heads, C).unbind(0)


def _scale(C: int, heads: int) -> float:
    return (C // heads) ** -0.5


def _multiply_by_head(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """`scale * x @ weight` of each head: (rows, h, a) and (h, a, b) -> (rows, h, b)."""
    result = x.new_empty(*x.shape[:2], weight.shape[2])
    by_head = result.transpose(0, 1)
    torch.baddbmm(by_head, x.transpose(0, 1), weight, beta=0, alpha=scale, out=by_head)
    return result


def _multiply_over_rows(x: Tensor, y: Tensor, scale: float = 1.0, *, out: Tensor) -> None:
    """`scale * x^T y` of each head: (rows, h, a) and (rows, h, b) -> out (h, a, b)."""
    torch.baddbmm(out, x.permute(1, 2, 0), y.transpose(0, 1), beta=0, alpha=scale, out=out)
