"""Names and shapes of parameters in the authors' files and in ours, both ways, without loss."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from signal_reid.backbones.base import FileNaming
from signal_reid.backbones.clip_vit.openai import clip_name, renamed
from signal_reid.runtime.errors import InputError

MODALITIES = ("r", "n", "t")
"""Suffixes of the authors' per-modality modules: RGB, near-infrared, thermal."""

_INTERACTION = (
    ("cross_attn.in_proj_", "qkv."),
    ("cross_attn.out_proj.", "output."),
    ("ffn.0.", "expand."),
    ("ffn.2.", "contract."),
    ("norm1.", "norm1."),
    ("norm2.", "norm2."),
)
_SELECTION = (("W_q.", "query."), ("W_k.", "key."), ("W_v.", "value."))
_ORDER = (
    "clip_vision_encoder.cv_embed",
    "clip_vision_encoder.base.class_embedding",
    "clip_vision_encoder.base.positional_embedding",
    "clip_vision_encoder.base.proj",
    "clip_vision_encoder.base.conv1.",
    "clip_vision_encoder.base.ln_pre.",
    "clip_vision_encoder.base.transformer.resblocks.",
    "clip_vision_encoder.base.ln_post.",
    "bottleneck.",
    "classifier.",
    *(f"{part}_{m}." for m in MODALITIES for part in ("classifier", "bottleneck")),
    "SIM.token_selection.",
    "SIM.modal_interactive.cross_attn.",
    "SIM.modal_interactive.ffn.",
    "SIM.modal_interactive.norm1.",
    "SIM.modal_interactive.norm2.",
    "classifier_var.",
    "bottleneck_var.",
    "AlignM.contra_temp",
    *(f"AlignM.DAS_{m}.{part}" for m in MODALITIES for part in ("conv_offset.", "proj_q.")),
)
"""Where the authors' modules stand in their state dict; within one, ours stand in their order but for the blocks."""
_BLOCK_ORDER = ("attn.", "ln_1.", "mlp.", "ln_2.")
_OFFSET_HEAD = (
    ("proj_q.weight", "query_weight"),
    ("proj_q.bias", "query_bias"),
    ("conv_offset.0.weight", "mix_weight"),
    ("conv_offset.0.bias", "mix_bias"),
    ("conv_offset.2.weight", "window_weight"),
    ("conv_offset.2.bias", "window_bias"),
    ("conv_offset.4.weight", "offset_weight"),
)


def authors_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' Signal state dict in our names; unknown names stay as they are, to be reported by the loader."""
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "clip_vision_encoder.cv_embed":
            ours["backbone.camera_embedding"] = value.squeeze(1)
        elif not name.startswith("AlignM.DAS_"):
            ours[_authors_name(name)] = value
    for theirs, name in _OFFSET_HEAD:
        parts = [state.get(f"AlignM.DAS_{m}.{theirs}") for m in MODALITIES]
        given = [part for part in parts if part is not None]
        if len(given) == len(MODALITIES) and len({part.shape for part in given}) == 1:
            ours[f"local_alignment.{name}"] = torch.stack([_to_offset_head(part, name) for part in given])
        else:
            ours |= {
                f"AlignM.DAS_{m}.{theirs}": part for m, part in zip(MODALITIES, parts, strict=True) if part is not None
            }
    known = {f"AlignM.DAS_{m}.{theirs}" for m in MODALITIES for theirs, _ in _OFFSET_HEAD}
    ours |= {name: value for name, value in state.items() if name.startswith("AlignM.DAS_") and name not in known}
    return ours


