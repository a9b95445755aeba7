"""Depthwise convolution of windows side by side: PyTorch's own forward, but not its backward.

That of its general convolution takes up to a hundred times as long in bf16 as the two products and the sum that windows
side by side need. Sums run over outer dimensions first, then along the row, so that each pass is over whole rows.
"""

import torch.nn.functional as F
from torch import Tensor

from signal_reid.ops.reference import window_convolution as reference


def forward(x: Tensor, window: Tensor) -> Tensor:
    """(B, H, W, C) and (C, k, k) -> (B, H // k, W // k, C)."""
    k, C = window.shape[-1], x.shape[3]
    if x.numel() == 0 or min(x.shape[1:3]) < k:  # nothing that PyTorch's convolution takes
        return reference.forward(x, window)
    return F.conv2d(x.permute(0, 3, 1, 2), window.unsqueeze(1), stride=k, groups=C).permute(0, 2, 3, 1).contiguous()


def backward(grad: Tensor, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the window, given `grad` (B, H // k, W // k, C)."""
    k = window.shape[-1]
    B, H, W, C = x.shape
    _, Hk, Wk, _ = grad.shape
    spread = grad.contiguous()[:, :, None, :, None]  # (B, Hk, 1, Wk, 1, C)
    entries = window.permute(1, 2, 0).contiguous().view(k, 1, k, C)
    grad_x = (spread * entries).reshape(B, Hk * k, Wk * k, C)
    windows = x[:, : Hk * k, : Wk * k].reshape(B, Hk, k, Wk, k, C)
    products = (windows * spread).flatten(0, 1).sum(0)  # (k, Wk, k, C)
    if (Hk * k, Wk * k) != (H, W):  # tokens beyond the last whole window
        grad_x = F.pad(grad_x, (0, 0, 0, W - Wk * k, 0, H - Hk * k))
    return grad_x, products.sum(1).permute(2, 0, 1).contiguous()
