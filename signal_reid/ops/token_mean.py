"""The mean over the tokens of each modality."""

from typing import Any

import torch
from torch import Tensor

from signal_reid.ops import library  # noqa: F401 - defines torch.ops.signal_reid
from signal_reid.ops.checks import check_floating, formula_wanted, needs_gradient
from signal_reid.ops.reference import token_mean as reference


def mean_tokens(tokens: Tensor) -> Tensor:
    """Mean over the tokens of each modality, whatever autocast says in fp32 or wider.

    The gradient is divided and rounded before it spreads over the tokens, as a view.

    Args:
        tokens: (B, M, N, C), fp32, fp16, bf16 or fp64, any strides; NaN where N = 0.

    Returns:
        (B, M, C) fp32 (fp64 for fp64 input).

    Raises:
        ValueError: another shape or dtype.
        BackendError: a backend was chosen that cannot serve.
    """
    check_floating("tokens", tokens, "(B, M, N, C)", 4)
    if formula_wanted():
        return reference.forward(tokens)
    return _MeanTokens.apply(tokens) if needs_gradient(tokens) else torch.ops.signal_reid.mean_tokens(tokens)


class _MeanTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = tokens.shape, tokens.dtype
        return torch.ops.signal_reid.mean_tokens(tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        tokens = max(1, ctx.shape[2])
        if torch.is_grad_enabled() or grad.dtype == ctx.dtype:
            share = (grad / tokens).to(ctx.dtype)
        else:  # on a GPU one launch that divides and rounds, but one without a derivative
            share = torch.div(grad, tokens, out=torch.empty_like(grad, dtype=ctx.dtype))
        return share.unsqueeze(2).expand(ctx.shape)
