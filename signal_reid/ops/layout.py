"""How a tensor lies in memory and in which precision, as far as kernels care."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def with_unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def laid_out_like(dense: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, copied unless its elements lie in memory as those of `dense`, which has no gaps."""
    return tensor if tensor.stride() == dense.stride() else torch.empty_like(dense).copy_(tensor)


def dtype_of_products(tensor: Tensor) -> torch.dtype:
    """The dtype that autocast, where it is on, gives the operands of a matrix product; that of the tensor elsewhere."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or tensor.is_meta or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def as_autocast_multiplies(tensor: Tensor) -> Tensor:
    """The tensor in the precision that autocast, where it is on, gives the operands of a matrix product."""
    return tensor.to(dtype_of_products(tensor))


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the tensor's device, also where there is none (`meta`); nothing where it is off already.

    What is compiled or exported may run under autocast later, so there it is always switched off.
    """
    device = tensor.device.type
    if tensor.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)
