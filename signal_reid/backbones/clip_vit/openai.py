"""Names of OpenAI CLIP's and open_clip's vision transformer, and ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from signal_reid.backbones.base import FileNaming

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


def clip_name(name: str, back: bool = False) -> str:
    """Our name in `ClipViT` of a parameter of CLIP's `visual` (prefix removed); with `back` the other way."""
    block = r"blocks\.(\d+)\." if back else r"transformer\.resblocks\.(\d+)\."
    match = re.match(block, name)
    if match is None:
        return renamed(name, _BACKBONE, back)
    prefix = f"transformer.resblocks.{match[1]}." if back else f"blocks.{match[1]}."
    return prefix + renamed(name[match.end() :], _BLOCK, back)


def renamed(name: str, table: tuple[tuple[str, str], ...], back: bool = False) -> str:
    """A name whose beginning, or the whole of it, is looked up in pairs of their names and ours."""
    for theirs, ours in table:
        old, new = (ours, theirs) if back else (theirs, ours)
        if name == old or (old[-1] in "._" and name.startswith(old)):
            return new + name[len(old) :]
    return name


def _visual_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{clip_name(name)}": value for name, value in state.items()}


def _clip_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower by our names; the text tower is left out, an unknown name stays as it is."""
    visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    rest = {name: value for name, value in state.items() if not name.startswith(("visual.", *_CLIP_TEXT))}
    return _visual_to_ours(visual) | rest


def _is_clip(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("visual.") for name in state)


def _refusal(state: Mapping[str, Tensor]) -> str | None:
    if "visual.class_embedding" in state:
        return None
    kind = "a ResNet" if "visual.layer1.0.conv1.weight" in state else "another kind of network"
    return f"the image encoder of this CLIP is {kind}, the model needs its vision transformer"


def _clip_names(name: str, prefix: str) -> tuple[str, ...]:
    inside = name.removeprefix("backbone.")
    return (name,) if inside == name else (prefix + clip_name(inside, back=True),)


def _names_in_clip(name: str, entries: Collection[str]) -> tuple[str, ...]:
    return _clip_names(name, "visual.")


def _names_in_visual(name: str, entries: Collection[str]) -> tuple[str, ...]:
    return _clip_names(name, "")


def _misfit(described: Mapping[str, Any]) -> str | None:
    """open_clip's configuration says `quick_gelu` where it is; without it the network computes plain GELU."""
    network = described.get("model_cfg", described)
    if not isinstance(network, Mapping) or network.get("quick_gelu") is True:
        return None
    return "no quick_gelu, which the blocks here compute: it was trained with plain GELU, its features would be off"


def _unsaid(state: Mapping[str, Tensor]) -> str | None:
    """OpenAI's archives, which are QuickGELU's, hold three sizes that open_clip's files do not."""
    if "input_resolution" in state:
        return None
    return (
        "it does not say whether it was trained with QuickGELU (OpenAI's weights) or plain GELU (most of open_clip's); "
        "it is used with QuickGELU, and of the other kind the features would be off"
    )


CLIP = FileNaming(
    "clip",
    "OpenAI CLIP or open_clip",
    _is_clip,
    _clip_to_ours,
    _names_in_clip,
    backbone_only=True,
    refusal=_refusal,
    configuration="open_clip_config.json",
    misfit=_misfit,
    unsaid=_unsaid,
)
CLIP_VISUAL = FileNaming(
    "clip",
    "the vision tower of OpenAI CLIP or open_clip",
    lambda state: {"conv1.weight", "class_embedding"} <= state.keys(),
    _visual_to_ours,
    _names_in_visual,
    backbone_only=True,
    configuration="open_clip_config.json",
    misfit=_misfit,
    unsaid=_unsaid,
)
