"""Masked attention by the native core: one launch each way, and a second where samples are few and are split."""

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.dispatch import BackendError
from signal_reid.ops.layout import with_unit_last_stride

MOST_QUERIES, MOST_CHANNELS, MOST_TOKENS = 24, 512, 2**15  # as in csrc/masked_attention.cuh
MOST_SPLITS, TOKENS_PER_SPLIT = 8, 32


def forward(queries: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(B, Q, C), (B, M, N, C) and (B, M, N) -> z (B, Q, C), and the logits for the backward.

    Tokens of another dtype than the queries are converted first.

    Raises:
        BackendError: more than 24 queries, 512 channels, 2^15 modalities or tokens of one, or 2^28 samples.
    """
    (logits,) = to_keep(queries, tokens, mask)
    (B, Q, C), (_, M, N, _) = queries.shape, tokens.shape
    queries = with_unit_last_stride(queries)
    tokens, mask = with_unit_last_stride(tokens.to(queries.dtype)), mask.contiguous()
    attended = torch.empty((B, Q, C), dtype=queries.dtype, device=queries.device)
    splits, parts, part_softmax = _workspace(queries, M * N)
    fields = {
        "queries": queries.data_ptr(),
        "tokens": tokens.data_ptr(),
        "mask": mask.data_ptr(),
        "attended": attended.data_ptr(),
        "logits": logits.data_ptr(),
        "parts": core.address(parts),
        "part_softmax": core.address(part_softmax),
        **_sizes(queries, tokens, splits),
    }
    core.launch("attend_masked", queries, fields)
    return attended, [logits]


def to_keep(queries: Tensor, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """The logits of kept tokens, then maximum and sum of the softmax: (B, Q, M * N + 2) in fp32, unwritten."""
    _check(queries, tokens)
    shape = *queries.shape[:2], mask.shape[1] * mask.shape[2] + 2
    return [torch.empty(shape, dtype=torch.float32, device=queries.device)]


def backward(
    grad: Tensor, queries: Tensor, tokens: Tensor, mask: Tensor, attended: Tensor, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of the tokens in the queries' dtype, given `grad` (B, Q, C) and z.

    Raises:
        BackendError: as in `forward`.
    """
    _check(queries, tokens)
    if len(kept) != 1:  # another backend keeps another number
        _, kept = forward(queries, tokens, mask)
    grad, queries = map(with_unit_last_stride, (grad, queries))
    tokens, mask = with_unit_last_stride(tokens.to(queries.dtype)), mask.contiguous()
    attended = attended.contiguous()
    grad_queries = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    grad_tokens = torch.empty(tokens.shape, dtype=queries.dtype, device=queries.device)
    splits, parts, _ = _workspace(queries, mask.shape[1] * mask.shape[2])
    grad_stride_b, grad_stride_q, _ = grad.stride()
    fields = {
        "grad": grad.data_ptr(),
        "attended": attended.data_ptr(),
        "queries": queries.data_ptr(),
        "tokens": tokens.data_ptr(),
        "mask": mask.data_ptr(),
        "logits": kept[0].data_ptr(),
        "grad_queries": grad_queries.data_ptr(),
        "grad_tokens": grad_tokens.data_ptr(),
        "parts": core.address(parts),
        "grad_stride_b": grad_stride_b,
        "grad_stride_q": grad_stride_q,
        **_sizes(queries, tokens, splits),
    }
    core.launch("attend_masked_backward", queries, fields)
    return grad_queries, grad_tokens


def _sizes(queries: Tensor, tokens: Tensor, splits: int) -> dict[str, int]:
    """What both directions say of queries and tokens."""
    (B, Q, C), (_, M, N, _) = queries.shape, tokens.shape
    queries_stride_b, queries_stride_q, _ = queries.stride()
    tokens_stride_b, tokens_stride_m, tokens_stride_n, _ = tokens.stride()
    return {
        "B": B,
        "M": M,
        "N": N,
        "Q": Q,
        "C": C,
        "splits": splits,
        "queries_stride_b": queries_stride_b,
        "queries_stride_q": queries_stride_q,
        "tokens_stride_b": tokens_stride_b,
        "tokens_stride_m": tokens_stride_m,
        "tokens_stride_n": tokens_stride_n,
        "dtype": core.dtype_tag(queries),
    }


def _workspace(queries: Tensor, tokens: int) -> tuple[int, Tensor | None, Tensor | None]:
    """Blocks per sample, and where there are several, room for their parts and for the softmax of each."""
    B, Q, C = queries.shape
    splits = _splits(core.multiprocessors(queries.get_device()), B, tokens)
    if splits == 1:
        return 1, None, None
    parts, part_softmax = (
        torch.empty((B, splits, Q, size), dtype=torch.float32, device=queries.device) for size in (C, 2)
    )
    return splits, parts, part_softmax


def _splits(multiprocessors: int, B: int, tokens: int) -> int:
    """As many blocks per sample as find a multiprocessor each, none of them without a token."""
    splits = max(1, min(multiprocessors // max(B, 1), MOST_SPLITS, -(-tokens // TOKENS_PER_SPLIT)))
    return -(-tokens // -(-tokens // splits))


def _check(queries: Tensor, tokens: Tensor) -> None:
    (B, Q, C), (_, M, N, _) = queries.shape, tokens.shape
    if Q > MOST_QUERIES or C > MOST_CHANNELS or max(M, N) > MOST_TOKENS or B > core.MOST_BLOCKS // MOST_SPLITS:
        raise BackendError(
            f"backend cuda cannot attend with queries of shape {tuple(queries.shape)} to tokens of shape "
            f"{tuple(tokens.shape)}: at most {MOST_QUERIES} queries, {MOST_CHANNELS} channels, {MOST_TOKENS} "
            f"modalities and tokens of each, {core.MOST_BLOCKS // MOST_SPLITS} samples; use backend triton or reference"
        )
