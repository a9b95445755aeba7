"""The model: the CLIP backbone, the three modules of Signal, and the whole."""

from signal_reid.nn.clip_vit import ClipViT, resize_position_embedding
from signal_reid.nn.global_alignment import GlobalAlignment
from signal_reid.nn.local_alignment import LocalAlignment
from signal_reid.nn.selective_interaction import SelectiveInteraction
from signal_reid.nn.signal import Signal, SignalOutput, build_model

__all__ = [
    "ClipViT",
    "GlobalAlignment",
    "LocalAlignment",
    "SelectiveInteraction",
    "Signal",
    "SignalOutput",
    "build_model",
    "resize_position_embedding",
]
