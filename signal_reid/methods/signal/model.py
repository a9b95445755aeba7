"""The Signal model: a shared CLIP backbone, selective interaction, global and local alignment, and the heads."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from signal_reid.backbones.clip_vit import ClipViT
from signal_reid.config import Config
from signal_reid.methods.signal.global_alignment import GlobalAlignment
from signal_reid.methods.signal.local_alignment import LocalAlignment
from signal_reid.methods.signal.selective_interaction import SelectiveInteraction


class SignalOutput(NamedTuple):
    """What the model returns in training."""

    heads: list[tuple[Tensor, Tensor]]
    """(logits (B, identities), feature before the neck) of each head on class tokens, then of the SIM head."""
    gam_loss: Tensor | None
    lam_loss: Tensor | None


class Head(nn.Module):
    """Batch-norm neck without bias, then a linear classifier without bias."""

    def __init__(self, dim: int, num_identities: int):
        super().__init__()
        self.neck = nn.BatchNorm1d(dim)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, num_identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> logits (B, identities) and the feature itself."""
        return self.classifier(self.neck(feature)), feature


class Signal(nn.Module):
    """Selective interaction and global-local alignment for multi-modal object re-identification.

    Args:
        config: the model and the image size are read from it.
        num_identities: classes of the training identities.
        num_cameras: rows of the camera embedding.

    Source: Signal (AAAI 2026).
    """

    def __init__(self, config: Config, num_identities: int, num_cameras: int):
        super().__init__()
        if num_identities < 2:
            raise ValueError(f"num_identities must be at least 2, got {num_identities}")
        model, dim = config.model, config.model.backbone.output_dim
        self.modalities = model.modalities
        self.image_size = config.data.image_size
        self.joint = model.heads == "joint"
        self.backbone = ClipViT(model.backbone, config.grid_size, num_cameras)
        inputs = [model.modalities * dim] if self.joint else [dim] * model.modalities
        self.heads = nn.ModuleList(Head(size, num_identities) for size in inputs)
        self.selective_interaction: SelectiveInteraction | None = None
        self.interaction_head: Head | None = None
        if model.selective_interaction:
            self.selective_interaction = SelectiveInteraction(dim, model.k_intra, model.interaction_heads)
            self.interaction_head = Head(model.modalities * dim, num_identities)
        self.global_alignment = GlobalAlignment() if model.global_alignment else None
        self.local_alignment = (
            LocalAlignment(dim, model.modalities, config.grid_size, model.offset_range)
            if model.local_alignment
            else None
        )

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> SignalOutput | Tensor:
        """Compute training outputs, or in evaluation mode the retrieval feature.

        Args:
            images: (B, M, 3, H, W) floating, normalised.
            cameras: (B,) int64 camera indices, or None to add no camera embedding.

        Returns:
            Training mode: `SignalOutput`. Evaluation mode: (B, 2 M C), the class tokens of the modalities and the SIM
            feature, not normalised; (B, M C) without SIM.

        Raises:
            ValueError: images of another shape.
        """
        return self.interact(*self.encode(images, cameras))

    def encode(self, images: Tensor, cameras: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, M, 3, H, W) -> patch tokens (B, M, N, C) and class tokens (B, M, C), all modalities in one batch."""
        expected = (self.modalities, 3, *self.image_size)
        if images.ndim != 5 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must have shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        B, M = images.shape[:2]
        repeated = cameras.repeat_interleave(M) if cameras is not None else None
        encoded = self.backbone(images.flatten(0, 1), repeated).unflatten(0, (B, M))  # (B, M, 1 + N, C)
        return encoded[:, :, 1:], encoded[:, :, 0]

    def interact(self, tokens: Tensor, cls: Tensor) -> SignalOutput | Tensor:
        """Everything after the backbone, on what `encode` returns; see `forward` for the result."""
        joint = cls.flatten(1)
        interaction = self.selective_interaction(tokens, cls) if self.selective_interaction is not None else None
        if not self.training:
            return joint if interaction is None else torch.cat([joint, interaction.to(joint.dtype)], dim=1)
        features = [joint] if self.joint else list(cls.unbind(1))
        heads = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        if interaction is not None and self.interaction_head is not None:
            heads.append(self.interaction_head(interaction))
        gam_loss = self.global_alignment(tokens) if self.global_alignment is not None else None
        lam_loss = self.local_alignment(tokens) if self.local_alignment is not None else None
        return SignalOutput(heads, gam_loss, lam_loss)


def build_model(config: Config, num_identities: int, num_cameras: int) -> Signal:
    """Build a Signal model with random weights; see `Signal` for the arguments."""
    return Signal(config, num_identities, num_cameras)
