"""Shift-aware deformable bilinear sampling by Triton: one launch each way; the maths is in signal_reid/ops/reference.

tanh, range, reference points, clamp and bilinear weights are computed in fp32 where they are used, never written.
Sums are kept in fp32 and rounded once. No atomics: every result has one writer and a fixed order of additions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from signal_reid.ops.layout import with_unit_last_stride
from signal_reid.ops.triton.launch import ceil_div, launch, power_of_two

# Elements of a block: of the samples, of the points whose offset's gradient it takes, of the tokens' gradient. A thread
# then has 16, 8 or 16, in accesses of 16 bytes.
SAMPLES, POINTS, TOKENS, WARPS = 2048, 1024, 2048, 4
BACKWARD_REGISTERS = 96  # left to itself, the assembler of Triton 3.8 takes 80 for fp16 on sm_86 and spills
LOCATED = 128  # points that a block of the tokens' gradient locates at a time


@triton.jit
def _axis(index, count, size, shift):
    """Token before and after each point along one axis, fraction and slope (pixels per shift, 0 where clamped).

    A NaN shift keeps its NaN in the fraction and reads token 0.
    """
    windows = (count - 1).to(tl.float32)
    extent = (size - 1).to(tl.float32)
    position = tl.div_rn(2 * (index + 0.5) + shift, windows) - 1
    clamped = tl.where(position < -1, -1.0, tl.where(position > 1, 1.0, position))
    pixel = (clamped + 1) / 2 * extent
    before = tl.floor(pixel)
    low = tl.where(before >= 0, before, 0.0).to(tl.int32)
    high = tl.where(low + 1 < size, low + 1, low)
    slope = tl.where((position >= -1) & (position <= 1), 0.5 * tl.div_rn(extent, windows), 0.0)
    return low, high, pixel - before, slope


@triton.jit
def _locate(offsets_at, s, S, H, W, Hk, Wk, offset_range):
    """Both axes of the points s of a map, and d shift / d offset."""
    offset = tl.load(offsets_at + s, mask=s < S, other=0.0).to(tl.float32)
    decay = tl.exp(-2 * tl.abs(offset))
    bent = tl.div_rn(1 - decay, 1 + decay)  # tanh |offset|
    shift = tl.where(offset < 0, -bent, bent) * offset_range
    top, bottom, f, y_slope = _axis(s // Wk, Hk, H, shift)
    left, right, g, x_slope = _axis(s % Wk, Wk, W, shift)
    return top, bottom, f, y_slope, left, right, g, x_slope, (1 - bent * bent) * offset_range


@triton.jit
def _load(map_at, row, row_stride, c, inside):
    """Channels c of these rows of a map, in fp32."""
    return tl.load(map_at + row.to(tl.int64)[:, None] * row_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["H", "W", "Hk", "Wk"])
def _forward_kernel(
    tokens_at, offsets_at, sampled_at, H, W, C, Hk, Wk, stride_b, stride_n, offset_range,
    block_s: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One block: block_s points of one map times block_c channels.

    Each point's offset is read once per block of channels, its four tokens once, its sample written once.
    """
    S = Hk * Wk
    blocks = tl.cdiv(S, block_s)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * block_s + tl.arange(0, block_s)
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    inside = (s < S)[:, None] & (c < C)[None, :]
    top, bottom, f, _, left, right, g, _, _ = _locate(offsets_at + b * S, s, S, H, W, Hk, Wk, offset_range)

    map_at = tokens_at + b * stride_b
    top_left = _load(map_at, top * W + left, stride_n, c, inside)
    top_right = _load(map_at, top * W + right, stride_n, c, inside)
    bottom_left = _load(map_at, bottom * W + left, stride_n, c, inside)
    bottom_right = _load(map_at, bottom * W + right, stride_n, c, inside)
    sampled = top_left * ((1 - f) * (1 - g))[:, None] + top_right * ((1 - f) * g)[:, None]
    sampled += bottom_left * (f * (1 - g))[:, None] + bottom_right * (f * g)[:, None]
    sampled_at += (b * S + s)[:, None] * C + c[None, :]
    tl.store(sampled_at, sampled.to(sampled_at.dtype.element_ty), mask=inside)


