"""The head that methods share: a batch-norm neck and a linear classifier."""

from torch import Tensor, nn


class Head(nn.Module):
    """Batch-norm neck without bias, then a linear classifier without bias.

    Args:
        dim: channels D of the feature.
        num_identities: classes.

    Source: Luo et al., Bag of Tricks for Person Re-Identification (2019), section 3.5.
    """

    def __init__(self, dim: int, num_identities: int):
        super().__init__()
        self.neck = nn.BatchNorm1d(dim)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, num_identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> logits (B, identities)."""
        logits: Tensor = self.classifier(self.neck(feature))
        return logits
