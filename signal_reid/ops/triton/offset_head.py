"""The offset head by Triton: one launch forward, two backward; the maths is in signal_reid/ops/reference.

Activations are computed again in the backward instead of being stored. Arithmetic and sums are in fp32. No atomics:
every result has one writer and a fixed order of additions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from signal_reid.ops.dispatch import BackendError
from signal_reid.ops.layout import with_unit_last_stride
from signal_reid.ops.triton.launch import ceil_div, launch, power_of_two

SIDE, TAPS = tl.constexpr(4), tl.constexpr(16)
ENTRIES = tl.constexpr(19)  # gradients per channel: of bias, window bias, projection, window
WINDOWS = 8  # of a block of the forward
CHANNELS, BACKWARD_CHANNELS, WARPS, SUMMED = 128, 64, 4, 1024  # of a block; the backward keeps twice as much of each
BLOCKS_PER_MULTIPROCESSOR = 3  # of the backward, at once
INTERPRETED_PARTS = 3


@triton.jit
def _gelu(x):
    """x Phi(x) and its derivative; 1 - Phi by Abramowitz and Stegun, 7.1.26, to 1e-7."""
    z = tl.abs(x) * 0.70710678
    t = tl.div_rn(1.0, 1.0 + 0.3275911 * z)
    bell = tl.exp(-z * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * bell
    below = tl.where(x < 0, tail, 1.0 - tail)
    return x * below, below + x * (0.39894228 * bell)


@triton.jit
def _parameters(bias_at, window_at, window_bias_at, out_at, m, c, C):
    """The parameters of channels c of modality m: bias, window (16, channels), window bias and projection, in fp32."""
    channel = m * C + c
    inside = c < C
    tap = tl.arange(0, TAPS)
    window = tl.load(window_at + (channel * TAPS)[None, :] + tap[:, None], mask=inside[None, :], other=0.0)
    bias = tl.load(bias_at + channel, mask=inside, other=0.0)
    window_bias = tl.load(window_bias_at + channel, mask=inside, other=0.0)
    out = tl.load(out_at + channel, mask=inside, other=0.0)
    return bias.to(tl.float32), window.to(tl.float32), window_bias.to(tl.float32), out.to(tl.float32)


@triton.jit(do_not_specialize=["B", "H", "W"])
def _forward_kernel(
    hidden_at, bias_at, window_at, window_bias_at, out_at, offsets_at,
    B, H, W, C, stride_m, stride_b, stride_n,
    group: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One block: `group` windows of one modality, all channels.

    Hidden tokens are read once, the parameters once per block, one number per window is written.
    """
    Hk, Wk = H // SIDE, W // SIDE
    windows = B * Hk * Wk
    blocks = tl.cdiv(windows, group)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * group
    tap, of_group = tl.arange(0, TAPS), tl.arange(0, group)
    sums = tl.zeros([group], tl.float32)
    for start in range(0, C, block_c):
        c = start + tl.arange(0, block_c)
        bias, window, window_bias, out = _parameters(bias_at, window_at, window_bias_at, out_at, m, c, C)
        for index in range(first, tl.minimum(first + group, windows)):
            b, row, column = (index // (Hk * Wk)).to(tl.int64), index // Wk % Hk, index % Wk
            token = ((row * SIDE + tap // SIDE) * W + column * SIDE + tap % SIDE).to(tl.int64)
            tokens_at = hidden_at + m * stride_m + b * stride_b + (token * stride_n)[:, None] + c[None, :]
            hidden = tl.load(tokens_at, mask=(c < C)[None, :], other=0.0).to(tl.float32)
            active, _ = _gelu(hidden + bias[None, :])
            seen, _ = _gelu(tl.sum(active * window, 0) + window_bias)
            sums += tl.where(of_group == index - first, tl.sum(seen * out, 0), 0.0)
    offsets_at += m * windows + first + of_group
    tl.store(offsets_at, sums.to(offsets_at.dtype.element_ty), mask=first + of_group < windows)


@triton.jit(do_not_specialize=["B", "H", "W", "parts"])
def _backward_kernel(
    grad_at, hidden_at, bias_at, window_at, window_bias_at, out_at, grad_hidden_at, shares_at,
    M, B, H, W, C, stride_m, stride_b, stride_n, parts,
    block_c: tl.constexpr,
):  # fmt: skip
    """One block: one part of one modality's cells, block_c channels.

    A cell is a window, or what is left of one at the right and at the bottom, whose tokens have no gradient. Hidden
    tokens are read once, their gradient is written once; so is the part's share of the parameters' gradients.
    """
    Hk, Wk = H // SIDE, W // SIDE
    rows, columns = tl.cdiv(H, SIDE), tl.cdiv(W, SIDE)
    channel_blocks = tl.cdiv(C, block_c)
    c = tl.program_id(0) % channel_blocks * block_c + tl.arange(0, block_c)
    m = (tl.program_id(0) // channel_blocks % M).to(tl.int64)
    part = tl.program_id(0) // channel_blocks // M
    tap = tl.arange(0, TAPS)
    bias, window, window_bias, out = _parameters(bias_at, window_at, window_bias_at, out_at, m, c, C)

    of_bias = tl.zeros([TAPS, block_c], tl.float32)  # summed over the window's tokens at the end
    of_window = tl.zeros([TAPS, block_c], tl.float32)
    of_window_bias = tl.zeros([block_c], tl.float32)
    of_out = tl.zeros([block_c], tl.float32)
    cells = (B * rows * columns).to(tl.int64)
    for index in range((part * cells // parts).to(tl.int32), ((part + 1) * cells // parts).to(tl.int32)):
        b, row, column = (index // (rows * columns)).to(tl.int64), index // columns % rows, index % columns
        y, x = row * SIDE + tap // SIDE, column * SIDE + tap % SIDE
        token = (y * W + x).to(tl.int64)
        real = ((y < H) & (x < W))[:, None] & (c < C)[None, :]
        covered = (y < Hk * SIDE) & (x < Wk * SIDE)  # alike for the whole cell
        whole = covered[:, None] & (c < C)[None, :]
        tokens_at = hidden_at + m * stride_m + b * stride_b + (token * stride_n)[:, None] + c[None, :]
        hidden = tl.load(tokens_at, mask=whole, other=0.0).to(tl.float32)
        at = ((m * B + b) * Hk + row) * Wk + column
        grad = tl.load(grad_at + at + tap, mask=covered & (tap == 0), other=0.0).to(tl.float32)
        grad = tl.sum(grad, 0)  # zero beyond the last window
        active, slope = _gelu(hidden + bias[None, :])
        seen, seen_slope = _gelu(tl.sum(active * window, 0) + window_bias)
        of_sum = grad * out * seen_slope
        of_token = tl.where(whole, of_sum[None, :] * window * slope, 0.0)
        of_bias += of_token
        of_window += of_sum[None, :] * active
        of_window_bias += of_sum
        of_out += grad * seen
        tokens_at = grad_hidden_at + ((m * B + b) * H * W + token)[:, None] * C + c[None, :]
        tl.store(tokens_at, of_token.to(tokens_at.dtype.element_ty), mask=real)
    shares_at += (part * M + m) * ENTRIES * C + c
    tl.store(shares_at, tl.sum(of_bias, 0), mask=c < C)
    tl.store(shares_at + C, of_window_bias, mask=c < C)
    tl.store(shares_at + 2 * C, of_out, mask=c < C)
    tl.store(shares_at[None, :] + ((3 + tap) * C)[:, None], of_window, mask=(c < C)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _parameters_kernel(
    shares_at, grad_bias_at, grad_window_at, grad_window_bias_at, grad_out_at, size, C, parts, block: tl.constexpr
):
    """One block: numbers of the parameters' gradients, the sums of all parts' shares, which are read once."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    share_at = shares_at + index
    for _ in range(parts):
        total += tl.load(share_at, mask=index < size, other=0.0)
        share_at += size
    entry = tl.where(index < size, index // C % ENTRIES, ENTRIES)  # none beyond the last
    channel = index // C // ENTRIES * C + index % C
    tl.store(grad_bias_at + channel, total.to(grad_bias_at.dtype.element_ty), mask=entry == 0)
    tl.store(grad_window_bias_at + channel, total.to(grad_window_bias_at.dtype.element_ty), mask=entry == 1)
    tl.store(grad_out_at + channel, total.to(grad_out_at.dtype.element_ty), mask=entry == 2)
    of_window = (entry >= 3) & (entry < ENTRIES)
    tl.store(grad_window_at + channel * TAPS + entry - 3, total.to(grad_window_at.dtype.element_ty), mask=of_window)


def forward(
    hidden: Tensor, bias: Tensor, window: Tensor, window_bias: Tensor, out: Tensor, rows: int, columns: int
) -> Tensor:
    """(M, B, rows * columns, C), parameters -> (M, B, rows // 4, columns // 4); see `ops.predict_offsets`.

    Raises:
        BackendError: a parameter in fp64, or 2^31 windows or more.
    """
    _check(hidden, bias)
    hidden = with_unit_last_stride(hidden)
    parameters = [parameter.contiguous() for parameter in (bias, window, window_bias, out)]
    M, B, _, C = hidden.shape
    Hk, Wk = rows // SIDE.value, columns // SIDE.value
    offsets = torch.empty((M, B, Hk, Wk), dtype=hidden.dtype, device=hidden.device)
    launch(
        _forward_kernel,
        (M * ceil_div(B * Hk * Wk, WINDOWS),),
        hidden,
        *(hidden, *parameters, offsets, B, rows, columns, C, *hidden.stride()[:3]),
        group=WINDOWS,
        block_c=_channels(C, CHANNELS),
        num_warps=WARPS,
    )
    return offsets


def backward(
    grad: Tensor,
    hidden: Tensor,
    bias: Tensor,
    window: Tensor,
    window_bias: Tensor,
    out: Tensor,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the hidden tokens, bias, window, window bias and projection, given `grad` (M, B, Hk, Wk).

    Raises:
        BackendError: as in `forward`.
    """
    _check(hidden, bias)
    grad, hidden = grad.contiguous(), with_unit_last_stride(hidden)
    parameters = [parameter.contiguous() for parameter in (bias, window, window_bias, out)]
    M, B, _, C = hidden.shape
    channel_blocks = ceil_div(C, _channels(C, BACKWARD_CHANNELS))
    parts = _parts(hidden, M * channel_blocks, B * ceil_div(rows, SIDE.value) * ceil_div(columns, SIDE.value))
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    make = torch.empty if parts else torch.zeros
    of_bias, of_window, of_window_bias, of_out = (make(p.shape, dtype=p.dtype, device=p.device) for p in parameters)
    shares = torch.empty((parts, M, ENTRIES.value, C), dtype=torch.float32, device=hidden.device)
    launch(
        _backward_kernel,
        (parts * M * channel_blocks,),
        hidden,
        *(grad, hidden, *parameters, grad_hidden, shares, M, B, rows, columns, C, *hidden.stride()[:3], parts),
        block_c=_channels(C, BACKWARD_CHANNELS),
        num_warps=WARPS,
    )
    size = M * ENTRIES.value * C
    launch(
        _parameters_kernel,
        (ceil_div(size, SUMMED) if parts else 0,),
        hidden,
        *(shares, of_bias, of_window, of_window_bias, of_out, size, C, parts),
        block=SUMMED,
        num_warps=WARPS,
    )
    return grad_hidden, of_bias, of_window, of_window_bias, of_out


def _channels(C: int, most: int) -> int:
    """How many channels a block works on at a time."""
    return power_of_two(C, smallest=16, largest=most)


def _parts(hidden: Tensor, blocks: int, cells: int) -> int:
    """As many parts of a modality's maps as a GPU takes at once, none of them without a window."""
    if not hidden.is_cuda:
        return min(cells, INTERPRETED_PARTS)
    multiprocessors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    return min(cells, max(1, BLOCKS_PER_MULTIPROCESSOR * multiprocessors // max(blocks, 1)))


def _check(hidden: Tensor, parameter: Tensor) -> None:
    M, B, N, _ = hidden.shape
    if parameter.dtype == torch.float64:
        raise BackendError("backend triton cannot compute with float64 parameters; use backend reference")
    if M * B * N >= 2**31:
        raise BackendError(
            f"backend triton cannot predict offsets from hidden tokens of shape {tuple(hidden.shape)}: "
            "less than 2^31 tokens are counted; use backend reference"
        )
