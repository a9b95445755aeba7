"""QuickGELU by the native core: one pass each way; the maths is in signal_reid/ops/reference."""

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.layout import laid_out_like


def forward(x: Tensor) -> Tensor:
    """Any shape -> the same."""
    y = torch.empty_like(x)
    x = laid_out_like(y, x)
    fields = {"x": x.data_ptr(), "y": y.data_ptr(), "size": x.numel(), "dtype": core.dtype_tag(x)}
    core.launch("quick_gelu", x, fields)
    return y


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x from the gradient of the output; the sigmoid is recomputed rather than kept."""
    grad_x = torch.empty_like(x)
    grad, x = laid_out_like(grad_x, grad), laid_out_like(grad_x, x)
    fields = {
        "grad": grad.data_ptr(),
        "x": x.data_ptr(),
        "grad_x": grad_x.data_ptr(),
        "size": x.numel(),
        "dtype": core.dtype_tag(x),
    }
    core.launch("quick_gelu_backward", x, fields)
    return grad_x
