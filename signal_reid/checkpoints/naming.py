"""Names and shapes of parameters in the authors' files and in ours, both ways, without loss."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

MODALITIES = ("r", "n", "t")
"""Suffixes of the authors' per-modality modules: RGB, near-infrared, thermal."""

_BACKBONE = (
    ("conv1.weight", "patch_embedding.weight"),
    ("class_embedding", "class_token"),
    ("positional_embedding", "position_embedding"),
    ("ln_pre.", "norm_before."),
    ("ln_post.", "norm_after."),
    ("proj", "projection"),
)
_BLOCK = (
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("attn.in_proj_", "attention.qkv."),
    ("attn.out_proj.", "attention.output."),
    ("mlp.c_fc.", "mlp.expand."),
    ("mlp.c_proj.", "mlp.contract."),
)
_INTERACTION = (
    ("cross_attn.in_proj_", "qkv."),
    ("cross_attn.out_proj.", "output."),
    ("ffn.0.", "expand."),
    ("ffn.2.", "contract."),
    ("norm1.", "norm1."),
    ("norm2.", "norm2."),
)
_SELECTION = (("W_q.", "query."), ("W_k.", "key."), ("W_v.", "value."))
_OFFSET_HEAD = (
    ("proj_q.weight", "query_weight"),
    ("proj_q.bias", "query_bias"),
    ("conv_offset.0.weight", "mix_weight"),
    ("conv_offset.0.bias", "mix_bias"),
    ("conv_offset.2.weight", "window_weight"),
    ("conv_offset.2.bias", "window_bias"),
    ("conv_offset.4.weight", "offset_weight"),
)


def clip_visual_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI CLIP's `visual.` parameters (prefix removed) in the names of `ClipViT`; unknown names stay as they are."""
    return {_clip_name(name): value for name, value in state.items()}


def ours_to_clip_visual(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `clip_visual_to_ours`."""
    return {_clip_name(name, back=True): value for name, value in state.items()}


def authors_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' Signal state dict in our names; unknown names stay as they are, to be reported by the loader."""
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "clip_vision_encoder.cv_embed":
            ours["backbone.camera_embedding"] = value.squeeze(1)
        elif name.startswith("AlignM.DAS_"):
            continue
        else:
            ours[_authors_name(name)] = value
    for theirs, name in _OFFSET_HEAD:
        parts = [state.get(f"AlignM.DAS_{m}.{theirs}") for m in MODALITIES]
        given = [part for part in parts if part is not None]
        if len(given) == len(MODALITIES):
            ours[f"local_alignment.{name}"] = torch.stack([_to_offset_head(part, name) for part in given])
        else:
            ours |= {f"AlignM.DAS_{m}.{theirs}": part for m, part in zip(MODALITIES, parts, strict=True)
                     if part is not None}
    known = {f"AlignM.DAS_{m}.{theirs}" for m in MODALITIES for theirs, _ in _OFFSET_HEAD}
    ours |= {name: value for name, value in state.items() if name.startswith("AlignM.DAS_") and name not in known}
    return ours


def ours_to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `authors_to_ours`."""
    joint = "heads.1.classifier.weight" not in state
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "backbone.camera_embedding":
            theirs["clip_vision_encoder.cv_embed"] = value.unsqueeze(1)
        elif name.startswith("local_alignment."):
            part = name.removeprefix("local_alignment.")
            suffix = next(suffix for suffix, ours in _OFFSET_HEAD if ours == part)
            for index, m in enumerate(MODALITIES):
                theirs[f"AlignM.DAS_{m}.{suffix}"] = _from_offset_head(value[index], part)
        else:
            theirs[_our_name_in_authors(name, joint)] = value
    return theirs


def _clip_name(name: str, back: bool = False) -> str:
    block = r"blocks\.(\d+)\." if back else r"transformer\.resblocks\.(\d+)\."
    match = re.match(block, name)
    if match is None:
        return _renamed(name, _BACKBONE, back)
    prefix = f"transformer.resblocks.{match[1]}." if back else f"blocks.{match[1]}."
    return prefix + _renamed(name[match.end() :], _BLOCK, back)


def _authors_name(name: str) -> str:
    for prefix, ours, table in (
        ("SIM.token_selection.", "selective_interaction.selection.", _SELECTION),
        ("SIM.modal_interactive.", "selective_interaction.interaction.", _INTERACTION),
    ):
        if name.startswith(prefix):
            return ours + _renamed(name.removeprefix(prefix), table)
    if name.startswith("clip_vision_encoder.base."):
        return "backbone." + _clip_name(name.removeprefix("clip_vision_encoder.base."))
    if name == "AlignM.contra_temp":
        return "global_alignment.temperature"
    match = re.fullmatch(r"(classifier|bottleneck)(?:_(var|r|n|t))?\.(\w+)", name)
    if match is None:
        return name
    part = "classifier" if match[1] == "classifier" else "neck"
    if match[2] == "var":
        return f"interaction_head.{part}.{match[3]}"
    index = MODALITIES.index(match[2]) if match[2] else 0
    return f"heads.{index}.{part}.{match[3]}"


def _our_name_in_authors(name: str, joint: bool) -> str:
    for prefix, ours, table in (
        ("SIM.token_selection.", "selective_interaction.selection.", _SELECTION),
        ("SIM.modal_interactive.", "selective_interaction.interaction.", _INTERACTION),
    ):
        if name.startswith(ours):
            return prefix + _renamed(name.removeprefix(ours), table, back=True)
    if name.startswith("backbone."):
        return "clip_vision_encoder.base." + _clip_name(name.removeprefix("backbone."), back=True)
    if name == "global_alignment.temperature":
        return "AlignM.contra_temp"
    match = re.fullmatch(r"(?:heads\.(\d)|interaction_head)\.(classifier|neck)\.(\w+)", name)
    if match is None:
        raise ValueError(f"{name} has no counterpart in the authors' model")
    part = "classifier" if match[2] == "classifier" else "bottleneck"
    suffix = "_var" if match[1] is None else "" if joint else f"_{MODALITIES[int(match[1])]}"
    return f"{part}{suffix}.{match[3]}"


def _renamed(name: str, table: tuple[tuple[str, str], ...], back: bool = False) -> str:
    for theirs, ours in table:
        old, new = (ours, theirs) if back else (theirs, ours)
        if name == old or (old[-1] in "._" and name.startswith(old)):
            return new + name[len(old) :]
    return name


def _to_offset_head(value: Tensor, name: str) -> Tensor:
    """The 1x1 and depthwise convolutions' (out, in, h, w) without the dimensions of size one."""
    if name == "window_weight":
        return value.squeeze(1)
    if name == "offset_weight":
        return value.reshape(-1)
    return value.flatten(1) if name.endswith("weight") else value


def _from_offset_head(value: Tensor, name: str) -> Tensor:
    if name == "window_weight":
        return value.unsqueeze(1)
    if name == "offset_weight":
        return value.view(1, -1, 1, 1)
    return value[..., None, None] if name.endswith("weight") else value
