"""Shift-aware deformable bilinear sampling by the native core: one launch each way."""

from typing import Any

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.dispatch import BackendError
from signal_reid.ops.layout import with_unit_last_stride

POINTS_PER_BLOCK, TOKENS_PER_BLOCK = 8, 32  # as in csrc/deformable_sampling.cu
MOST_OF_A_MAP = 2**31 - 4096


def forward(tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float) -> Tensor:
    """(B, rows * columns, C) and (B, Hk, Wk) -> (B, Hk * Wk, C); see `signal_reid.ops.deformable_sample`.

    Raises:
        BackendError: a map of 2^31 tokens, points or channels, or more of them than a launch has blocks for.
    """
    _check(tokens, offsets)
    tokens, offsets = with_unit_last_stride(tokens), offsets.contiguous()
    (B, _, C), (_, Hk, Wk) = tokens.shape, offsets.shape
    sampled = torch.empty((B, Hk * Wk, C), dtype=tokens.dtype, device=tokens.device)
    fields = {"sampled": sampled.data_ptr(), **_fields(tokens, offsets, rows, columns, offset_range)}
    core.launch("deformable_sample", tokens, fields)
    return sampled


def backward(
    grad: Tensor, tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the offsets, given `grad` (B, Hk * Wk, C).

    Raises:
        BackendError: as in `forward`.
    """
    _check(tokens, offsets)
    grad, tokens, offsets = grad.contiguous(), with_unit_last_stride(tokens), offsets.contiguous()
    grad_tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    grad_offsets = torch.empty(offsets.shape, dtype=offsets.dtype, device=offsets.device)
    fields = {
        "grad": grad.data_ptr(),
        "grad_tokens": grad_tokens.data_ptr(),
        "grad_offsets": grad_offsets.data_ptr(),
        **_fields(tokens, offsets, rows, columns, offset_range),
    }
    core.launch("deformable_sample_backward", tokens, fields)
    return grad_tokens, grad_offsets


def _fields(tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float) -> dict[str, Any]:
    """What both directions read."""
    (B, _, C), (_, Hk, Wk) = tokens.shape, offsets.shape
    tokens_stride_b, tokens_stride_n, _ = tokens.stride()
    return {
        "tokens": tokens.data_ptr(),
        "offsets": offsets.data_ptr(),
        "B": B,
        "H": rows,
        "W": columns,
        "C": C,
        "Hk": Hk,
        "Wk": Wk,
        "tokens_stride_b": tokens_stride_b,
        "tokens_stride_n": tokens_stride_n,
        "offset_range": offset_range,
        "dtype": core.dtype_tag(tokens),
    }


def _check(tokens: Tensor, offsets: Tensor) -> None:
    (B, N, C), (_, Hk, Wk) = tokens.shape, offsets.shape
    blocks = -(-B * Hk * Wk // POINTS_PER_BLOCK) + B * -(-N // TOKENS_PER_BLOCK)
    if max(N, Hk * Wk, C) > MOST_OF_A_MAP:
        reason = f"a map has at most {MOST_OF_A_MAP} tokens, points and channels; use backend reference"
    elif blocks > core.MOST_BLOCKS:
        reason = (
            f"they take {blocks} blocks, a launch has at most {core.MOST_BLOCKS}; "
            "divide the batch or use backend reference"
        )
    else:
        return
    raise BackendError(
        f"backend cuda cannot sample tokens of shape {tuple(tokens.shape)} at offsets of shape "
        f"{tuple(offsets.shape)}: {reason}"
    )
