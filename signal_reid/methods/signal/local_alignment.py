"""LAM: samples each modality's tokens where learned offsets point and asks that the samples agree."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signal_reid.ops import convolve_windows, deformable_sample, split_modalities

WINDOW = 4


class LocalAlignment(nn.Module):
    """Mean squared difference between the deformably sampled token maps of every two modalities.

    Each modality has its own offset head: 1x1 projection, 1x1 convolution, GELU, depthwise 4x4 convolution of stride 4,
    GELU, 1x1 convolution to one channel. The first two layers have nothing between them and are multiplied before they
    meet the tokens. The parameters of all modalities are stacked.

    Args:
        dim: channels C.
        modalities: M.
        grid_size: rows and columns of patch tokens, at least 8 each.
        offset_range: see `signal_reid.ops.deformable_sample`.

    Source: Signal (AAAI 2026), section on the local alignment module.
    """

    def __init__(self, dim: int, modalities: int, grid_size: tuple[int, int], offset_range: float = 2.0):
        super().__init__()
        if min(grid_size) < 2 * WINDOW:
            raise ValueError(f"grid_size must be at least {2 * WINDOW} x {2 * WINDOW}, got {grid_size}")
        self.grid_size = grid_size
        self.offset_range = offset_range
        self.query_weight = nn.Parameter(torch.empty(modalities, dim, dim))
        self.query_bias = nn.Parameter(torch.empty(modalities, dim))
        self.mix_weight = nn.Parameter(torch.empty(modalities, dim, dim))
        self.mix_bias = nn.Parameter(torch.empty(modalities, dim))
        self.window_weight = nn.Parameter(torch.empty(modalities, dim, WINDOW, WINDOW))
        self.window_bias = nn.Parameter(torch.empty(modalities, dim))
        self.offset_weight = nn.Parameter(torch.empty(modalities, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default for convolutions: uniform within 1 / sqrt(fan in)."""
        dim = self.query_weight.shape[1]
        for name, parameter in self.named_parameters():
            fan_in = WINDOW * WINDOW if name.startswith("window") else dim
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, M, N, C) patch tokens -> () fp32 loss."""
        maps = split_modalities(tokens)
        sampled = [
            deformable_sample(x, offsets.to(x.dtype), self.grid_size, self.offset_range).float()
            for x, offsets in zip(maps, self._offset_maps(maps), strict=True)
        ]  # M times (B, Hk * Wk, C)
        return torch.stack([F.mse_loss(a, b) for a, b in combinations(sampled, 2)]).mean()

    def offsets(self, tokens: Tensor) -> Tensor:
        """(B, M, N, C) patch tokens -> (B, M, Hk, Wk), before tanh."""
        return torch.stack(self._offset_maps(split_modalities(tokens)), dim=1)

    def _offset_maps(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """M times (B, N, C) -> M times (B, Hk, Wk)."""
        weight = self.mix_weight @ self.query_weight  # (M, C, C)
        bias = (self.mix_weight @ self.query_bias[..., None]).squeeze(-1) + self.mix_bias  # (M, C)
        heads = zip(weight, bias, self.window_weight, self.window_bias, self.offset_weight, strict=True)
        return [offset_map(x, self.grid_size, *head) for x, head in zip(maps, heads, strict=True)]


def offset_map(
    x: Tensor,
    grid_size: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    window: Tensor,
    window_bias: Tensor,
    out: Tensor,
) -> Tensor:
    """The offset head of one modality from its first activation on, with the layer before it.

    Args:
        x: (B, H * W, C) tokens.
        grid_size: (H, W); rows and columns beyond the last whole window are left out.
        weight: (C, C), of the 1x1 layer before the first GELU.
        bias: (C,).
        window: (C, 4, 4), the depthwise convolution of stride 4.
        window_bias: (C,).
        out: (C,), the projection to one channel.

    Returns:
        (B, H // 4, W // 4), before tanh.
    """
    B, _, C = x.shape
    H, W = grid_size
    x = F.gelu(F.linear(x, weight, bias)).view(B, H, W, C)
    x = convolve_windows(x, window.to(x.dtype))  # (B, Hk, Wk, C)
    return F.gelu(x + window_bias) @ out
