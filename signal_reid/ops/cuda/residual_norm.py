"""Residual addition and layer normalisation by the native core: one launch forward; one and a small sum backward."""

from __future__ import annotations

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.dispatch import BackendError

CHANNELS_PER_THREAD, WARP, MOST_THREADS = 8, 32, 640  # as in csrc/residual_norm.cu
MOST_CHANNELS = MOST_THREADS * CHANNELS_PER_THREAD
MOST_BLOCKS_PER_MULTIPROCESSOR = 16
EMULATED_BLOCKS = 4


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + branch and its normalisation in `out_dtype`; see `signal_reid.ops.add_layer_norm`.

    Raises:
        BackendError: more than 5,120 channels, 2^31 rows or more, or a dtype that the kernels do not take.
    """
    _check(x, branch, weight, out_dtype)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    normed = torch.empty_like(x, dtype=out_dtype)  # a third of the time of torch.empty
    total = x
    if branch is not None:
        branch = branch.contiguous()
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    fields = {
        "x": x.data_ptr(),
        "branch": _address(branch),
        "weight": weight.data_ptr(),
        "bias": bias.data_ptr(),
        "total": total.data_ptr(),
        "normed": normed.data_ptr(),
        "rows": x.numel() // x.shape[-1],
        "C": x.shape[-1],
        "eps": eps,
        "x_dtype": core.dtype_tag(x),
        "branch_dtype": core.dtype_tag(x if branch is None else branch),
        "weight_dtype": core.dtype_tag(weight),
        "total_dtype": core.dtype_tag(total),
        "normed_dtype": core.dtype_tag(normed),
    }
    core.launch("add_layer_norm", x, fields)
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
    _check(total, grad_normed, weight, branch_dtype)
    grad_normed, total, weight = grad_normed.contiguous(), total.contiguous(), weight.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = torch.empty_like(total)
    copy = None if branch_dtype is None else torch.empty_like(total, dtype=branch_dtype)
    C = total.shape[-1]
    rows = total.numel() // C
    blocks = min(rows, _blocks(total))
    shares = torch.empty((2, blocks, C), dtype=torch.float32, device=total.device)
    fields = {
        "grad_normed": grad_normed.data_ptr(),
        "grad_total": _address(grad_total),
        "total": total.data_ptr(),
        "weight": weight.data_ptr(),
        "grad_x": grad_x.data_ptr(),
        "grad_branch": _address(copy),
        "shares": shares.data_ptr(),
        "rows": rows,
        "C": C,
        "blocks": blocks,
        "eps": eps,
        "normed_dtype": core.dtype_tag(grad_normed),
        "total_dtype": core.dtype_tag(total),
        "weight_dtype": core.dtype_tag(weight),
        "branch_dtype": core.dtype_tag(total if copy is None else copy),
    }
    core.launch("add_layer_norm_backward", total, fields)
    return [grad_x, shares.sum(1).to(weight.dtype), *([] if copy is None else [copy])]


def _check(x: Tensor, other: Tensor | None, weight: Tensor, dtype: torch.dtype | None) -> None:
    if torch.float64 in (x.dtype, weight.dtype, dtype, x.dtype if other is None else other.dtype):
        raise BackendError("backend cuda cannot normalise in float64; use backend reference")
    C = x.shape[-1]
    if C > MOST_CHANNELS:
        raise BackendError(
            f"backend cuda cannot normalise {C} channels: at most {MOST_CHANNELS}; use backend triton or reference"
        )
    rows = x.numel() // C
    if rows > core.MOST_BLOCKS:
        raise BackendError(
            f"backend cuda cannot normalise {rows} rows: at most {core.MOST_BLOCKS}; "
            "divide them or use backend reference"
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _blocks(tensor: Tensor) -> int:
    """As many as a GPU holds at once, each of which writes a share of the weight's gradient.

    On an H200, one more for each multiprocessor takes 1.4 times as long.
    """
    if not tensor.is_cuda:
        return EMULATED_BLOCKS
    threads = WARP * -(-tensor.shape[-1] // (WARP * CHANNELS_PER_THREAD))
    per_multiprocessor = min(MOST_THREADS // threads, MOST_BLOCKS_PER_MULTIPROCESSOR)
    return per_multiprocessor * torch.cuda.get_device_properties(tensor.device).multi_processor_count
