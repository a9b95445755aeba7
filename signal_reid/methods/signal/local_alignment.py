"""LAM: samples each modality's tokens where learned offsets point and asks that the samples agree."""

import math

import torch
from torch import Tensor, nn

from signal_reid.ops import deformable_sample, pairwise_mse_loss, predict_offsets
from signal_reid.ops.layout import without_autocast

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
        maps = by_modality(tokens)
        offsets = self._offsets(maps).to(maps.dtype)
        sampled = deformable_sample(maps.flatten(0, 1), offsets.flatten(0, 1), self.grid_size, self.offset_range)
        return pairwise_mse_loss(sampled.unflatten(0, maps.shape[:2]))

    def offsets(self, tokens: Tensor) -> Tensor:
        """(B, M, N, C) patch tokens -> (B, M, Hk, Wk), before tanh."""
        return self._offsets(by_modality(tokens)).transpose(0, 1)

    def _offsets(self, maps: Tensor) -> Tensor:
        """(M, B, N, C) -> (M, B, Hk, Wk)."""
        with without_autocast(maps):  # two casts less each way than in low precision, and no digit lost
            weight = self.mix_weight @ self.query_weight  # (M, C, C)
            column = self.mix_bias.unsqueeze(-1), self.mix_weight, self.query_bias.unsqueeze(-1)
            bias = torch.baddbmm(*column).squeeze(-1)  # (M, C)
        head = bias, self.window_weight, self.window_bias, self.offset_weight
        return offset_maps(maps, self.grid_size, weight, *head)


def by_modality(tokens: Tensor) -> Tensor:
    """(B, M, N, C) -> (M, B, N, C), contiguous: a copy, unless the tokens lie so already.

    A product with a weight per modality takes the rows of each modality at one distance. Tokens of a ViT lie at two: N
    rows of a modality, then a gap of M - 1 maps and the class tokens. A product per sample and modality would take them
    as they are, but wants a copy of the weight per sample and leaves as many weight gradients to be summed: at a batch
    of 64 more bytes than this copy, in each direction.
    """
    return tokens.transpose(0, 1).contiguous()


def offset_maps(
    maps: Tensor,
    grid_size: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    window: Tensor,
    window_bias: Tensor,
    out: Tensor,
) -> Tensor:
    """The offset heads of all modalities.

    Args:
        maps: (M, B, H * W, C) tokens.
        grid_size: (H, W); rows and columns beyond the last whole window are left out.
        weight: (M, C, C), of the 1x1 layer before the first GELU.
        bias: (M, C).
        window: (M, C, 4, 4), the depthwise convolution of stride 4.
        window_bias: (M, C).
        out: (M, C), the projection to one channel.

    Returns:
        (M, B, H // 4, W // 4), before tanh.
    """
    hidden = (maps.flatten(1, 2) @ weight.mT).view(maps.shape)
    return predict_offsets(hidden, grid_size, bias, window, window_bias, out)
