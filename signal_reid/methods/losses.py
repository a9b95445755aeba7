"""Identity and triplet losses of the heads, and the weighted total."""

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.config import Config, LossConfig
from signal_reid.methods.signal.model import SignalOutput


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


def head_loss(logits: Tensor, feature: Tensor, labels: Tensor, losses: LossConfig) -> Tensor:
    """Weighted sum of the label-smoothed identity loss and the triplet loss of one head."""
    identity = F.cross_entropy(logits.float(), labels, label_smoothing=losses.label_smoothing)
    return losses.identity * identity + losses.triplet * soft_margin_triplet(feature, labels)


def loss_parts(output: SignalOutput, labels: Tensor, config: Config) -> dict[str, Tensor]:
    """Each unweighted alignment loss, each head's loss, and `total`, as () tensors; nothing is synchronised.

    Args:
        output: what the model returned in training mode.
        labels: (B,) int64 class indices.
        config: the weights under `losses`.
    """
    losses = config.losses
    with torch.autocast(labels.device.type, enabled=False):
        parts = {f"head_{i}": head_loss(*head, labels, losses) for i, head in enumerate(output.heads)}
        total = torch.stack(list(parts.values())).sum()
        if output.gam_loss is not None:
            parts["gam"] = output.gam_loss
            total = total + losses.global_alignment * output.gam_loss
        if output.lam_loss is not None:
            parts["lam"] = output.lam_loss
            total = total + losses.local_alignment * output.lam_loss
    return {"total": total, **parts}


def total_loss(output: SignalOutput, labels: Tensor, config: Config) -> Tensor:
    """The loss that training minimises: heads + weighted GAM + weighted LAM; see `loss_parts`."""
    return loss_parts(output, labels, config)["total"]
