"""What launching any of the Triton kernels takes: the device, the sizes of blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: Sequence[int], tensor: Tensor, *arguments: object, **settings: object) -> None:
    """Start a kernel on the device of `tensor` and PyTorch's current stream there; an empty grid starts nothing.

    Args:
        kernel: what `triton.jit` made.
        grid: blocks along x, y, z; at most 65,535 along y and z.
        tensor: any of the arguments.
        arguments: of the kernel, in order.
        settings: its constants by name, and num_warps, num_stages.
    """
    if 0 in grid:
        return
    settings = {"enable_fp_fusion": True, **settings}  # the default depends on Triton's version
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[tuple(grid)](*arguments, **settings)
    else:
        kernel[tuple(grid)](*arguments, **settings)


def ceil_div(a: int, b: int) -> int:
    """Blocks of `b` that cover `a`."""
    return -(-a // b)


def power_of_two(n: int, smallest: int = 1, largest: int = 1 << 30) -> int:
    """The smallest power of two that covers `n`, within powers of two `smallest` and `largest`."""
    return min(max(1 << max(n - 1, 0).bit_length(), smallest), largest)
