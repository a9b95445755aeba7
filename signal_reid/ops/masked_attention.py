"""Attention over the tokens that a selection kept."""

from typing import Any

import torch
from torch import Tensor

from signal_reid.ops import library  # noqa: F401 - defines torch.ops.signal_reid
from signal_reid.ops.checks import (
    check_floating,
    check_tensor,
    formula_wanted,
    needs_gradient,
    refuse_second_derivative,
)
from signal_reid.ops.layout import as_autocast_multiplies, without_autocast
from signal_reid.ops.reference import masked_attention as reference


def attend_masked(queries: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Attention whose keys and values are both the tokens of all modalities times their mask.

    `z = sum_n p_n x_n` with `p = softmax_n(query . x_n)` and `x_n = mask_n token_n`. Tokens that are masked out are
    zero vectors, not absent: each has its share of the softmax, with the logit zero. The kernels never read them.

    Args:
        queries: (B, Q, C), fp32, fp16, bf16 or fp64, already scaled.
        tokens: (B, M, N, C), M N >= 1, of any of these dtypes and any strides; computed with in the queries' dtype.
        mask: (B, M, N) bool, true where a token is kept.

    Returns:
        (B, Q, C) of the queries' dtype; under autocast in the precision of its matrix products.

    Raises:
        ValueError: a shape, dtype or device outside of these.
        BackendError: a backend was chosen that cannot serve; cuda takes up to 24 queries of 512 channels, triton up to
            64 queries.

    Source: Signal (AAAI 2026), selective interaction module, with the projections of keys and values absorbed.
    """
    check_floating("queries", queries, "(B, Q, C)", 3)
    check_masked_tokens(queries, tokens, mask)
    queries = as_autocast_multiplies(queries)
    with without_autocast(queries):
        if formula_wanted():
            return reference.forward(queries, tokens, mask)[0]
        if needs_gradient(queries, tokens):
            return _AttendMasked.apply(queries, tokens, mask)
        return torch.ops.signal_reid.attend_masked(queries, tokens, mask)[0]


def check_masked_tokens(queries: Tensor, tokens: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless tokens (B, M, N, C) and their mask go with queries (B, any number, C)."""
    check_floating("tokens", tokens, "(B, M, N, C)", 4)
    B, M, N, C = tokens.shape
    if M * N == 0:
        raise ValueError(f"tokens must hold at least one token (B, M, N, C), got shape {tuple(tokens.shape)}")
    if (queries.shape[0], queries.shape[2]) != (B, C) or queries.device != tokens.device:
        raise ValueError(
            f"queries must be ({B}, Q, {C}) on {tokens.device} to go with tokens, "
            f"got shape {tuple(queries.shape)} on {queries.device}"
        )
    check_tensor("mask", mask)
    if mask.shape != (B, M, N) or mask.dtype != torch.bool or mask.device != tokens.device:
        raise ValueError(
            f"mask must be {(B, M, N)} bool on {tokens.device} to go with tokens, "
            f"got shape {tuple(mask.shape)} {mask.dtype} on {mask.device}"
        )


class _AttendMasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        attended, kept = torch.ops.signal_reid.attend_masked(queries, tokens, mask)
        ctx.save_for_backward(queries, tokens, mask, attended, *kept)
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_second_derivative("attend_masked", grad)
        queries, tokens, mask, attended, *kept = ctx.saved_tensors
        of_queries, of_tokens = torch.ops.signal_reid.attend_masked_backward(
            grad, queries, tokens, mask, attended, kept
        )
        return of_queries, of_tokens.to(tokens.dtype), None
