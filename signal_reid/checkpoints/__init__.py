"""Checkpoints: CLIP's, the authors' and ours in; ours and the authors' out; the state of a run for resuming."""

from signal_reid.checkpoints.errors import CheckpointError
from signal_reid.checkpoints.exporting import export
from signal_reid.checkpoints.loading import Description, LoadReport, describe, load, load_backbone
from signal_reid.checkpoints.training_state import (
    capture_rng,
    load_training_state,
    restore_rng,
    restore_training_state,
    save_training_state,
)

__all__ = [
    "CheckpointError",
    "Description",
    "LoadReport",
    "capture_rng",
    "describe",
    "export",
    "load",
    "load_backbone",
    "load_training_state",
    "restore_rng",
    "restore_training_state",
    "save_training_state",
]
