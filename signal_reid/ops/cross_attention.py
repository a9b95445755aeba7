"""Multi-head attention of few queries over the tokens that a selection kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.ops import dispatch, library  # noqa: F401 - library defines torch.ops.signal_reid
from signal_reid.ops.checks import (
    check_floating,
    check_same,
    check_tensor,
    check_whole,
    formula_wanted,
    needs_gradient,
    refuse_second_derivative,
)
from signal_reid.ops.layout import as_autocast_multiplies, without_autocast
from signal_reid.ops.masked_attention import attend_masked, check_masked_tokens


def cross_attend(queries: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Multi-head attention over all tokens times their mask, before its output projection.

    The queries are few, so keys and values are never projected: per head, with u = W_k^T q / sqrt(d),

        p = softmax(mask_n u . x_n),    z = sum_n p_n mask_n x_n,    head = W_v z + b_v

    The key bias shifts all logits of a query alike and drops out. `torch.nn.MultiheadAttention` computes the same.

    Args:
        queries: (B, L, C), fp32, fp16, bf16 or fp64.
        tokens: (B, M, N, C), M N >= 1, of any of these dtypes and any strides; computed with in the queries' dtype.
        mask: (B, M, N) bool, true where a token is kept; the others are zero vectors, see `attend_masked`.
        weight: (3 C, C) of the queries' dtype, the projections of queries, keys and values as
            `torch.nn.MultiheadAttention` stacks them.
        bias: (3 C,), likewise.
        heads: h, which divides C into d channels each.

    Returns:
        (B, L, C), the heads side by side, of the queries' dtype; under autocast in the precision of its products.

    Raises:
        ValueError: a shape, dtype, device or number of heads outside of these.
        BackendError: a backend was chosen that cannot serve; see `attend_masked`, which is asked for h L queries.

    Source: Signal (AAAI 2026), selective interaction module; Vaswani et al., Attention Is All You Need, section 3.2.2.
    """
    check_floating("queries", queries, "(B, L, C)", 3)
    C = queries.shape[2]
    check_whole("heads", heads)
    if heads < 1 or C % heads:
        raise ValueError(f"heads must divide the {C} channels of queries, got {heads}")
    check_tensor("weight", weight)
    check_tensor("bias", bias)
    queries, weight, bias = (as_autocast_multiplies(x) for x in (queries, weight, bias))
    check_same("weight", weight, "queries", queries, (3 * C, C))
    check_same("bias", bias, "queries", queries, (3 * C,))
    with without_autocast(queries):
        if formula_wanted() or dispatch.left_to_pytorch("cross_attention", queries):
            return _formula(queries, tokens, mask, weight, bias, heads)
        check_masked_tokens(queries, tokens, mask)
        if needs_gradient(queries, tokens, weight, bias):
            return _CrossAttend.apply(queries, tokens, mask, weight, bias, heads)
        return torch.ops.signal_reid.cross_attend(queries, tokens, mask, weight, bias, heads)[0]


def _formula(queries: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Without projected keys and values, in operators that PyTorch differentiates."""
    B, L, C = queries.shape
    query_weight, key_weight, value_weight = weight.unflatten(0, (3, heads, C // heads)).unbind(0)  # each (h, d, C)
    query_bias, _, value_bias = bias.unflatten(0, (3, C)).unbind(0)
    q = F.linear(queries, query_weight.flatten(0, 1), query_bias).unflatten(-1, (heads, C // heads))  # (B, L, h, d)
    u = torch.einsum("blhd,hdc->blhc", q * q.shape[-1] ** -0.5, key_weight)
    z = attend_masked(u.flatten(1, 2), tokens, mask).view(B, L, heads, C)
    return torch.einsum("blhc,hdc->blhd", z, value_weight).flatten(2) + value_bias


class _CrossAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, heads: int
    ) -> Tensor:
        attended, kept = torch.ops.signal_reid.cross_attend(queries, tokens, mask, weight, bias, heads)
        ctx.save_for_backward(queries, tokens, mask, weight, bias, *kept)
        ctx.heads = heads
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("cross_attend", grad)
        queries, tokens, mask, weight, bias, *kept = ctx.saved_tensors
        of_queries, of_tokens, of_weight, of_bias = torch.ops.signal_reid.cross_attend_backward(
            grad, queries, tokens, mask, weight, bias, ctx.heads, kept
        )
        return of_queries, of_tokens.to(tokens.dtype), None, of_weight, of_bias, None
