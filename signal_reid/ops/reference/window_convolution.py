"""Depthwise convolution of windows side by side, in plain PyTorch.

y_ijc = sum_ab w_cab x_(i k + a)(j k + b)c. As every token meets one entry of the window,

    dL/dx_(i k + a)(j k + b)c = w_cab dL/dy_ijc,    dL/dw_cab = sum_ij x_(i k + a)(j k + b)c dL/dy_ijc,

and tokens beyond the last whole window have no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, window: Tensor) -> Tensor:
    """(B, H, W, C) and (C, k, k) -> (B, H // k, W // k, C)."""
    return (_windows(x, window.shape[-1]) * _entries(window)).sum((2, 4)).to(x.dtype)


def backward(grad: Tensor, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the window, given `grad` (B, H // k, W // k, C)."""
    windows = _windows(x, window.shape[-1])  # (B, Hk, k, Wk, k, C)
    grad = grad.to(windows.dtype)[:, :, None, :, None]  # (B, Hk, 1, Wk, 1, C)
    grad_x = (grad * _entries(window)).flatten(3, 4).flatten(1, 2).contiguous()
    rows, columns = (whole - covered for whole, covered in zip(x.shape[1:3], grad_x.shape[1:3], strict=True))
    grad_window = (windows * grad).sum((0, 1, 3)).permute(2, 0, 1).contiguous()
    return F.pad(grad_x, (0, 0, 0, columns, 0, rows)).to(x.dtype), grad_window.to(window.dtype)


def _windows(x: Tensor, k: int) -> Tensor:
    """The whole windows, (B, Hk, k, Wk, k, C), in fp32 or wider."""
    Hk, Wk = x.shape[1] // k, x.shape[2] // k
    whole = x[:, : Hk * k, : Wk * k].unflatten(2, (Wk, k)).unflatten(1, (Hk, k))
    return whole.to(torch.promote_types(x.dtype, torch.float32))


def _entries(window: Tensor) -> Tensor:
    """The window as it lies over those, (k, 1, k, C)."""
    return window.permute(1, 2, 0).unsqueeze(1)
