"""Mean squared difference of every two maps by the native core: one launch and a small sum forward, one backward."""

import torch
from torch import Tensor

from signal_reid.ops.cuda import core

NUMBERS_PER_BLOCK, MOST_SHARES = 2048, 512  # a thread then has 8 numbers of each map, more above 2^20 of them


def forward(maps: Tensor) -> Tensor:
    """(M, ...) -> () fp32."""
    maps = maps.contiguous()
    size = maps[0].numel()
    if size == 0:
        return torch.full((), torch.nan, device=maps.device)  # a mean over nothing
    blocks = min(-(-size // NUMBERS_PER_BLOCK), MOST_SHARES)
    shares = torch.empty(blocks, dtype=torch.float32, device=maps.device)
    core.launch("pairwise_error", maps, {"shares": shares.data_ptr(), "blocks": blocks, **_fields(maps, size)})
    return shares.sum()


def backward(maps: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the maps, given `grad` () in fp32."""
    maps = maps.contiguous()
    grad_maps = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    fields = {"grad": grad.data_ptr(), "grad_maps": grad_maps.data_ptr(), **_fields(maps, maps[0].numel())}
    core.launch("pairwise_error_backward", maps, fields)
    return grad_maps


def _fields(maps: Tensor, size: int) -> dict[str, int | float]:
    M = len(maps)
    return {
        "maps": maps.data_ptr(),
        "M": M,
        "size": size,
        "scale": 2 / (M * (M - 1) * max(size, 1)),
        "dtype": core.dtype_tag(maps),
    }
