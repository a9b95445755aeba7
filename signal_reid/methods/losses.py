"""Losses that methods share: identity and triplet."""

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.config.schema import LossConfig
from signal_reid.ops.layout import without_autocast


def soft_margin_triplet(features: Tensor, labels: Tensor) -> Tensor:
    """Soft-margin triplet loss with batch-hard mining on Euclidean distances.

    Args:
        features: (B, D) floating; distances are computed in fp32 or wider.
        labels: (B,) int64; at least two identities.

    Returns:
        () mean over anchors of `log(1 + exp(hardest positive - hardest negative))`.

    Source: Hermans et al., In Defense of the Triplet Loss (2017), eq. 5.
    """
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    squared = (x * x).sum(1)
    distance = (squared[:, None] + squared[None] - 2 * x @ x.T).clamp_min(1e-12).sqrt()  # (B, B)
    same = labels[:, None] == labels[None]
    positive = distance.masked_fill(~same, -torch.inf).max(dim=1).values
    negative = distance.masked_fill(same, torch.inf).min(dim=1).values
    return F.softplus(positive - negative).mean()


def head_losses(name: str, logits: Tensor, feature: Tensor, labels: Tensor, settings: LossConfig) -> dict[str, Tensor]:
    """`head_loss` under a name, and what it is made of under names with a dot, which are no losses of their own.

    Args:
        name: of the head, such as `head_0`.
        logits, feature, labels, settings: see `head_loss`.

    Returns:
        `head_0`; `head_0.identity` and `head_0.triplet`, unweighted, and `head_0.accuracy`, the share of the samples
        whose largest logit is of their class, all three without gradient.
    """
    with without_autocast(labels):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        identity = F.cross_entropy(wide, labels, label_smoothing=settings.label_smoothing)
        triplet = soft_margin_triplet(feature, labels)
        right = (wide.detach().argmax(1) == labels).to(identity.dtype).mean()
        total = settings.identity * identity + settings.triplet * triplet
    parts = {"identity": identity.detach(), "triplet": triplet.detach(), "accuracy": right}
    return {name: total, **{f"{name}.{part}": value for part, value in parts.items()}}


def head_loss(logits: Tensor, feature: Tensor, labels: Tensor, settings: LossConfig) -> Tensor:
    """Weighted sum of the label-smoothed identity loss and the triplet loss of one head, in fp32 or wider.

    Args:
        logits: (B, identities).
        feature: (B, D), before the neck.
        labels: (B,) int64 class indices.
        settings: both weights and the smoothing.
    """
    return head_losses("head", logits, feature, labels, settings)["head"]
