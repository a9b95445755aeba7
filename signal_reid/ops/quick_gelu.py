"""The activation of CLIP's transformers."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from signal_reid.ops import dispatch
from signal_reid.ops.checks import DTYPES, refuse_second_derivative


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, keeping only x for the backward.

    Args:
        x: any shape, fp32, fp16, bf16 or fp64.

    Returns:
        Like x.

    Raises:
        ValueError: another dtype.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, section 2; OpenAI CLIP.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    return _QuickGELU.apply(dispatch.implementation("quick_gelu", x), x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: ModuleType, x: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(x)
        return backend.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        refuse_second_derivative("quick_gelu")
        (x,) = ctx.saved_tensors
        return None, ctx.backend.backward(grad, x)
