"""Top-k token selection by Triton, in two launches.

The first scores every token by the M queries that rank it, as unsigned integers of the same order. The second finds the
k-th largest of every list bit by bit, and marks what is above it and the first of its equals.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from signal_reid.ops.layout import with_unit_last_stride
from signal_reid.ops.triton.launch import ceil_div, launch, power_of_two

TILE = 8192  # elements of the tokens that one block of 8 warps holds in registers


@triton.jit
def _order_preserving(score):
    """An unsigned integer that orders as the score does: all NaN equal and above infinity, -0 equal to +0, none 0."""
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    ordered = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(score == score, ordered, 0xFFFFFFFF)


@triton.jit
def _score_kernel(
    tokens_at,
    intra_at,
    inter_at,
    scores_at,
    mask_at,
    N,
    C,
    tokens_stride_b,
    tokens_stride_m,
    tokens_stride_n,
    intra_stride_b,
    intra_stride_m,
    inter_stride_b,
    inter_stride_m,
    M: tl.constexpr,
    block_n: tl.constexpr,
    block_c: tl.constexpr,
    in_registers: tl.constexpr,
):
    """One block: `block_n` tokens of one modality; modality q ranks its own by intra_query, others by inter_query.

    Tokens are read once where their channels fit into one block, else once per query; the M queries once per block.
    Writes M scores per token (B, query, M, N), and a mask that has no token yet.
    """
    blocks = tl.cdiv(N, block_n)
    sample_and_modality = (tl.program_id(0) // blocks).to(tl.int64)
    b, m = sample_and_modality // M, sample_and_modality % M
    n = tl.program_id(0) % blocks * block_n + tl.arange(0, block_n)
    c = tl.arange(0, block_c)
    rows = tokens_at + b * tokens_stride_b + m * tokens_stride_m + n.to(tl.int64) * tokens_stride_n
    tl.store(mask_at + sample_and_modality * N + n, tl.full([block_n], 0, tl.int8), mask=n < N)

    if in_registers:
        tile = tl.load(rows[:, None] + c[None, :], mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
    for q in tl.static_range(M):
        # Only one of the two queries ranks these tokens; the other is not read.
        intra_size = tl.where(m == q, C, 0)
        inter_size = C - intra_size
        intra = intra_at + b * intra_stride_b + q * intra_stride_m
        inter = inter_at + b * inter_stride_b + q * inter_stride_m
        if in_registers:
            query = tl.load(intra + c, mask=c < intra_size, other=0.0).to(tl.float32)
            query += tl.load(inter + c, mask=c < inter_size, other=0.0).to(tl.float32)
            score = tl.sum(tile.to(tl.float32) * query[None, :], axis=1)
        else:
            sums = tl.full([block_n, block_c], 0, tl.float32)
            for first in range(0, C, block_c):
                column = first + c
                query = tl.load(intra + column, mask=column < intra_size, other=0.0).to(tl.float32)
                query += tl.load(inter + column, mask=column < inter_size, other=0.0).to(tl.float32)
                inside = (n < N)[:, None] & (column < C)[None, :]
                piece = tl.load(rows[:, None] + column[None, :], mask=inside, other=0.0)
                sums += piece.to(tl.float32) * query[None, :]
            score = tl.sum(sums, axis=1)
        ordered = _order_preserving(score).to(tl.int32, bitcast=True)
        tl.store(scores_at + ((b * M + q) * M + m) * N + n, ordered, mask=n < N)


@triton.jit
def _select_kernel(scores_at, mask_at, N, k_intra, k_inter, M: tl.constexpr, block: tl.constexpr):
    """One block: the list of one query, its own N tokens or the (M - 1) N of the other modalities.

    Reads the list, mostly from cache, once per bit of a score, and marks the tokens it keeps in the mask (B, M, N).
    """
    b = (tl.program_id(0) // (2 * M)).to(tl.int64)
    q = tl.program_id(0) % M
    across = tl.program_id(0) % (2 * M) >= M
    size = tl.where(across, (M - 1) * N, N)
    k = tl.where(across, k_inter, k_intra)
    # A list across modalities starts at row 0 of (M, N) and skips row q; the other one is row q.
    first = tl.where(across, 0, q * N)
    skip_from = tl.where(across, q * N, size)
    scores_at += (b * M + q) * M * N + first
    mask_at += b * M * N + first

    threshold = tl.full([], 0, tl.uint32)  # the largest that at least k scores reach
    bit = tl.full([], 0x80000000, tl.uint32)
    reached = 0
    while (bit > 0) & (reached != k):
        count = tl.full([block], 0, tl.int32)
        for start in range(0, size, block):
            score = _listed(scores_at, start + tl.arange(0, block), size, skip_from, N)
            count += (score >= (threshold | bit)).to(tl.int32)
        reached = tl.sum(count, axis=0)
        threshold = tl.where(reached >= k, threshold | bit, threshold)
        bit = bit >> 1

    count = tl.full([block], 0, tl.int32)
    for start in range(0, size, block):
        score = _listed(scores_at, start + tl.arange(0, block), size, skip_from, N)
        count += (score > threshold).to(tl.int32)
    equals_wanted = k - tl.sum(count, axis=0)

    for start in range(0, size, block):
        i = start + tl.arange(0, block)
        score = _listed(scores_at, i, size, skip_from, N)
        equal = (score == threshold).to(tl.int32)
        early = tl.cumsum(equal, axis=0) <= equals_wanted
        keep = (score > threshold) | ((equal != 0) & early)
        at = i + tl.where(i < skip_from, 0, N)
        tl.store(mask_at + at, keep, mask=keep & (i < size))  # lists that mark the same token write the same
        equals_wanted -= tl.sum(equal, axis=0)


@triton.jit
def _listed(scores_at, i, size, skip_from, N):
    """Score i of a list that skips a row of N; 0, which no score is, beyond its end."""
    at = i + tl.where(i < skip_from, 0, N)
    return tl.load(scores_at + at, mask=i < size, other=0).to(tl.uint32, bitcast=True)


def select_tokens(tokens: Tensor, intra_query: Tensor, inter_query: Tensor, k_intra: int, k_inter: int) -> Tensor:
    """Union of the tokens that any class token ranks among its best; see `signal_reid.ops.select_tokens`."""
    B, M, N, C = tokens.shape
    tokens, intra_query, inter_query = map(with_unit_last_stride, (tokens, intra_query, inter_query))
    scores = torch.empty((B, M, M, N), dtype=torch.int32, device=tokens.device)
    mask = torch.empty((B, M, N), dtype=torch.bool, device=tokens.device)

    block_c = power_of_two(C, 16, 1024)
    block_n = power_of_two(N, 1, min(TILE // block_c, 64))
    launch(
        _score_kernel,
        (B * M * ceil_div(N, block_n),),
        tokens,
        tokens,
        intra_query,
        inter_query,
        scores,
        mask,
        N,
        C,
        *tokens.stride()[:3],
        *intra_query.stride()[:2],
        *inter_query.stride()[:2],
        M=M,
        block_n=block_n,
        block_c=block_c,
        in_registers=block_c >= C,
        num_warps=8,
    )
    block = power_of_two((M - 1) * N, 32, 2048)
    arguments = scores, mask, N, k_intra, k_inter
    launch(_select_kernel, (B * 2 * M,), tokens, *arguments, M=M, block=block, num_warps=max(1, block // 512))
    return mask
