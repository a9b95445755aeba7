"""QuickGELU in two passes forward and one backward, each over memory that is there already.

As 1.702 y = silu(u) with u = 1.702 x, dy/dx = silu'(u), which PyTorch has in one vectorised pass. Private to PyTorch:
`silu_backward.grad_input` is there so that the pass writes over u.
"""

import torch
from torch import Tensor

from signal_reid.ops.reference.activation import SCALE


def forward(x: Tensor) -> Tensor:
    """Any shape -> the same."""
    return (x * SCALE).sigmoid_().mul_(x)


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x from the gradient of the output; the sigmoid is recomputed rather than kept."""
    scaled = x * SCALE
    return torch.ops.aten.silu_backward.grad_input(grad, scaled, grad_input=scaled)
