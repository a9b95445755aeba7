"""GAM: pulls the modalities of a sample together by the volume that their features span."""

from typing import Any

import torch
from torch import Tensor, nn

from signal_reid.ops import gramian_contrastive_loss


class GlobalAlignment(nn.Module):
    """Contrastive loss on the gramian volume of mean patch tokens, with a learnable temperature.

    Source: Signal (AAAI 2026), section on the global alignment module.
    """

    def __init__(self, temperature: float = 0.07, label_smoothing: float = 0.1):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.label_smoothing = label_smoothing

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, M, N, C) patch tokens -> () fp32 loss."""
        return gramian_contrastive_loss(TokenMean.apply(tokens), self.temperature, self.label_smoothing)


class TokenMean(torch.autograd.Function):
    """Mean over tokens in fp32 or wider, (B, M, N, C) -> (B, M, C).

    One modality at a time, as PyTorch converts what it sums and M small copies cost a CPU less than a large one; the
    gradient is divided and rounded before it spreads over the tokens, as a view.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = tokens.shape, tokens.dtype
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return torch.stack([x.mean(dim=1, dtype=wide) for x in tokens.unbind(1)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad / ctx.shape[2]).to(ctx.dtype).unsqueeze(2).expand(ctx.shape)
