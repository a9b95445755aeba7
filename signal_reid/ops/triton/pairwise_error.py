"""Mean squared difference of every two maps by Triton: one launch and a small sum forward, one backward.

The maths, and why the maps are compared by their differences from the first, is in signal_reid/ops/reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from signal_reid.ops.triton.launch import ceil_div, launch

BLOCK, WARPS, MOST_SHARES = 1024, 4, 512


@triton.jit(do_not_specialize=["M"])
def _forward_kernel(maps_at, shares_at, M, size, scale, block: tl.constexpr):
    """One block: so many numbers of every map at a time, as many apart as the grid takes at once.

    Every map is read once, a share of the loss is written per block.
    """
    share = tl.zeros([block], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * block, size, tl.num_programs(0) * block):
        at = start + tl.arange(0, block)
        map_at = maps_at + at
        first = tl.load(map_at, mask=at < size, other=0.0).to(tl.float32)
        total, squares = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
        for _ in range(1, M):
            map_at += size
            difference = tl.load(map_at, mask=at < size, other=0.0).to(tl.float32) - first
            total += difference
            squares += difference * difference
        share += M * squares - total * total
    tl.store(shares_at + tl.program_id(0), tl.sum(share, 0) * scale)


@triton.jit(do_not_specialize=["M"])
def _backward_kernel(grad_at, maps_at, grad_maps_at, M, size, scale, block: tl.constexpr):
    """One block: so many numbers of every map, read twice, then from the cache; every gradient is written once."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    factor = tl.load(grad_at) * (2 * scale)
    map_at, grad_map_at = maps_at + at, grad_maps_at + at
    first = tl.load(map_at, mask=at < size, other=0.0).to(tl.float32)
    total = tl.zeros([block], tl.float32)
    for _ in range(1, M):
        map_at += size
        total += tl.load(map_at, mask=at < size, other=0.0).to(tl.float32) - first
    map_at = maps_at + at
    for _ in range(M):
        difference = tl.load(map_at, mask=at < size, other=0.0).to(tl.float32) - first
        gradient = factor * (M * difference - total)
        tl.store(grad_map_at, gradient.to(grad_maps_at.dtype.element_ty), mask=at < size)
        map_at += size
        grad_map_at += size


def forward(maps: Tensor) -> Tensor:
    """(M, ...) -> () fp32."""
    maps = maps.contiguous()
    size = maps[0].numel()
    if size == 0:
        return torch.full((), torch.nan, device=maps.device)  # a mean over nothing
    shares = torch.empty(min(ceil_div(size, BLOCK), MOST_SHARES), dtype=torch.float32, device=maps.device)
    arguments = maps, shares, len(maps), size, _scale(maps)
    launch(_forward_kernel, (len(shares),), maps, *arguments, block=BLOCK, num_warps=WARPS)
    return shares.sum()


def backward(maps: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the maps, given `grad` () in fp32."""
    maps = maps.contiguous()
    grad_maps = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    size = maps[0].numel()
    arguments = grad, maps, grad_maps, len(maps), size, _scale(maps)
    launch(_backward_kernel, (ceil_div(size, BLOCK),), maps, *arguments, block=BLOCK, num_warps=WARPS)
    return grad_maps


def _scale(maps: Tensor) -> float:
    """1 / (pairs * numbers of a map)."""
    M = len(maps)
    return 2 / (M * (M - 1) * max(maps[0].numel(), 1))
