"""Attention over masked tokens and its gradients by Triton; the maths is in signal_reid/ops/reference.

Two launches each way. Forward: the logits, then the sums over the tokens. Backward: the tokens' gradient, then the
queries', which needs every token. Each launch reads the kept tokens once, and never those that are dropped: their row
is zero, and so is their logit. The second launch of a pass finds some of the tokens in the cache; the native core has
one launch, as its threads keep sums of all channels in registers while they go over channels, which Triton's cannot.
No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from signal_reid.ops.dispatch import BackendError
from signal_reid.ops.layout import with_unit_last_stride
from signal_reid.ops.triton import INTERPRETING
from signal_reid.ops.triton.launch import ceil_div, launch, power_of_two

MOST_QUERIES = 64  # whose weights the registers of one block hold
WARPS = 4
WIDENED = tl.constexpr(INTERPRETING)  # the interpreter would multiply the bits of bf16 as integers


@triton.jit
def _dot(a, b, total):
    """total + a b, in fp32 throughout where they are fp32."""
    if WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _load(rows_at, real, c, C):
    """Channels c of these rows, zero beyond the last and where a row is not real."""
    return tl.load(rows_at[:, None] + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _multiply(rows_at, real, tokens_at, keep, C, block_q: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr):
    """Products of rows and tokens, (block_q, block_n)."""
    total = tl.zeros([block_q, block_n], tl.float32)
    for start in range(0, C, block_c):
        c = start + tl.arange(0, block_c)
        total = _dot(_load(rows_at, real, c, C), tl.trans(_load(tokens_at, keep, c, C)), total)
    return total


@triton.jit(do_not_specialize=["Q", "N", "tokens"])
def _logits_kernel(
    queries_at, tokens_at, mask_at, logits_at, Q, N, C, tokens,
    queries_b, queries_q, tokens_b, tokens_m, tokens_n,
    block_q: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One block: block_n tokens of one sample. Reads them and the queries once, writes their logits once."""
    blocks = tl.cdiv(tokens, block_n)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * block_n + tl.arange(0, block_n)
    q = tl.arange(0, block_q)
    keep = tl.load(mask_at + b * tokens + n, mask=n < tokens, other=0) != 0
    tokens_at += b * tokens_b + (n // N).to(tl.int64) * tokens_m + (n % N).to(tl.int64) * tokens_n
    queries_at += b * queries_b + q.to(tl.int64) * queries_q
    logits = _multiply(queries_at, q < Q, tokens_at, keep, C, block_q, block_n, block_c)
    logits = tl.where(keep[None, :], logits, 0.0)
    logits_at += (b * Q + q)[:, None] * (tokens + 2) + n[None, :]
    tl.store(logits_at, logits, mask=(q < Q)[:, None] & (n < tokens)[None, :])


@triton.jit(do_not_specialize=["Q", "N", "tokens"])
def _sums_kernel(
    weights_at, tokens_at, mask_at, sums_at, Q, N, C, tokens, tokens_b, tokens_m, tokens_n,
    attending: tl.constexpr, block_q: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One block: block_c channels of one sample's sum_n weight_n x_n. Reads those channels once, writes the sums once.

    With `attending` the weights are the softmax of logits, whose maximum and sum each block finds and the first writes.
    """
    b, q = tl.program_id(0).to(tl.int64), tl.arange(0, block_q)
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    real = q < Q
    rows_at = weights_at + (b * Q + q) * (tokens + 2)
    highest = tl.full([block_q], -3.4028235e38, tl.float32)  # finite, so that no difference is NaN
    whole = tl.zeros([block_q], tl.float32)
    if attending:
        for start in range(0, tokens, block_n):
            n = start + tl.arange(0, block_n)
            inside = real[:, None] & (n < tokens)[None, :]
            logits = tl.load(rows_at[:, None] + n[None, :], mask=inside, other=-float("inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            whole = whole * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
            highest = higher
        if tl.program_id(1) == 0:
            tl.store(rows_at + tokens, highest, mask=real)
            tl.store(rows_at + tokens + 1, whole, mask=real)

    total = tl.zeros([block_q, block_c], tl.float32)
    for start in range(0, tokens, block_n):
        n = start + tl.arange(0, block_n)
        keep = tl.load(mask_at + b * tokens + n, mask=n < tokens, other=0) != 0
        weights = tl.load(rows_at[:, None] + n[None, :], mask=real[:, None] & keep[None, :], other=0.0)
        if attending:
            weights = tl.exp(weights - highest[:, None]) / whole[:, None]
            weights = tl.where(real[:, None] & keep[None, :], weights, 0.0)
        at = tokens_at + b * tokens_b + (n // N).to(tl.int64) * tokens_m + (n % N).to(tl.int64) * tokens_n
        total = _dot(weights.to(tokens_at.dtype.element_ty), _load(at, keep, c, C), total)
    sums_at += (b * Q + q)[:, None] * C + c[None, :]
    tl.store(sums_at, total.to(sums_at.dtype.element_ty), mask=real[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["Q", "N", "tokens"])
def _tokens_gradient_kernel(
    grad_at, queries_at, tokens_at, mask_at, attended_at, logits_at, slopes_at, grad_tokens_at, Q, N, C, tokens,
    grad_b, grad_q, queries_b, queries_q, tokens_b, tokens_m, tokens_n,
    block_q: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One block: block_n tokens of one sample. Reads them, z and the queries once, the gradient of z twice.

    Writes the gradient of these tokens once, zeros too, and for the second launch ds.
    """
    blocks = tl.cdiv(tokens, block_n)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * block_n + tl.arange(0, block_n)
    q = tl.arange(0, block_q)
    real, row = q < Q, b * Q + q
    keep = tl.load(mask_at + b * tokens + n, mask=n < tokens, other=0) != 0
    tokens_at += b * tokens_b + (n // N).to(tl.int64) * tokens_m + (n % N).to(tl.int64) * tokens_n
    grad_at += b * grad_b + q.to(tl.int64) * grad_q
    queries_at += b * queries_b + q.to(tl.int64) * queries_q
    along = tl.zeros([block_q, block_n], tl.float32)
    mean = tl.zeros([block_q], tl.float32)
    for start in range(0, C, block_c):
        c = start + tl.arange(0, block_c)
        grad = _load(grad_at, real, c, C)
        along = _dot(grad, tl.trans(_load(tokens_at, keep, c, C)), along)
        mean += tl.sum(grad.to(tl.float32) * _load(attended_at + row * C, real, c, C).to(tl.float32), 1)

    inside = real[:, None] & keep[None, :]
    logits = tl.load(logits_at + row[:, None] * (tokens + 2) + n[None, :], mask=inside, other=0.0)
    highest = tl.load(logits_at + row * (tokens + 2) + tokens, mask=real, other=0.0)
    whole = tl.load(logits_at + row * (tokens + 2) + tokens + 1, mask=real, other=1.0)
    weights = tl.where(inside, tl.exp(logits - highest[:, None]) / whole[:, None], 0.0)
    slopes = tl.where(inside, weights * (along - mean[:, None]), 0.0)
    tl.store(slopes_at + row[:, None] * (tokens + 2) + n[None, :], slopes, mask=inside)

    weights = tl.trans(weights.to(grad_tokens_at.dtype.element_ty))
    slopes = tl.trans(slopes.to(grad_tokens_at.dtype.element_ty))
    grad_tokens_at += (b * tokens + n) * C
    for start in range(0, C, block_c):
        c = start + tl.arange(0, block_c)
        total = _dot(weights, _load(grad_at, real, c, C), tl.zeros([block_n, block_c], tl.float32))
        total = _dot(slopes, _load(queries_at, real, c, C), total)
        total = tl.where(keep[:, None], total, 0.0).to(grad_tokens_at.dtype.element_ty)
        tl.store(grad_tokens_at[:, None] + c[None, :], total, mask=(n < tokens)[:, None] & (c < C)[None, :])


def forward(queries: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(B, Q, C), (B, M, N, C) and (B, M, N) -> z (B, Q, C), and the logits for the backward.

    Tokens of another dtype than the queries are converted first.

    Raises:
        BackendError: more than 64 queries.
    """
    (logits,) = to_keep(queries, tokens, mask)
    queries, tokens, mask = _as_kernels_take(queries, tokens, mask)
    (B, Q, C), (_, M, N, _) = queries.shape, tokens.shape
    sizes = _blocks(queries)
    launch(
        _logits_kernel,
        (B * ceil_div(M * N, sizes["block_n"]) if Q else 0,),
        queries,
        *(queries, tokens, mask, logits, Q, N, C, M * N, *queries.stride()[:2], *tokens.stride()[:3]),
        **sizes,
        num_warps=WARPS,
    )
    return _sums(logits, tokens, mask, C, attending=True), [logits]


def to_keep(queries: Tensor, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """The logits, then maximum and sum of the softmax: (B, Q, M * N + 2) in fp32, unwritten."""
    B, Q, _ = queries.shape
    if Q > MOST_QUERIES:
        raise BackendError(
            f"backend triton cannot attend with queries of shape {tuple(queries.shape)}: at most {MOST_QUERIES} of "
            "them; use backend reference"
        )
    return [torch.empty((B, Q, mask.shape[1] * mask.shape[2] + 2), dtype=torch.float32, device=queries.device)]


def backward(
    grad: Tensor, queries: Tensor, tokens: Tensor, mask: Tensor, attended: Tensor, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of the tokens in the queries' dtype, given `grad` (B, Q, C) and z.

    Raises:
        BackendError: as in `forward`.
    """
    if len(kept) != 1:  # another backend keeps another number
        _, kept = forward(queries, tokens, mask)
    queries, tokens, mask = _as_kernels_take(queries, tokens, mask)
    grad, attended = with_unit_last_stride(grad), attended.contiguous()
    (B, Q, C), (_, M, N, _) = queries.shape, tokens.shape
    grad_tokens = torch.empty((B, M, N, C), dtype=queries.dtype, device=queries.device)
    slopes = torch.empty_like(kept[0])
    sizes = _blocks(queries)
    launch(
        _tokens_gradient_kernel,
        (B * ceil_div(M * N, sizes["block_n"]),),
        queries,
        *(grad, queries, tokens, mask, attended, kept[0], slopes, grad_tokens, Q, N, C, M * N),
        *(*grad.stride()[:2], *queries.stride()[:2], *tokens.stride()[:3]),
        **sizes,
        num_warps=WARPS,
    )
    return _sums(slopes, tokens, mask, C, attending=False), grad_tokens


def _sums(weights: Tensor, tokens: Tensor, mask: Tensor, C: int, attending: bool) -> Tensor:
    """sum_n weight_n x_n (B, Q, C) in the tokens' dtype; `attending`, weights are logits until the softmax is taken."""
    (B, Q, _), (_, M, N, _) = weights.shape, tokens.shape
    sums = torch.empty((B, Q, C), dtype=tokens.dtype, device=tokens.device)
    block_c = power_of_two(C, smallest=16, largest=64)
    launch(
        _sums_kernel,
        (B if Q else 0, ceil_div(C, block_c)),
        tokens,
        *(weights, tokens, mask, sums, Q, N, C, M * N, *tokens.stride()[:3]),
        attending=attending,
        **_blocks(sums) | {"block_c": block_c},
        num_warps=WARPS,
    )
    return sums


def _as_kernels_take(queries: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype and unit last strides; the mask contiguous, as bytes."""
    tokens = with_unit_last_stride(tokens.to(queries.dtype))
    return with_unit_last_stride(queries), tokens, mask.contiguous().view(torch.uint8)


def _blocks(queries: Tensor) -> dict[str, int]:
    """Queries, tokens and channels that a block multiplies at a time: fewer where no tensor core does."""
    _, Q, C = queries.shape
    narrow = queries.dtype == torch.float32
    return {
        "block_q": power_of_two(Q, smallest=16),
        "block_n": 16 if narrow else 32,
        "block_c": power_of_two(C, smallest=16, largest=32 if narrow else 64),
    }