@triton.jit
def _offsets_gradient(
    block, grad_at, tokens_at, offsets_at, grad_offsets_at, H, W, C, Hk, Wk, stride_b, stride_n, offset_range,
    block_s: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """block_s points of one map: the gradient and four tokens of each are read once, one number per point written."""
    S = Hk * Wk
    blocks = tl.cdiv(S, block_s)
    b = (block // blocks).to(tl.int64)
    s = block % blocks * block_s + tl.arange(0, block_s)
    top, bottom, f, y_slope, left, right, g, x_slope, slope = _locate(
        offsets_at + b * S, s, S, H, W, Hk, Wk, offset_range
    )

    map_at = tokens_at + b * stride_b
    along_y = tl.zeros([block_s, block_c], tl.float32)
    along_x = tl.zeros([block_s, block_c], tl.float32)
    for start in range(0, C, block_c):
        c = start + tl.arange(0, block_c)
        inside = (s < S)[:, None] & (c < C)[None, :]
        flow = _load(grad_at + b * S * C, s, C, c, inside)
        top_left = _load(map_at, top * W + left, stride_n, c, inside)
        top_right = _load(map_at, top * W + right, stride_n, c, inside)
        bottom_left = _load(map_at, bottom * W + left, stride_n, c, inside)
        bottom_right = _load(map_at, bottom * W + right, stride_n, c, inside)
        along_y += flow * ((1 - g)[:, None] * (bottom_left - top_left) + g[:, None] * (bottom_right - top_right))
        along_x += flow * ((1 - f)[:, None] * (top_right - top_left) + f[:, None] * (bottom_right - bottom_left))
    moved = tl.sum(along_y, 1) * y_slope + tl.sum(along_x, 1) * x_slope
    tl.store(grad_offsets_at + b * S + s, (moved * slope).to(grad_offsets_at.dtype.element_ty), mask=s < S)


@triton.jit
def _read(offsets_at, s, S, H, W, Hk, Wk, offset_range, first, end):
    """Whether points s of a map read any of its tokens from `first` to before `end`."""
    top, bottom, _, _, left, right, _, _, _ = _locate(offsets_at, s, S, H, W, Hk, Wk, offset_range)
    in_top = (top * W + right >= first) & (top * W + left < end)
    in_bottom = (bottom * W + right >= first) & (bottom * W + left < end)
    return (s < S) & (in_top | in_bottom)


@triton.jit
def _tokens_gradient(
    block, grad_at, offsets_at, grad_tokens_at, H, W, C, Hk, Wk, offset_range,
    block_n: tl.constexpr, block_s: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """block_n tokens of one map times block_c channels: sums over the points that touch them, found block_s at a time.

    Reads the gradient of a point once per block that it touches, writes every token once, zeros too.
    """
    N, S = H * W, Hk * Wk
    channel_blocks, token_blocks = tl.cdiv(C, block_c), tl.cdiv(N, block_n)
    b = (block // channel_blocks // token_blocks).to(tl.int64)
    first = block // channel_blocks % token_blocks * block_n
    n = first + tl.arange(0, block_n)
    y, x = n // W, n % W
    c = block % channel_blocks * block_c + tl.arange(0, block_c)

    total = tl.zeros([block_n, block_c], tl.float32)
    for start in range(0, S, block_s):
        s = start + tl.arange(0, block_s)
        near = _read(offsets_at + b * S, s, S, H, W, Hk, Wk, offset_range, first, first + block_n)
        point = tl.min(tl.where(near, s, S), 0)
        while point < S:
            top, bottom, f, _, left, right, g, _, _ = _locate(offsets_at + b * S, point, S, H, W, Hk, Wk, offset_range)
            touched = ((y == top) | (y == bottom)) & ((x == left) | (x == right))
            y_share = tl.where(y == top, 1 - f, 0.0) + tl.where(y == bottom, f, 0.0)
            x_share = tl.where(x == left, 1 - g, 0.0) + tl.where(x == right, g, 0.0)
            flow = tl.load(grad_at + (b * S + point) * C + c, mask=c < C, other=0.0).to(tl.float32)
            total += tl.where(touched[:, None], (y_share * x_share)[:, None] * flow[None, :], 0.0)
            point = tl.min(tl.where(near & (s > point), s, S), 0)
    grad_tokens_at += (b * N + n)[:, None] * C + c[None, :]
    tl.store(grad_tokens_at, total.to(grad_tokens_at.dtype.element_ty), mask=(n < N)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["H", "W", "Hk", "Wk", "offset_blocks"])
def _backward_kernel(
    grad_at, tokens_at, offsets_at, grad_tokens_at, grad_offsets_at,
    offset_blocks, H, W, C, Hk, Wk, stride_b, stride_n, offset_range,
    block_s: tl.constexpr, block_n: tl.constexpr, located: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """The first blocks take the offsets' gradient, the others the tokens'."""
    block = tl.program_id(0)
    if block < offset_blocks:
        _offsets_gradient(
            block, grad_at, tokens_at, offsets_at, grad_offsets_at,
            H, W, C, Hk, Wk, stride_b, stride_n, offset_range, block_s, block_c,
        )  # fmt: skip
    else:
        _tokens_gradient(
            block - offset_blocks, grad_at, offsets_at, grad_tokens_at,
            H, W, C, Hk, Wk, offset_range, block_n, located, block_c,
        )  # fmt: skip


def forward(tokens: Tensor, offsets: Tensor, rows: int, columns: int, offset_range: float) -> Tensor:
    """(B, rows * columns, C) and (B, Hk, Wk) -> (B, Hk * Wk, C); see `signal_reid.ops.deformable_sample`."""
    tokens, offsets = with_unit_last_stride(tokens), offsets.contiguous()
    (B, _, C), (_, Hk, Wk) = tokens.shape, offsets.shape
    sampled = torch.empty((B, Hk * Wk, C), dtype=tokens.dtype, device=tokens.device)
    block_c = _channels(C)
    block_s = power_of_two(Hk * Wk, largest=SAMPLES // block_c)
    launch(
        _forward_kernel,
        (B * ceil_div(Hk * Wk, block_s), ceil_div(C, block_c)),
        tokens,
        *(tokens, offsets, sampled),
        *(rows, columns, C, Hk, Wk, *tokens.stride()[:2], offset_range),
        block_s=block_s,
        block_c=block_c,
        num_warps=WARPS,
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
    block_c = _channels(C)
    block_s = power_of_two(Hk * Wk, largest=POINTS // block_c)
    block_n = power_of_two(N, largest=TOKENS // block_c)
    offset_blocks = B * ceil_div(Hk * Wk, block_s)
    launch(
        _backward_kernel,
        (offset_blocks + B * ceil_div(N, block_n) * ceil_div(C, block_c),),
        tokens,
        *(grad, tokens, offsets, grad_tokens, grad_offsets),
        *(offset_blocks, rows, columns, C, Hk, Wk, *tokens.stride()[:2], offset_range),
        block_s=block_s,
        block_n=block_n,
        located=power_of_two(Hk * Wk, largest=LOCATED),
        block_c=block_c,
        num_warps=WARPS,
        maxnreg=BACKWARD_REGISTERS,
    )
    return grad_tokens, grad_offsets


def _channels(C: int) -> int:
    """How many channels a block works on at a time."""
    return power_of_two(C, smallest=16, largest=512)
