"""CLIP's vision transformer (`network`), and how OpenAI, open_clip and Hugging Face name its weights."""

from signal_reid.backbones.clip_vit.network import ClipViT, ClipViTConfig, resize_position_embedding

BACKBONE = ClipViT

__all__ = ["BACKBONE", "ClipViT", "ClipViTConfig", "resize_position_embedding"]
