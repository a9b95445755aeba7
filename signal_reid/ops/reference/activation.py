"""QuickGELU, in plain PyTorch.

y = x s with s = sigmoid(1.702 x), and as s' = s (1 - s), dy/dx = s (1 + 1.702 x (1 - s)).
"""

import torch
from torch import Tensor

from signal_reid.ops.layout import laid_out_like

SCALE = 1.702


def forward(x: Tensor) -> Tensor:
    """Any shape -> the same."""
    return x * torch.sigmoid(SCALE * x)


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x from the gradient of the output; the sigmoid is recomputed rather than kept."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    gate = torch.sigmoid(SCALE * wide)
    grad_x = (grad * gate * (1 + SCALE * wide * (1 - gate))).to(x.dtype)
    return laid_out_like(torch.empty_like(x), grad_x)
