"""How a tensor lies in memory and in which precision, as far as kernels care."""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
from torch import Tensor

_GRAPHS_KNOW_AUTOCAST = torch.__version__ >= "2.5"  # an exported graph of torch 2.4 cannot switch it off


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


def as_autocast_promotes(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of several precisions in the widest of them, where autocast is on; as they are elsewhere."""
    first = tensors[0]
    for tensor in tensors:  # a quarter of the time of `all`
        if not isinstance(tensor, Tensor) or tensor.dtype != first.dtype:
            break
    else:
        return tensors
    if first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors):
        return tensors  # the operator's own check names what is wrong
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return tuple(tensor.to(widest) for tensor in tensors)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the tensor's device, also where there is none (`meta`); nothing where it is off already.

    What is compiled or exported may run under autocast later, so there it is always switched off, from torch 2.5 on.
    """
    device = tensor.device.type
    compiling = _GRAPHS_KNOW_AUTOCAST and torch.compiler.is_compiling()
    if tensor.is_meta or not (compiling or torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)
