"""Shift-aware deformable bilinear sampling by the native core: one launch each way."""

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.layout import with_unit_last_stride


def forward(tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float) -> Tensor:
    """(B, rows * columns, C) and (B, Hk, Wk) -> (B, Hk * Wk, C); see `signal_reid.ops.deformable_sample`."""
    tokens, offsets = with_unit_last_stride(tokens), offsets.contiguous()
    (B, _, C), (_, Hk, Wk) = tokens.shape, offsets.shape
    sampled = torch.empty((B, Hk * Wk, C), dtype=tokens.dtype, device=tokens.device)
    core.launch(
        "deformable_sample",
        tokens,
        tokens.data_ptr(),
        offsets.data_ptr(),
        sampled.data_ptr(),
        B,
        rows,
        columns,
        C,
        Hk,
        Wk,
        *tokens.stride()[:2],
        offset_range,
        core.dtype_tag(tokens),
    )
    return sampled


def backward(
    grad: Tensor, tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the offsets, given `grad` (B, Hk * Wk, C)."""
    grad, tokens, offsets = grad.contiguous(), with_unit_last_stride(tokens), offsets.contiguous()
    (B, N, C), (_, Hk, Wk) = tokens.shape, offsets.shape
    grad_tokens = torch.empty((B, N, C), dtype=tokens.dtype, device=tokens.device)
    grad_offsets = torch.empty((B, Hk, Wk), dtype=offsets.dtype, device=offsets.device)
    core.launch(
        "deformable_sample_backward",
        tokens,
        grad.data_ptr(),
        tokens.data_ptr(),
        offsets.data_ptr(),
        grad_tokens.data_ptr(),
        grad_offsets.data_ptr(),
        B,
        rows,
        columns,
        C,
        Hk,
        Wk,
        *tokens.stride()[:2],
        offset_range,
        core.dtype_tag(tokens),
    )
    return grad_tokens, grad_offsets
