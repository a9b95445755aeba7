"""GAM: pulls the modalities of a sample together by the volume that their features span."""

import torch
from torch import Tensor, nn

from signal_reid.ops import gramian_contrastive_loss, mean_tokens


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
        return self.loss(mean_tokens(tokens))

    def loss(self, means: Tensor) -> Tensor:
        """(B, M, C) means of the patch tokens of a whole batch -> () fp32 loss."""
        return gramian_contrastive_loss(means, self.temperature, self.label_smoothing)
