"""A depthwise convolution whose stride is its window."""

from typing import Any

import torch
from torch import Tensor

from signal_reid.ops import library  # noqa: F401 - defines torch.ops.signal_reid
from signal_reid.ops.checks import (
    check_floating,
    check_same,
    formula_wanted,
    needs_gradient,
    refuse_second_derivative,
)
from signal_reid.ops.layout import as_autocast_multiplies, without_autocast
from signal_reid.ops.reference import window_convolution as reference


def convolve_windows(x: Tensor, window: Tensor) -> Tensor:
    """Depthwise convolution of windows side by side: the stride is the window's size, there is no padding.

    Args:
        x: (B, H, W, C), fp32, fp16, bf16 or fp64, any strides.
        window: (C, k, k) of the same dtype and device, k >= 1.

    Returns:
        (B, H // k, W // k, C) of the same dtype, under autocast in the precision of its convolutions; rows and columns
        beyond the last whole window take no part.

    Raises:
        ValueError: a shape, dtype or device outside of these.
        BackendError: a backend was chosen that cannot serve.

    Source: Signal (AAAI 2026), local alignment module; `torch.nn.functional.conv2d` with `groups=C, stride=k`.
    """
    check_floating("x", x, "(B, H, W, C)", 4)
    check_floating("window", window, "(C, k, k)", 3)
    k = window.shape[-1]
    x, window = as_autocast_multiplies(x), as_autocast_multiplies(window)
    check_same("window", window, "x", x, (x.shape[3], k, k))
    if k == 0:
        raise ValueError(f"window must be (C, k, k) with k at least 1, got shape {tuple(window.shape)}")
    with without_autocast(x):
        if formula_wanted():
            return reference.forward(x, window)
        if needs_gradient(x, window):
            return _ConvolveWindows.apply(x, window)
        return torch.ops.signal_reid.convolve_windows(x, window)


class _ConvolveWindows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Tensor) -> Tensor:
        ctx.save_for_backward(x, window)
        return torch.ops.signal_reid.convolve_windows(x, window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        refuse_second_derivative("convolve_windows", grad)
        return torch.ops.signal_reid.convolve_windows_backward(grad, *ctx.saved_tensors)
