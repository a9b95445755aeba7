"""The parameters of a module in the precision of autocast's matrix products, all at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from signal_reid.ops.checks import formula_wanted
from signal_reid.ops.layout import as_autocast_multiplies, dtype_of_products


def cast_for_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the precision that autocast, where it is on, gives the operands of a matrix product.

    On a GPU the casts of all of them, and those of all their gradients, are one launch each way; autocast by itself
    launches one for each parameter and one for each gradient.

    Args:
        tensors: of one dtype and device, in any shapes.

    Returns:
        As many tensors; the same ones where nothing is to be cast.
    """
    if formula_wanted():
        return tuple(map(as_autocast_multiplies, tensors))
    dtype = dtype_of_products(tensors[0])
    return tensors if dtype == tensors[0].dtype else _CastForProducts.apply(dtype, *tensors)


class _CastForProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return _cast(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Private to PyTorch: `_foreach_copy_`, which copies a list of tensors at once, but not differentiably."""
    if torch.is_grad_enabled() or not tensors:  # a backward that is itself differentiated
        return tuple(x.to(dtype) for x in tensors)
    results = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(results, list(tensors))
    return tuple(results)
