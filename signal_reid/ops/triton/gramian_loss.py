"""Contrastive loss on gramian volumes and its gradients in fp32 by Triton; signal_reid/ops/reference derives the maths.

Forward three launches: the basis of every column, the pairs, the lines (rows and columns of the volumes); above a batch
of 128 two sums more. Backward three: basis, pairs, gradients. No atomics: every result has a fixed order of additions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from signal_reid.ops.layout import with_unit_last_stride
from signal_reid.ops.triton.arithmetic import divide, exp
from signal_reid.ops.triton.gramian import (
    anchor_gradient,
    gradient_tile,
    height_for_gradient,
    orthonormalise,
    other_gradient,
    pair_tiles,
    tile_of_pairs,
    to_unit_length,
)
from signal_reid.ops.triton.launch import ceil_div, launch, power_of_two

LINES = 32
ONE_BLOCK = 128  # up to this batch one block takes all lines, and nothing has to sum up blocks


@triton.jit
def _loss_volumes_kernel(
    anchor_at, basis_at, area_at, volume_at, B, C, anchor_stride,
    k: tl.constexpr, block_p: tl.constexpr, block_q: tl.constexpr, block_c: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """One block: the volumes (B, B) of a tile of pairs, written once; `tile_of_pairs` states what is read."""
    i, j, _, _, squared, height = tile_of_pairs(
        anchor_at, basis_at, B, B, C, anchor_stride, k, block_p, block_q, block_c, chunk
    )
    volume = tl.load(area_at + j)[None, :] * (to_unit_length(squared) * height)
    tl.store(volume_at + i[:, None] * B + j[None, :], volume)


@triton.jit
def _lines_kernel(
    volume_at, temperature_at, statistics_at, loss_at, slope_at, B, smoothing,
    lines: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One block: one group of rows or columns after the other, as many apart as there are blocks.

    The volumes are read for rows and for columns twice, the second time from the cache. The statistics (4, B) and the
    block's share of the loss and of its slope are written once. Threads keep what they add up to themselves until the
    loops are over: that saves an exchange a step, and Triton 3.6 cannot compile `least` as minima of loaded tiles.
    """
    temperature = tl.load(temperature_at)
    along = tl.arange(0, block)[None, :]
    groups = tl.cdiv(B, lines)
    loss, slope = tl.zeros([lines], tl.float32), tl.zeros([lines], tl.float32)
    for group in range(tl.program_id(0), 2 * groups, tl.num_programs(0)):
        of_columns = group // groups
        line = (group % groups * lines + tl.arange(0, lines)).to(tl.int64)
        real = line < B
        at = volume_at + (line * tl.where(of_columns == 0, B, 1))[:, None]
        step = tl.where(of_columns == 0, 1, B)
        minima = tl.full([lines, block], float("inf"), tl.float32)
        for start in range(0, B, block):
            inside = real[:, None] & (along < B - start)
            volume = tl.load(at + (start + along) * step, mask=inside, other=float("inf"))
            minima = tl.minimum(minima, volume)
        least = tl.min(minima, 1)
        exponentials, weighted = tl.zeros([lines, block], tl.float32), tl.zeros([lines, block], tl.float32)
        total = tl.zeros([lines, block], tl.float32)
        for start in range(0, B, block):
            inside = real[:, None] & (along < B - start)
            volume = tl.load(at + (start + along) * step, mask=inside, other=0.0)
            excess = tl.where(inside, divide(volume - least[:, None], temperature), 0.0)
            exponential = tl.where(inside, exp(-excess), 0.0)
            exponentials += exponential
            weighted += excess * exponential
            total += excess
        exponentials, weighted, total = tl.sum(exponentials, 1), tl.sum(weighted, 1), tl.sum(total, 1)
        exponentials = tl.where(real, exponentials, 1.0)
        own = divide(tl.load(volume_at + line * (B + 1), mask=real, other=0.0) - least, temperature)
        target = (1 - smoothing) * own + smoothing * (total / B)
        loss += tl.where(real, tl.log(exponentials) + target, 0.0)
        slope += tl.where(real, divide(divide(weighted, exponentials) - target, temperature), 0.0)
        tl.store(statistics_at + 2 * of_columns * B + line, least, mask=real)
        tl.store(statistics_at + (2 * of_columns + 1) * B + line, divide(1.0, exponentials), mask=real)
    tl.store(loss_at + tl.program_id(0), tl.sum(loss, 0) / (2 * B))
    tl.store(slope_at + tl.program_id(0), tl.sum(slope, 0) / (2 * B))


