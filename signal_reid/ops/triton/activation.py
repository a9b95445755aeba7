"""QuickGELU by Triton: one pass each way; the maths is in signal_reid/ops/reference."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from signal_reid.ops.layout import laid_out_like
from signal_reid.ops.triton.launch import ceil_div, launch

# A thread has 8 elements: one access of 16 bytes in 16-bit precision, two in fp32.
BLOCK, WARPS = 1024, 4


@triton.jit
def _forward_kernel(x_at, y_at, size, block: tl.constexpr):
    """One block: `block` neighbouring elements, read once and written once."""
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < size
    x = tl.load(x_at + index, mask=inside).to(tl.float32)
    y = x * tl.sigmoid(x * 1.702)
    tl.store(y_at + index, y.to(y_at.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad_at, x_at, grad_x_at, size, block: tl.constexpr):
    """One block: `block` neighbouring elements of both, read once, and written once."""
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < size
    scaled = tl.load(x_at + index, mask=inside).to(tl.float32) * 1.702
    grad = tl.load(grad_at + index, mask=inside).to(tl.float32)
    gate = tl.sigmoid(scaled)
    grad_x = grad * (gate * (1 + scaled * (1 - gate)))
    tl.store(grad_x_at + index, grad_x.to(grad_x_at.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """Any shape -> the same."""
    y = torch.empty_like(x)
    x = laid_out_like(y, x)
    launch(_forward_kernel, (ceil_div(x.numel(), BLOCK),), x, x, y, x.numel(), block=BLOCK, num_warps=WARPS)
    return y


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x from the gradient of the output; the sigmoid is recomputed rather than kept."""
    grad_x = torch.empty_like(x)
    grad, x = laid_out_like(grad_x, grad), laid_out_like(grad_x, x)
    arguments = grad, x, grad_x, x.numel()
    launch(_backward_kernel, (ceil_div(x.numel(), BLOCK),), x, *arguments, block=BLOCK, num_warps=WARPS)
    return grad_x
