"""Residual addition and layer normalisation by Triton; the maths is in signal_reid/ops/reference."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from signal_reid.ops.dispatch import BackendError
from signal_reid.ops.triton import DTYPES
from signal_reid.ops.triton.arithmetic import divide
from signal_reid.ops.triton.launch import ceil_div, launch, power_of_two

TILE = 1024  # elements of a block, in as many whole rows as that takes
THREADS_PER_MULTIPROCESSOR = 640  # of the backward, as many as the registers of a GPU hold
INTERPRETED_BLOCKS = 4


@triton.jit
def _normalise(total, inside, columns, eps):
    """Rows of the normalised sum, and the inverse deviation of each."""
    mean = divide(tl.sum(total, axis=1), columns)
    centred = tl.where(inside, total - mean[:, None], 0.0)
    inverse = divide(1.0, tl.sqrt_rn(divide(tl.sum(centred * centred, axis=1), columns) + eps))
    return centred * inverse[:, None], inverse


@triton.jit
def _forward_kernel(
    x_at,
    branch_at,
    weight_at,
    bias_at,
    total_at,
    normed_at,
    rows,
    columns,
    eps,
    has_branch: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One block: `block_rows` whole rows, of which every input is read once and both results are written once."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)[:, None]
    column = tl.arange(0, block_columns)[None, :]
    inside = (row < rows) & (column < columns)
    index = row.to(tl.int64) * columns + column
    total = tl.load(x_at + index, mask=inside, other=0.0).to(tl.float32)
    if has_branch:
        total += tl.load(branch_at + index, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(total_at.dtype.element_ty)
        tl.store(total_at + index, rounded, mask=inside)
        total = rounded.to(tl.float32)  # what the backward will read
    weight = tl.load(weight_at + column, mask=column < columns, other=0.0).to(tl.float32)
    bias = tl.load(bias_at + column, mask=column < columns, other=0.0).to(tl.float32)
    normed, _ = _normalise(total, inside, columns, eps)
    tl.store(normed_at + index, (normed * weight + bias).to(normed_at.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_normed_at,
    grad_total_at,
    total_at,
    weight_at,
    grad_x_at,
    copy_at,
    shares_at,
    rows,
    columns,
    eps,
    has_grad_total: tl.constexpr,
    has_copy: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """One block: `block_rows` whole rows at a time, as many rows apart as the grid takes at once.

    Sum and both gradients are read once, the gradient of the sum is written once or twice. Mean and deviation are
    computed again, which costs no bytes. A block's share of the gradients of weight and bias stays in registers and is
    written at the end; no atomics.
    """
    blocks = tl.num_programs(0)
    row, column = tl.arange(0, block_rows)[:, None], tl.arange(0, block_columns)[None, :]
    weight = tl.load(weight_at + column, mask=column < columns, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((block_rows, block_columns), tl.float32)
    grad_bias = tl.zeros((block_rows, block_columns), tl.float32)
    for first in range(tl.program_id(0).to(tl.int64) * block_rows, rows, blocks * block_rows):
        inside = (row < rows - first) & (column < columns)
        index = first * columns + (row * columns + column)  # in this order, 64-bit numbers are few
        total = tl.load(total_at + index, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_at + index, mask=inside, other=0.0).to(tl.float32)
        normed, inverse = _normalise(total, inside, columns, eps)
        grad_weight += grad * normed
        grad_bias += grad
        scaled = grad * weight
        mean = divide(tl.sum(scaled, axis=1), columns)
        along = divide(tl.sum(scaled * normed, axis=1), columns)
        grad_x = (scaled - mean[:, None] - normed * along[:, None]) * inverse[:, None]
        if has_grad_total:
            grad_x += tl.load(grad_total_at + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_at + index, grad_x.to(grad_x_at.dtype.element_ty), mask=inside)
        if has_copy:
            tl.store(copy_at + index, grad_x.to(copy_at.dtype.element_ty), mask=inside)
    channel = tl.arange(0, block_columns)
    share_at = shares_at + tl.program_id(0).to(tl.int64) * columns + channel
    tl.store(share_at, tl.sum(grad_weight, axis=0), mask=channel < columns)
    tl.store(share_at + blocks.to(tl.int64) * columns, tl.sum(grad_bias, axis=0), mask=channel < columns)


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + branch and its normalisation in `out_dtype`; see `signal_reid.ops.add_layer_norm`.

    Raises:
        BackendError: a dtype that the kernels do not take.
    """
    _check(x.dtype, weight.dtype, out_dtype, x.dtype if branch is None else branch.dtype)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    normed = torch.empty_like(x, dtype=out_dtype)  # a third of the time of torch.empty
    total = x
    if branch is not None:
        branch = branch.contiguous()
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    columns = x.shape[-1]
    rows, settings = x.numel() // columns, _settings(columns)
    grid = (ceil_div(rows, settings["block_rows"]),)
    arguments = x, branch, weight, bias, total, normed, rows, columns, eps
    launch(_forward_kernel, grid, x, *arguments, has_branch=branch is not None, **settings)
    return total, normed


def backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    branch_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of the sum and of (weight, bias), and the first again in `branch_dtype` if one is given.

    Raises:
        BackendError: as in `forward`.
    """
    _check(total.dtype, grad_normed.dtype, weight.dtype, branch_dtype or total.dtype)
    grad_normed, total, weight = grad_normed.contiguous(), total.contiguous(), weight.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty_like(total)
    copy = None if branch_dtype is None else torch.empty_like(total, dtype=branch_dtype)
    columns = total.shape[-1]
    rows, settings = total.numel() // columns, _settings(columns)
    blocks = min(ceil_div(rows, settings["block_rows"]), _blocks(total, settings["num_warps"]))
    shares = torch.empty((2, blocks, columns), dtype=torch.float32, device=total.device)
    launch(
        _backward_kernel,
        (blocks,),
        total,
        *(grad_normed, grad_total, total, weight, grad_x, copy, shares, rows, columns, eps),
        has_grad_total=grad_total is not None,
        has_copy=copy is not None,
        **settings,
    )
    return [grad_x, shares.sum(1).to(weight.dtype), *([] if copy is None else [copy])]


def _check(*dtypes: torch.dtype) -> None:
    if not set(dtypes) <= set(DTYPES):
        raise BackendError("backend triton cannot normalise in float64; use backend reference")


def _settings(columns: int) -> dict[str, int]:
    """Sizes of a block of whole rows, 8 elements to a thread up to 4,096."""
    width = power_of_two(columns)
    tile = max(width, TILE)
    return {"block_rows": tile // width, "block_columns": width, "num_warps": min(tile // 256, 16)}


def _blocks(tensor: Tensor, warps: int) -> int:
    """As many as a GPU runs at once; each writes a share of the weight's gradient."""
    if not tensor.is_cuda:
        return INTERPRETED_BLOCKS
    per_multiprocessor = max(THREADS_PER_MULTIPROCESSOR // (32 * warps), 1)
    return per_multiprocessor * torch.cuda.get_device_properties(tensor.device).multi_processor_count
