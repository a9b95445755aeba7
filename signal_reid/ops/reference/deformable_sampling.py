"""Shift-aware deformable bilinear sampling, in plain PyTorch."""

import torch
from torch import Tensor


def deformable_sample(tokens: Tensor, offsets: Tensor, grid_size: tuple[int, int], offset_range: float) -> Tensor:
    """Sample each map at its reference points moved by the offsets; see `signal_reid.ops.deformable_sample`.

    Coordinates are normalised as in `grid_sample(align_corners=True)`: -1 and 1 are the centres of the outer tokens.
    """
    rows, columns = grid_size
    Hk, Wk = offsets.shape[1:]
    wide = torch.promote_types(tokens.dtype, torch.float32)
    shift = offsets.to(wide).tanh() * offset_range
    y = _pixel(_reference_points(Hk, shift)[:, None] + shift / (Hk - 1), rows)  # (B, Hk, Wk)
    x = _pixel(_reference_points(Wk, shift) + shift / (Wk - 1), columns)

    y_corners, y_weights = _corners(y, rows)  # (B, 2, Hk, Wk)
    x_corners, x_weights = _corners(x, columns)
    index = y_corners[:, :, None] * columns + x_corners[:, None]  # (B, 2, 2, Hk, Wk)
    weight = y_weights[:, :, None] * x_weights[:, None]
    index, weight = index.flatten(1, 2).flatten(2), weight.flatten(1, 2).flatten(2)  # (B, 4, Hk * Wk)

    B, _, C = tokens.shape
    corners = tokens.gather(1, index.flatten(1)[..., None].expand(-1, -1, C))  # (B, 4 * Hk * Wk, C)
    sampled = (corners.view(B, 4, Hk * Wk, C).to(wide) * weight[..., None]).sum(1)
    return sampled.to(tokens.dtype)


def _reference_points(size: int, like: Tensor) -> Tensor:
    """Centres of the windows over size - 1, as the authors have them: the last one lies beyond 1."""
    return 2 * (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / (size - 1) - 1


def _pixel(position: Tensor, size: int) -> Tensor:
    return (position.clamp(-1, 1) + 1) / 2 * (size - 1)


def _corners(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two neighbours along one axis and their weights; a NaN coordinate makes NaN weights, not a bad index."""
    low = coordinate.detach().floor()
    fraction = coordinate - low
    index = low.nan_to_num(0).long()
    return torch.stack([index, (index + 1).clamp(max=size - 1)], 1), torch.stack([1 - fraction, fraction], 1)
