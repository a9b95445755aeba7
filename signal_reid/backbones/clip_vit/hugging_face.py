"""Names of Hugging Face Transformers' `CLIPModel` and `CLIPVisionModelWithProjection`, and ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from signal_reid.backbones.base import FileNaming
from signal_reid.runtime.text import shown

_BACKBONE = {
    "vision_model.embeddings.class_embedding": "class_token",
    "vision_model.embeddings.patch_embedding.weight": "patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight": "position_embedding",
    "vision_model.pre_layrnorm.weight": "norm_before.weight",
    "vision_model.pre_layrnorm.bias": "norm_before.bias",
    "vision_model.post_layernorm.weight": "norm_after.weight",
    "vision_model.post_layernorm.bias": "norm_after.bias",
    "visual_projection.weight": "projection",
}
_BLOCK = {
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "self_attn.out_proj.": "attention.output.",
    "mlp.fc1.": "mlp.expand.",
    "mlp.fc2.": "mlp.contract.",
}
_LAYER = "vision_model.encoder.layers"
_TEXT = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")


def _is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds their vision model."""
    return any(name.startswith("vision_model.") for name in state)


def _visual_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their vision model in the names of `ClipViT`, query, key and value fused; the text tower is left out.

    Unknown names stay as they are, to be reported by the loader.
    """
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith(_TEXT):
            ours[_name(name)] = value.transpose(0, 1) if name == "visual_projection.weight" else value
    layers = {match[1] for name in state if (match := re.match(rf"{_LAYER}\.(\d+)\.", name))}
    for layer in layers:
        for kind in ("weight", "bias"):
            names = _qkv(layer, kind)
            if all(name in ours for name in names):
                ours[f"blocks.{layer}.attention.qkv.{kind}"] = torch.cat([ours.pop(name) for name in names])
    return ours


def _visual_names(name: str) -> tuple[str, ...]:
    """Their names of an entry of `ClipViT`: one, or three where ours are fused."""
    for theirs, ours in _BACKBONE.items():
        if ours == name:
            return (theirs,)
    match = re.match(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return (name,)
    if match[2].startswith("attention.qkv."):
        return _qkv(match[1], match[2].removeprefix("attention.qkv."))
    for part, ours in _BLOCK.items():
        if match[2].startswith(ours):
            return (f"{_LAYER}.{match[1]}.{part}{match[2].removeprefix(ours)}",)
    return (name,)


def _name(name: str) -> str:
    if name in _BACKBONE:
        return _BACKBONE[name]
    match = re.match(rf"{_LAYER}\.(\d+)\.(.+)", name)
    if match is not None:
        for theirs, ours in _BLOCK.items():
            if match[2].startswith(theirs):
                return f"blocks.{match[1]}.{ours}{match[2].removeprefix(theirs)}"
    return name


def _qkv(layer: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{_LAYER}.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")


def _to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": value for name, value in _visual_to_ours(state).items()}


def _names_in_file(name: str, entries: Collection[str]) -> tuple[str, ...]:
    return _visual_names(name.removeprefix("backbone."))


def _misfit(described: Mapping[str, Any]) -> str | None:
    """Their configuration names the activation of the blocks; QuickGELU is what it means where it does not."""
    vision = described.get("vision_config", described)
    activation = vision.get("hidden_act", "quick_gelu") if isinstance(vision, Mapping) else "quick_gelu"
    if activation == "quick_gelu":
        return None
    return f"hidden_act is {shown(activation)}, the blocks here compute 'quick_gelu': its features would be off"


def _unsaid(state: Mapping[str, Tensor]) -> str:
    return "no config.json beside it says whether it was trained with QuickGELU, with which it is used here"


HUGGING_FACE = FileNaming(
    "hugging-face",
    "Hugging Face CLIP",
    _is_hugging_face,
    _to_ours,
    _names_in_file,
    backbone_only=True,
    configuration="config.json",
    misfit=_misfit,
    unsaid=_unsaid,
)
