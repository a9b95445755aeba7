"""Pairwise gramian volume and its gradients in fp32 by Triton; signal_reid/ops/reference derives the maths.

V = area_j * height_ij, height^2 = |a|^2 - sum_l (a . q_l)^2, q the orthonormal basis of column j's vectors. Where that
difference cancels, the height is taken from the residual a - sum_l (a . q_l) q_l, which keeps its digits. Two launches
forward, three backward. No atomics: every result has a fixed order of additions, and where a tile's lanes repeat its
last row or column they write the same bits.

`gramian_loss` uses the same with `normalised`: every vector is taken at length 1, though it is read as it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from signal_reid.ops.layout import with_unit_last_stride
from signal_reid.ops.reference import gramian as reference
from signal_reid.ops.triton.arithmetic import divide
from signal_reid.ops.triton.launch import ceil_div, launch, power_of_two

CANCELLED = tl.constexpr(1 / 128)  # below this share of |a|^2 the height is taken from the residual
EPSILON = tl.constexpr(1.1920929e-7)  # of fp32
SHORTEST = tl.constexpr(1e-12)  # a vector shorter than this is divided by this, as F.normalize does
LARGEST_SCALE = tl.constexpr(1e12)  # of such a vector
WIDEST_BASIS = 16384  # numbers of a column's vectors that the registers of one block hold
MANY_BLOCKS = 256


@triton.jit
def _row(which, at_0, at_1, at_2, at_3):
    """The address of the vector, among those of one column, that `which` numbers."""
    return tl.where(which < 2, tl.where(which < 1, at_0, at_1), tl.where(which < 3, at_2, at_3))


@triton.jit
def to_unit_length(squared):
    """What a vector of this squared length is multiplied by."""
    return divide(1.0, tl.maximum(tl.sqrt_rn(squared), SHORTEST))


@triton.jit
def _basis_kernel(
    other_0, other_1, other_2, other_3, stride_0, stride_1, stride_2, stride_3, basis_at, area_at, adjugate_at,
    scale_at, C, normalised: tl.constexpr, vectors: tl.constexpr, k: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One block: the basis of one column, in registers, by Gram-Schmidt with every vector projected twice.

    The vectors are read once, the basis (Q, k, C), its area (Q,) and the triangle's adjugate (Q, k, k) written once.
    With R = [[R', r], [0, d]], adj R = [[d adj R', -adj R' r], [0, det R']]. A direction of length 0 stays 0.
    """
    j = tl.program_id(0).to(tl.int64)
    direction, c = tl.arange(0, k), tl.arange(0, block_c)
    basis = tl.zeros([k, block_c], tl.float32)
    adjugate = tl.zeros([k, k], tl.float32)
    area = 1.0
    for n in range(vectors):  # unrolled, four would take three times as long to compile
        row = _row(n, other_0 + j * stride_0, other_1 + j * stride_1, other_2 + j * stride_2, other_3 + j * stride_3)
        residual = tl.load(row + c, mask=c < C, other=0.0)
        above = tl.zeros([k], tl.float32)
        for _ in range(2):
            overlap = tl.sum(basis * residual[None, :], 1)
            residual -= tl.sum(basis * overlap[:, None], 0)
            above += overlap
        length = tl.sqrt_rn(tl.sum(residual * residual, 0))
        unit = tl.where(length == 0, 0.0, divide(residual, length))
        basis = tl.where((direction == n)[:, None], unit[None, :], basis)
        if normalised:
            scale = to_unit_length(tl.sum(above * above, 0) + length * length)
            tl.store(scale_at + j * k + n, scale)
            above *= scale
            length *= scale
        corner = tl.where(direction == n, area, -tl.sum(adjugate * above[None, :], 1))
        adjugate = tl.where((direction == n)[None, :], corner[:, None], adjugate * length)
        area *= length

    tl.store(basis_at + (j * k + direction)[:, None] * C + c[None, :], basis, mask=(c < C)[None, :])
    tl.store(area_at + j, area)
    tl.store(adjugate_at + (j * k + direction)[:, None] * k + direction[None, :], adjugate)


