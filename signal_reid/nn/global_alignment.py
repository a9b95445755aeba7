"""GAM: pulls the modalities of a sample together by the volume that their features span."""

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
        wide = torch.promote_types(tokens.dtype, torch.float32)
        mean = tokens.sum(dim=2, dtype=wide) / tokens.shape[2]  # divides the gradient before it spreads over tokens
        return gramian_contrastive_loss(mean, self.temperature, self.label_smoothing)
