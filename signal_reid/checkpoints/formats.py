"""Which naming a state dict is in, and its entries in ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from signal_reid.checkpoints.errors import CheckpointError
from signal_reid.checkpoints.hugging_face import hugging_face_names, hugging_face_to_ours, is_hugging_face
from signal_reid.checkpoints.reading import Contents
from signal_reid.upstream.parameters import authors_names, authors_to_ours, clip_visual_name, clip_visual_to_ours

_CLIP_TEXT = (
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "text.",
    "logit_scale",
    "logit_bias",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
)
"""What a CLIP file holds besides its vision tower."""

_OURS = ("backbone.", "heads.", "selective_interaction.", "interaction_head.", "global_alignment.", "local_alignment.")


@dataclass(frozen=True)
class Format:
    """A naming of parameters."""

    name: str
    """`signal-reid`, `authors`, `clip` (of OpenAI and open_clip) or `hugging-face`."""
    title: str
    backbone_only: bool
    """The files hold CLIP alone, on a square grid of patches."""
    to_ours: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    file_names: Callable[[str, bool], tuple[str, ...]]
    """The file's names of one of our entries, given whether the model has one joint head."""


def recognise(contents: Contents) -> Format:
    """Find the naming of a state dict.

    Raises:
        CheckpointError: none that is supported, or a CLIP without a vision transformer of its own.
    """
    state = contents.state
    if any(name.startswith(_OURS) for name in state):
        return OURS
    if any(name.startswith("clip_vision_encoder.") for name in state):
        return AUTHORS
    if is_hugging_face(state):
        return HUGGING_FACE
    if any(name.startswith("visual.") for name in state):
        if "visual.class_embedding" not in state:
            kind = "a ResNet" if "visual.layer1.0.conv1.weight" in state else "another kind of network"
            raise CheckpointError(
                f"{contents.origin}: the image encoder of this CLIP is {kind}, the model needs its vision transformer"
            )
        return CLIP
    if {"conv1.weight", "class_embedding"} <= state.keys():
        return CLIP_VISUAL
    first = ", ".join(list(state)[:3])
    raise CheckpointError(
        f"{contents.origin}: {len(state)} entries of no supported naming (signal-reid, the authors' Signal, "
        f"OpenAI CLIP or open_clip, Hugging Face CLIP), beginning with {first}"
    )


def _clip_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    rest = {name: value for name, value in state.items() if not name.startswith(("visual.", *_CLIP_TEXT))}
    return _in_backbone(clip_visual_to_ours(visual)) | rest


def _in_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": value for name, value in state.items()}


def _clip_names(name: str, prefix: str) -> tuple[str, ...]:
    inside = name.removeprefix("backbone.")
    return (name,) if inside == name else (prefix + clip_visual_name(inside),)


def _authors_names(name: str, joint: bool) -> tuple[str, ...]:
    try:
        return authors_names(name, joint)
    except ValueError:
        return (name,)


OURS = Format("signal-reid", "signal-reid", False, dict, lambda name, joint: (name,))
AUTHORS = Format("authors", "the authors' Signal", False, authors_to_ours, _authors_names)
CLIP = Format("clip", "OpenAI CLIP or open_clip", True, _clip_to_ours, lambda name, joint: _clip_names(name, "visual."))
CLIP_VISUAL = Format(
    "clip",
    "the vision tower of OpenAI CLIP or open_clip",
    True,
    lambda state: _in_backbone(clip_visual_to_ours(state)),
    lambda name, joint: _clip_names(name, ""),
)
HUGGING_FACE = Format(
    "hugging-face",
    "Hugging Face CLIP",
    True,
    lambda state: _in_backbone(hugging_face_to_ours(state)),
    lambda name, joint: hugging_face_names(name.removeprefix("backbone.")),
)
