"""The step between the branches of a pre-LN transformer: add to the residual stream, normalise the sum."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.ops import dispatch, library  # noqa: F401 - library defines torch.ops.signal_reid
from signal_reid.ops.checks import (
    check_dtype,
    check_number,
    check_tensor,
    formula_wanted,
    needs_gradient,
    refuse_second_derivative,
)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`x + branch` and its layer normalisation, each tensor moved through memory once.

    The kernels write the normalised sum in the precision that its reader takes and the backward adds the gradient
    that comes along the residual stream, so a block under autocast moves less than half the bytes. Under torch.compile,
    and where no kernel of ours serves and the reference was not chosen, this is PyTorch's addition and `layer_norm`.

    Args:
        x: (..., C), fp32, fp16, bf16 or fp64.
        branch: like x, in its own floating dtype; None to normalise x alone, which then is the sum.
        weight: (C,), in the dtype of the sum, or fp32 where that is lower.
        bias: (C,), like weight.
        eps: added to the variance.
        out_dtype: of the normalised sum; default: that of the sum.

    Returns:
        The sum, in the dtype that PyTorch promotes x and branch to, and its normalisation, both (..., C).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or no channels.
        BackendError: a backend was chosen that cannot serve; cuda takes up to 5,120 channels.

    Source: Ba, Kiros and Hinton, Layer Normalization, equation 4; its place before each branch: Xiong et al., On Layer
    Normalization in the Transformer Architecture.
    """
    total_dtype = _check(x, branch, weight, bias)
    dtype = total_dtype if out_dtype is None else out_dtype
    check_dtype("out_dtype", dtype)
    check_number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    if formula_wanted() or dispatch.left_to_pytorch("residual_norm", x):
        total = x if branch is None else x + branch
        return total, F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps).to(dtype)
    if needs_gradient(x, weight, bias, x if branch is None else branch):
        return _AddLayerNorm.apply(x, branch, weight, bias, eps, dtype)
    return _forward(x, branch, weight, bias, eps, dtype)


def _forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if branch is None:
        return x, torch.ops.signal_reid.layer_norm(x, weight, bias, eps, dtype)
    return torch.ops.signal_reid.add_layer_norm(x, branch, weight, bias, eps, dtype)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
        weight, _, ctx.eps, _ = arguments
        total, normed = _forward(x, branch, *arguments)
        ctx.save_for_backward(total, weight)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("add_layer_norm", grad_total, grad_normed)
        if grad_normed is None:
            return grad_total, None if ctx.branch_dtype is None else grad_total, None, None, None, None
        total, weight = ctx.saved_tensors
        copy_dtype = None if ctx.branch_dtype == total.dtype else ctx.branch_dtype
        grad_x, grad_affine, *copy = torch.ops.signal_reid.add_layer_norm_backward(
            grad_normed, grad_total, total, weight, ctx.eps, copy_dtype
        )
        grad_branch = None if ctx.branch_dtype is None else copy[0] if copy else grad_x
        return grad_x, grad_branch, *grad_affine.unbind(), None, None


def _check(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> torch.dtype:
    """The dtype of the sum; ValueError where the arguments do not fit each other. Each property is asked once."""
    check_tensor("x", x)
    shape, device, total_dtype = x.shape, x.device, x.dtype
    if not shape or shape[-1] == 0:
        raise ValueError(f"x must be (..., C) with at least one channel, got shape {tuple(shape)}")
    check_dtype("x", total_dtype)
    if branch is not None:
        check_tensor("branch", branch)
        check_dtype("branch", branch.dtype)
        if branch.shape != shape or branch.device != device:
            raise ValueError(
                f"branch must have the shape and device of x, {tuple(shape)} on {device}, "
                f"got {tuple(branch.shape)} on {branch.device}"
            )
        total_dtype = torch.promote_types(total_dtype, branch.dtype)
    _check_affine("weight", weight, shape[-1:], device)
    _check_affine("bias", bias, shape[-1:], device)
    dtype = weight.dtype
    if bias.dtype != dtype or dtype not in (total_dtype, torch.promote_types(total_dtype, torch.float32)):
        allowed = {total_dtype, torch.promote_types(total_dtype, torch.float32)}
        raise ValueError(
            f"weight and bias must both be {' or '.join(sorted(map(str, allowed)))} to go with x + branch, "
            f"got {dtype} and {bias.dtype}"
        )
    return total_dtype


def _check_affine(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_tensor(name, tensor)
    if tensor.shape != shape or tensor.device != device:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} (C of x) on {device}, got {tuple(tensor.shape)} on {tensor.device}"
        )