@triton.jit
def _squared_residual(
    anchor_at, basis_at, projection, i, j, C, stop, anchor_stride,
    k: tl.constexpr, block_p: tl.constexpr, block_q: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """|a_i - sum_l t_l q_jl|^2 of a tile of pairs; reads the anchor and the basis of the tile once, up to `stop`."""
    direction, c = tl.arange(0, k)[None, None, :], tl.arange(0, chunk)[None, :]
    a_at = anchor_at + i[:, None] * anchor_stride + c
    q_at = basis_at + j[:, None] * k * C + c
    total = tl.zeros([block_p, block_q], tl.float32)
    for start in range(0, stop, chunk):
        inside = c < C - start
        residual = tl.load(a_at + start, mask=inside, other=0.0)[:, None, :] + tl.zeros([1, block_q, 1], tl.float32)
        for n in range(k):
            t = tl.sum(tl.where(direction == n, projection, 0.0), 2)[:, :, None]
            residual -= t * tl.load(q_at + (start + n * C), mask=inside, other=0.0)[None, :, :]
        total += tl.sum(residual * residual, 2)
    return total


@triton.jit
def tile_of_pairs(
    anchor_at, basis_at, P, Q, C, anchor_stride,
    k: tl.constexpr, block_p: tl.constexpr, block_q: tl.constexpr, block_c: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """The block's rows i, columns j and directions; projections (rows, directions), |a|^2 (rows, 1), heights (rows, j).

    The anchor is read once per block of columns, the basis once per block of rows. Rows and columns beyond the last
    repeat it.
    """
    blocks = tl.cdiv(Q, block_q)
    i = tl.minimum(tl.program_id(0) // blocks * block_p + tl.arange(0, block_p), P - 1).to(tl.int64)
    first = tl.program_id(0) % blocks * block_q
    j = tl.minimum(first + tl.arange(0, block_q), Q - 1).to(tl.int64)
    e = tl.arange(0, block_q * k)  # column by column, its directions
    row = tl.minimum(first + e // k, Q - 1).to(tl.int64) * k + e % k

    c = tl.arange(0, block_c)
    a_at = anchor_at + i[:, None] * anchor_stride + c[None, :]
    q_at = basis_at + row[:, None] * C + c[None, :]
    projection = tl.zeros([block_p, block_q * k], tl.float32)
    squared = tl.zeros([block_p], tl.float32)
    for start in range(0, C, block_c):
        inside = (c < C - start)[None, :]
        a = tl.load(a_at + start, mask=inside, other=0.0)
        q = tl.load(q_at + start, mask=inside, other=0.0)
        projection = tl.dot(a, tl.trans(q), projection, input_precision="ieee")
        squared += tl.sum(a * a, 1)
    of_columns = tl.reshape(projection, [block_p, block_q, k])
    squared = squared[:, None]
    height = squared - tl.sum(of_columns * of_columns, 2)  # squared
    cancelled = height < squared * CANCELLED  # Triton 3.7 and 3.8 interpret no constant times a tensor
    stop = tl.where(tl.max(tl.max(cancelled.to(tl.int32), 1), 0) > 0, C, 0)
    residual = _squared_residual(
        anchor_at, basis_at, of_columns, i, j, C, stop, anchor_stride, k, block_p, block_q, chunk
    )
    height = tl.where(cancelled, residual, height)
    return i, j, row, projection, squared, tl.sqrt_rn(tl.where(height < 0, 0.0, height))  # a NaN stays


@triton.jit
def height_for_gradient(height, length):
    """Below the rounding of |a| the direction of the residual is noise; the floor keeps its gradient bounded."""
    floor = length * EPSILON
    return tl.where((height < floor) & (height != 0), floor, height)


@triton.jit(do_not_specialize=["backward"])
def _pairs_kernel(
    anchor_at, basis_at, area_at, result_at, projections_at, P, Q, C, anchor_stride, backward,
    k: tl.constexpr, block_p: tl.constexpr, block_q: tl.constexpr, block_c: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """One block: a tile of pairs, whose reads `tile_of_pairs` states.

    Forward it writes V (P, Q); backward the heights (P, Q) and the projections (P, Q, k). Which of the two is decided
    as it runs: both share what was compiled. Rows and columns beyond the last write what it writes.
    """
    i, j, row, projection, squared, height = tile_of_pairs(
        anchor_at, basis_at, P, Q, C, anchor_stride, k, block_p, block_q, block_c, chunk
    )
    if backward != 0:
        tl.store(projections_at + i[:, None] * (Q * k) + row[None, :], projection)
        result = height_for_gradient(height, tl.sqrt_rn(squared))
    else:
        result = tl.load(area_at + j)[None, :] * height
    tl.store(result_at + i[:, None] * Q + j[None, :], result)


@triton.jit
def anchor_gradient(
    block, anchor_at, grad_anchor_at, basis_at, area_at, grad_at, height_at, projections_at, scale_at, P, Q, C,
    anchor_stride, grad_stride,
    normalised: tl.constexpr, k: tl.constexpr, rows: tl.constexpr, reduced: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """grad a_i = (sum_j w_ij) a_i - sum_jl w_ij t_lij q_lj with w = area * grad / height: some rows, block_c channels.

    The basis is read once per block of rows, what belongs to pairs once per block of channels. Where a_i is a vector
    x_i at length 1, the result is dL/dx, the part of grad a across a, over |x|: as a . dV/da = V, the first sum loses
    sum_j grad_ij V_ij, which leaves sum_jl w_ij t_lij^2 of it.
    """
    i = tl.minimum(block * rows + tl.arange(0, rows), P - 1).to(tl.int64)[:, None]
    scale = tl.load(scale_at + i) if normalised else 1.0  # (rows, 1)
    c = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    e = tl.arange(0, reduced)  # column by column, its directions
    t_at = projections_at + i * (Q * k) + e[None, :]
    weights = tl.zeros([rows], tl.float32)
    total = tl.zeros([rows, block_c], tl.float32)
    for start in range(0, Q * k, reduced):
        real = e < Q * k - start
        j = tl.minimum((start + e) // k, Q - 1)
        height = tl.load(height_at + i * Q + j[None, :])
        weight = tl.load(grad_at + i * Q + j[None, :]) * tl.load(area_at + j)[None, :]
        weight = tl.where(real[None, :] & (height != 0), weight / height, 0.0)
        t = tl.load(t_at + start, mask=real[None, :], other=0.0)
        q_at = basis_at + (start + e).to(tl.int64)[:, None] * C + c
        q = tl.load(q_at, mask=real[:, None] & (c < C), other=0.0)
        of_pair = tl.where((e % k == 0)[None, :], weight, 0.0)
        if normalised:
            of_pair = tl.where(scale < LARGEST_SCALE, weight * t * t, of_pair)  # a vector too short has no such part
        weights += tl.sum(of_pair, 1)
        total = tl.dot(weight * t, q, total, input_precision="ieee")
    a = tl.load(anchor_at + i * anchor_stride + c, mask=c < C, other=0.0)
    result = weights[:, None] * a - total
    if normalised:
        result = scale * (weights[:, None] * scale * a - total)
    tl.store(grad_anchor_at + i * grad_stride + c, result, mask=c < C)


@triton.jit
def other_gradient(
    m, block, anchor_at, other_at, grad_other_at, basis_at, area_at, adjugate_at, grad_at, height_at, projections_at,
    anchor_scale_at, scale_at, P, Q, C, anchor_stride, grad_stride,
    normalised: tl.constexpr, k: tl.constexpr, columns: tl.constexpr, reduced: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """grad b_m = sum_n (sum_i u_i t_ni + (sum_i rise_i) adj_mn) q_n - sum_i u_i a_i: some columns, block_c channels.

    u = grad / height * sum_l adj_ml t_l, rise = grad * height, the height not below its floor. The anchor is read once
    per block of columns, what belongs to pairs once per block of channels. Of vectors at length 1 the result is made
    that of the vectors themselves as in `anchor_gradient`, which reads them once more.
    """
    j = tl.minimum(block * columns + tl.arange(0, columns), Q - 1).to(tl.int64)
    direction = tl.arange(0, k)[None, :]
    c = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    adjugate = tl.load(adjugate_at + (j * k + m)[:, None] * k + direction)  # (columns, k)

    e = tl.arange(0, columns * k)  # column by column, its directions
    e = tl.minimum(block * columns + e // k, Q - 1) * k + e % k
    row = tl.arange(0, reduced).to(tl.int64)
    lift = tl.zeros([columns], tl.float32)
    along = tl.zeros([columns, k], tl.float32)
    total = tl.zeros([columns, block_c], tl.float32)
    for start in range(0, P, reduced):
        real = (row < P - start)[:, None]
        i = start + row[:, None]
        grad = tl.load(grad_at + i * Q + j[None, :], mask=real, other=0.0)  # (reduced, columns)
        height = tl.load(height_at + i * Q + j[None, :], mask=real, other=0.0)
        t = tl.load(projections_at + i * (Q * k) + e[None, :], mask=real, other=0.0)
        a = tl.load(anchor_at + i * anchor_stride + c, mask=real & (c < C), other=0.0)
        t = tl.reshape(t, [reduced, columns, k])
        u = tl.where(height == 0, 0.0, grad / height) * tl.sum(t * adjugate[None, :, :], 2)
        lift += tl.sum(grad * height, 0)
        along += tl.sum(u[:, :, None] * t, 0)
        if normalised:
            u *= tl.load(anchor_scale_at + i, mask=real, other=0.0)
        total = tl.dot(tl.trans(u), a, total, input_precision="ieee")

    along += lift[:, None] * adjugate
    result = -total
    for n in range(k):
        q = tl.load(basis_at + (j * k + n)[:, None] * C + c, mask=c < C, other=0.0)
        result += tl.sum(tl.where(direction == n, along, 0.0), 1)[:, None] * q
    if normalised:
        scale = tl.load(scale_at + j * k + m)
        removed = tl.where(scale < LARGEST_SCALE, lift * tl.load(area_at + j) * scale, 0.0)
        x = tl.load(other_at + j[:, None] * anchor_stride + c, mask=c < C, other=0.0)
        result = scale[:, None] * (result - removed[:, None] * x)
    tl.store(grad_other_at + j[:, None] * grad_stride + c, result, mask=c < C)


@triton.jit
def _gradients_kernel(
    anchor_at, grad_anchor_at, grad_0, grad_1, grad_2, grad_3, basis_at, area_at, adjugate_at, grad_at, height_at,
    projections_at, P, Q, C, anchor_stride,
    vectors: tl.constexpr, k: tl.constexpr, tile: tl.constexpr, reduced: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One block: some rows or columns times some channels of one gradient; the anchor's blocks come first.

    Rows and columns beyond the last repeat it, and write what it writes.
    """
    block, anchor_blocks = tl.program_id(0), tl.cdiv(P, tile)
    if block < anchor_blocks:
        anchor_gradient(
            block, anchor_at, grad_anchor_at, basis_at, area_at, grad_at, height_at, projections_at, area_at, P, Q, C,
            anchor_stride, C, False, k, tile, reduced, block_c,
        )  # fmt: skip
    else:
        m = (block - anchor_blocks) % vectors
        other_gradient(
            m, (block - anchor_blocks) // vectors, anchor_at, anchor_at, _row(m, grad_0, grad_1, grad_2, grad_3),
            basis_at, area_at, adjugate_at, grad_at, height_at, projections_at, area_at, area_at, P, Q, C,
            anchor_stride, C, False, k, tile, reduced, block_c,
        )  # fmt: skip


def forward(anchor: Tensor, others: Sequence[Tensor]) -> Tensor:
    """(P, C) and k times (Q, C), fp32 -> (P, Q)."""
    anchor, *others = map(with_unit_last_stride, (anchor, *others))
    basis, area, _, _ = orthonormalise(others)
    volume = anchor.new_empty(anchor.shape[0], others[0].shape[0])
    _launch_pairs(anchor, basis, area, volume, projections=None)
    return volume


def backward(grad: Tensor, anchor: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the anchor and of each other vector, given `grad` (P, Q)."""
    grad = grad.contiguous()
    anchor, *others = map(with_unit_last_stride, (anchor, *others))
    (P, C), (Q, _), vectors = anchor.shape, others[0].shape, len(others)
    basis, area, adjugate, _ = orthonormalise(others)
    k = basis.shape[1]
    heights, projections = anchor.new_empty(P, Q), anchor.new_empty(P, Q, k)
    _launch_pairs(anchor, basis, area, heights, projections)

    gradients = [anchor.new_empty(P, C), *(anchor.new_empty(Q, C) for _ in others)]
    tile, block_c = gradient_tile(P, Q, C, vectors)
    launch(
        _gradients_kernel,
        (ceil_div(P, tile) + vectors * ceil_div(Q, tile), ceil_div(C, block_c)),
        anchor,
        *(anchor, gradients[0], *_four(gradients[1:])),
        *(basis, area, adjugate, grad, heights, projections),
        *(P, Q, C, anchor.stride(0)),
        vectors=vectors,
        k=k,
        tile=tile,
        reduced=16,
        block_c=block_c,
        num_warps=tile // 4,
        num_stages=2,
    )
    return tuple(gradients)


def orthonormalise(others: Sequence[Tensor], normalised: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Basis (Q, k, C) of each column's vectors, their area (Q,), their triangle's adjugate (Q, k, k), scales (Q, k).

    k is a power of two; directions beyond the number of vectors are 0. `normalised`: area and adjugate are those of the
    vectors at length 1, scales what they are multiplied by; else there are none.
    """
    (Q, C), vectors = others[0].shape, len(others)
    k, block_c = power_of_two(vectors), power_of_two(C, smallest=16)
    if k * block_c > WIDEST_BASIS:
        directions, triangle = reference.orthonormalise(tuple(others))
        more = k - vectors
        scale = 1 / torch.linalg.vector_norm(triangle, dim=1).clamp_min(SHORTEST.value)  # (Q, vectors)
        triangle = triangle * scale[:, None, :] if normalised else triangle
        area = triangle.diagonal(dim1=1, dim2=2).prod(1)
        adjugate = F.pad(reference.adjugate(triangle), (0, more, 0, more))
        return F.pad(torch.stack(directions, 1), (0, 0, 0, more)), area, adjugate, F.pad(scale, (0, more))
    basis, area, adjugate = (others[0].new_empty(Q, *shape) for shape in ((k, C), (), (k, k)))
    scale = others[0].new_empty(Q, k) if normalised else area
    launch(
        _basis_kernel,
        (Q,),
        basis,
        *_four(others),
        *_four([other.stride(0) for other in others]),
        *(basis, area, adjugate, scale, C),
        normalised=normalised,
        vectors=vectors,
        k=k,
        block_c=block_c,
        num_warps=power_of_two(k * block_c // 2048),
    )
    return basis, area, adjugate, scale


def _launch_pairs(anchor: Tensor, basis: Tensor, area: Tensor, result: Tensor, projections: Tensor | None) -> None:
    """Volumes to `result`; or heights, where there is room for the projections too, as the backward needs them."""
    (P, C), (Q, k, _) = anchor.shape, basis.shape
    blocks, settings = pair_tiles(P, Q, C, k)
    launch(
        _pairs_kernel,
        (blocks,),
        anchor,
        *(anchor, basis, area, result, result if projections is None else projections),
        *(P, Q, C, anchor.stride(0)),
        int(projections is not None),
        **settings,
    )


def pair_tiles(P: int, Q: int, C: int, k: int) -> tuple[int, dict[str, int]]:
    """How many tiles the pairs make, and the settings of the kernel that takes one: wide ones where enough are left."""
    side = 32 if ceil_div(P, 32) * ceil_div(Q * k, 32) >= MANY_BLOCKS else 16
    settings = {
        "k": k,
        "block_p": side,
        "block_q": side // k,
        "block_c": power_of_two(C, smallest=16, largest=32),
        "chunk": max(4, 1024 * k // (side * side)),
        "num_warps": 4,
    }
    return ceil_div(P, side) * ceil_div(Q, side // k), settings


def gradient_tile(P: int, Q: int, C: int, vectors: int) -> tuple[int, int]:
    """Rows or columns, and channels, of a block of a gradient: wide ones where enough of them are left."""
    many = (ceil_div(P, 32) + vectors * ceil_div(Q, 32)) * ceil_div(C, 64) >= MANY_BLOCKS
    return (32, power_of_two(C, smallest=16, largest=64)) if many else (16, power_of_two(C, smallest=16, largest=32))


def _four(items: Sequence[Any]) -> list[Any]:
    """The kernels' arguments for up to four other vectors; what is beyond their number is not read."""
    return [*items, *[items[-1]] * (4 - len(items))]
