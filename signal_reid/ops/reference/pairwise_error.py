"""Mean over all pairs of maps of their mean squared difference, in plain PyTorch.

With M maps x_i of n numbers, of which there are P = M (M - 1) / 2 pairs,

    L = 1 / (P n) sum_{i < j} |x_i - x_j|^2,    dL/dx_i = 2 / (P n) sum_j (x_i - x_j).

A kernel that goes over the maps once takes d_i = x_i - x_0: the sum over pairs is M sum_i |d_i|^2 - |sum_i d_i|^2, the
sum of the gradient M d_i - sum_j d_j. Of the maps themselves, not of their differences, these would lose all digits
where the maps are alike.
"""

from itertools import combinations

import torch
from torch import Tensor


def forward(maps: Tensor) -> Tensor:
    """(M, ...) -> (), in fp32 or wider."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return torch.stack([(a - b).square().mean() for a, b in combinations(wide, 2)]).mean()


def backward(maps: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the maps, given `grad` ()."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    M = len(wide)
    pairs = M * (M - 1) // 2
    differences = M * wide - wide.sum(0)
    return (grad * 2 / (pairs * max(wide[0].numel(), 1)) * differences).to(maps.dtype).contiguous()
