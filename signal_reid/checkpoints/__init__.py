"""Checkpoints: CLIP's, the authors' and ours in; ours and the authors' out."""

from signal_reid.checkpoints.errors import CheckpointError
from signal_reid.checkpoints.exporting import export
from signal_reid.checkpoints.loading import Description, LoadReport, describe, load, load_backbone

__all__ = [
    "CheckpointError",
    "Description",
    "LoadReport",
    "describe",
    "export",
    "load",
    "load_backbone",
]