@triton.jit
def _loss_pairs_kernel(
    anchor_at, basis_at, area_at, loss_grad_at, temperature_at, slope_at, statistics_at, smoothing, height_at,
    projections_at, grad_at, scale_at, grad_temperature_at, B, C, anchor_stride,
    k: tl.constexpr, block_p: tl.constexpr, block_q: tl.constexpr, block_c: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """One block: what the gradients need of a tile of pairs; `tile_of_pairs` states what is read.

    Heights and gradients of the volumes (B, B), projections (B, B, k) and the anchor's scales (B,) are written once;
    rows and columns beyond the last write what it writes.
    """
    i, j, row, projection, squared, height = tile_of_pairs(
        anchor_at, basis_at, B, B, C, anchor_stride, k, block_p, block_q, block_c, chunk
    )
    scale = to_unit_length(squared)
    height *= scale
    pair = i[:, None] * B + j[None, :]
    tl.store(projections_at + i[:, None] * (B * k) + row[None, :], scale * projection)
    tl.store(height_at + pair, height_for_gradient(height, scale * tl.sqrt_rn(squared)))
    tl.store(scale_at + i[:, None], scale)

    volume = tl.load(area_at + j)[None, :] * height
    grad, temperature = tl.load(loss_grad_at), tl.load(temperature_at)
    of_row = tl.load(statistics_at + i)[:, None] - volume
    of_row = exp(divide(of_row, temperature)) * tl.load(statistics_at + B + i)[:, None]
    of_column = tl.load(statistics_at + 2 * B + j)[None, :] - volume
    of_column = exp(divide(of_column, temperature)) * tl.load(statistics_at + 3 * B + j)[None, :]
    target = smoothing / B + tl.where(i[:, None] == j[None, :], 1.0 - smoothing, 0.0)
    tl.store(grad_at + pair, grad * (2 * target - of_row - of_column) / (2 * B * temperature))
    if tl.program_id(0) == 0:
        tl.store(grad_temperature_at, grad * tl.load(slope_at))


@triton.jit
def _loss_gradients_kernel(
    features_at, grad_features_at, basis_at, area_at, adjugate_at, others_scale_at, anchor_scale_at, grad_at,
    height_at, projections_at, B, C, stride_b, stride_m,
    vectors: tl.constexpr, k: tl.constexpr, tile: tl.constexpr, reduced: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One block: some samples times some channels of one modality's gradient; the anchor's blocks come first.

    Samples beyond the last repeat it, and write what it writes.
    """
    block, anchor_blocks = tl.program_id(0), tl.cdiv(B, tile)
    grad_stride = (1 + vectors) * C
    if block < anchor_blocks:
        anchor_gradient(
            block, features_at, grad_features_at, basis_at, area_at, grad_at, height_at, projections_at,
            anchor_scale_at, B, B, C, stride_b, grad_stride, True, k, tile, reduced, block_c,
        )  # fmt: skip
    else:
        m = (block - anchor_blocks) % vectors
        other_gradient(
            m, (block - anchor_blocks) // vectors, features_at, features_at + (1 + m) * stride_m,
            grad_features_at + (1 + m) * C, basis_at, area_at, adjugate_at, grad_at, height_at, projections_at,
            anchor_scale_at, others_scale_at, B, B, C, stride_b, grad_stride, True, k, tile, reduced, block_c,
        )  # fmt: skip


def forward(features: Tensor, temperature: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B, M, C) and (), fp32 -> the loss (), its derivative by the temperature (), statistics (4, B)."""
    features = with_unit_last_stride(features)
    B, _, C = features.shape
    statistics = features.new_empty(4, B)
    if B == 0:
        return features.new_full((), torch.nan), features.new_full((), torch.nan), statistics  # means over nothing
    anchor, *others = features.unbind(1)
    basis, area, _, _ = orthonormalise(others, normalised=True)
    volume = features.new_empty(B, B)
    blocks, settings = pair_tiles(B, B, C, basis.shape[1])
    launch(_loss_volumes_kernel, (blocks,), anchor, anchor, basis, area, volume, B, C, anchor.stride(0), **settings)

    blocks = 1 if B <= ONE_BLOCK else 2 * ceil_div(B, LINES)
    loss, slope = features.new_empty(blocks), features.new_empty(blocks)
    launch(
        _lines_kernel,
        (blocks,),
        volume,
        *(volume, temperature, statistics, loss, slope, B, label_smoothing),
        lines=LINES,
        block=power_of_two(B, smallest=16, largest=32),
        num_warps=8,
    )
    if blocks == 1:
        return loss.view(()), slope.view(()), statistics
    return loss.sum(), slope.sum(), statistics


def backward(
    features: Tensor, grad: Tensor, temperature: Tensor, slope: Tensor, statistics: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the features (B, M, C) and of the temperature (), given that of the loss and what `forward` gave."""
    features = with_unit_last_stride(features)
    B, M, C = features.shape
    if features.numel() == 0:
        return features.new_zeros(B, M, C), grad * slope
    anchor, *others = features.unbind(1)
    basis, area, adjugate, others_scale = orthonormalise(others, normalised=True)
    k = basis.shape[1]
    heights, of_volumes, projections = features.new_empty(B, B), features.new_empty(B, B), features.new_empty(B, B, k)
    anchor_scale, grad_temperature = features.new_empty(B), features.new_empty(())
    blocks, settings = pair_tiles(B, B, C, k)
    launch(
        _loss_pairs_kernel,
        (blocks,),
        anchor,
        *(anchor, basis, area, grad, temperature, slope, statistics, label_smoothing),
        *(heights, projections, of_volumes, anchor_scale, grad_temperature, B, C, anchor.stride(0)),
        **settings,
    )
    grad_features = features.new_empty(B, M, C)
    tile, block_c = gradient_tile(B, B, C, M - 1)
    launch(
        _loss_gradients_kernel,
        (M * ceil_div(B, tile), ceil_div(C, block_c)),
        features,
        *(features, grad_features, basis, area, adjugate, others_scale, anchor_scale),
        *(of_volumes, heights, projections, B, C, features.stride(0), features.stride(1)),
        vectors=M - 1,
        k=k,
        tile=tile,
        reduced=16,
        block_c=block_c,
        num_warps=tile // 4,
        num_stages=2,
    )
    return grad_features, grad_temperature