def ours_to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `authors_to_ours`, in the order of the authors' modules.

    Raises:
        ValueError: a name or a number of modalities that the authors' model does not have.
    """
    _check_modalities(state)
    joint = "heads.1.classifier.weight" not in state
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        names = authors_names(name, joint)
        if name == "backbone.camera_embedding":
            theirs[names[0]] = value.unsqueeze(1)
        elif len(names) == 1:
            theirs[names[0]] = value
        elif len(names) == len(value):
            part = name.removeprefix("local_alignment.")
            theirs |= {names[m]: _from_offset_head(value[m], part) for m in range(len(names))}
        else:
            raise InputError(f"the authors' model has {len(names)} modalities, {name} has {len(value)}")
    return {name: theirs[name] for name in sorted(theirs, key=_authors_order)}


def _check_modalities(state: Mapping[str, Tensor]) -> None:
    """The joint head is as wide as all modalities together, of per-modality heads there is one for each."""
    heads = sum(name.endswith(".classifier.weight") and name.startswith("heads.") for name in state)
    if heads == 1 and "backbone.projection" in state:
        width, dim = state["heads.0.classifier.weight"].shape[1], state["backbone.projection"].shape[1]
        heads = width // dim if width != dim else heads
    if heads not in (0, len(MODALITIES)):
        raise InputError(f"the authors' model has {len(MODALITIES)} modalities, this one {heads}")


def authors_names(name: str, joint: bool) -> tuple[str, ...]:
    """The authors' names of one of our entries: one, or one per modality where ours are stacked.

    Args:
        name: in our naming.
        joint: the model has one head on the concatenated class tokens.

    Raises:
        ValueError: the authors' model has no such entry.
    """
    if name == "backbone.camera_embedding":
        return ("clip_vision_encoder.cv_embed",)
    if name.startswith("local_alignment."):
        part = name.removeprefix("local_alignment.")
        for suffix, ours in _OFFSET_HEAD:
            if ours == part:
                return tuple(f"AlignM.DAS_{m}.{suffix}" for m in MODALITIES)
    return (_our_name_in_authors(name, joint),)


def _authors_name(name: str) -> str:
    for prefix, ours, table in (
        ("SIM.token_selection.", "selective_interaction.selection.", _SELECTION),
        ("SIM.modal_interactive.", "selective_interaction.interaction.", _INTERACTION),
    ):
        if name.startswith(prefix):
            return ours + renamed(name.removeprefix(prefix), table)
    if name.startswith("clip_vision_encoder.base."):
        return "backbone." + clip_name(name.removeprefix("clip_vision_encoder.base."))
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
            return prefix + renamed(name.removeprefix(ours), table, back=True)
    if name.startswith("backbone."):
        return "clip_vision_encoder.base." + clip_name(name.removeprefix("backbone."), back=True)
    if name == "global_alignment.temperature":
        return "AlignM.contra_temp"
    match = re.fullmatch(r"(?:heads\.(\d)|interaction_head)\.(classifier|neck)\.(\w+)", name)
    if match is None:
        raise InputError(f"{name} has no counterpart in the authors' model")
    if match[1] is not None and int(match[1]) >= len(MODALITIES):
        raise InputError(f"the authors' model has {len(MODALITIES)} modalities, {name} is of another")
    part = "classifier" if match[2] == "classifier" else "bottleneck"
    suffix = "_var" if match[1] is None else "" if joint else f"_{MODALITIES[int(match[1])]}"
    return f"{part}{suffix}.{match[3]}"


def _authors_order(name: str) -> tuple[int, int, int]:
    """Sort key; equal keys keep the order that they came in."""
    place = next((place for place, prefix in enumerate(_ORDER) if name.startswith(prefix)), len(_ORDER))
    match = re.match(r"clip_vision_encoder\.base\.transformer\.resblocks\.(\d+)\.", name)
    if match is None:
        return place, 0, 0
    rest = name[match.end() :]
    part = next((part for part, prefix in enumerate(_BLOCK_ORDER) if rest.startswith(prefix)), len(_BLOCK_ORDER))
    return place, int(match[1]), part


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


def _is_authors(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("clip_vision_encoder.") for name in state)


def _names_in_file(name: str, entries: Collection[str]) -> tuple[str, ...]:
    try:
        return authors_names(name, joint="heads.1.classifier.weight" not in entries)
    except ValueError:
        return (name,)


AUTHORS = FileNaming(
    "authors", "the authors' Signal", _is_authors, authors_to_ours, _names_in_file, from_ours=ours_to_authors
)
