"""QuickGELU by the native core: one pass each way; the maths is in signal_reid/ops/reference."""

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.layout import laid_out_like


def forward(x: Tensor) -> Tensor:
    """Any shape -> the same."""
    y = torch.empty_like(x)
    x = laid_out_like(y, x)
    core.launch("quick_gelu", x, x.data_ptr(), y.data_ptr(), x.numel(), core.dtype_tag(x))
    return y


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x from the gradient of the output; the sigmoid is recomputed rather than kept."""
    grad_x = torch.empty_like(x)
    grad, x = laid_out_like(grad_x, grad), laid_out_like(grad_x, x)
    addresses = grad.data_ptr(), x.data_ptr(), grad_x.data_ptr()
    core.launch("quick_gelu_backward", x, *addresses, x.numel(), core.dtype_tag(x))
    return grad_x
