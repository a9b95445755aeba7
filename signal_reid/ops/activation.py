"""The activation of CLIP's transformers."""

from typing import Any

import torch
from torch import Tensor

from signal_reid.ops import library  # noqa: F401 - defines torch.ops.signal_reid
from signal_reid.ops.checks import check_dtype, check_tensor, formula_wanted, needs_gradient, refuse_second_derivative
from signal_reid.ops.reference.activation import SCALE


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, keeping only x for the backward.

    Args:
        x: any shape, fp32, fp16, bf16 or fp64.

    Returns:
        Like x.

    Raises:
        ValueError: another dtype.
        TypeError: no tensor.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, section 2; OpenAI CLIP.
    """
    check_tensor("x", x)
    check_dtype("x", x.dtype)
    if formula_wanted():
        return x * torch.sigmoid(SCALE * x)
    return _QuickGELU.apply(x) if needs_gradient(x) else torch.ops.signal_reid.quick_gelu(x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.signal_reid.quick_gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative("quick_gelu", grad)
        (x,) = ctx.saved_tensors
        return torch.ops.signal_reid.quick_gelu_backward(grad, x)
