"""Writes the weights of a model for users: safetensors in our naming, or the authors' `.pth`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from signal_reid.checkpoints.wrapping import unwrap
from signal_reid.config import Config, dump_config
from signal_reid.methods.signal.model import Signal
from signal_reid.runtime.files import write_file
from signal_reid.upstream.parameters import MODALITIES, ours_to_authors

VERSION = "1"
"""Of our files; a reader refuses what it does not know."""


def export(
    model: nn.Module, path: str | Path, naming: Literal["ours", "authors"] = "ours", config: Config | str | None = None
) -> None:
    """Write a model's weights, atomically.

    Args:
        model: a `Signal`, perhaps wrapped by DistributedDataParallel or torch.compile.
        path: the file to replace.
        naming: `ours` writes safetensors, whose metadata hold the patch grid, the counts of identities and cameras and
            the configuration; `authors` writes the state dict that the authors' code loads.
        config: the configuration to carry along in a file of ours, or its YAML.

    Raises:
        ValueError: another naming, or a model that the authors' code cannot hold.
        OSError: the file cannot be written; what was there before is untouched.
    """
    signal = unwrap(model)
    if naming == "ours":
        content = safetensors.torch.save(_plain(signal.state_dict()), {"format": "pt", **metadata(signal, config)})
        write_file(path, lambda file: file.write(content))
    elif naming == "authors":
        if signal.modalities != len(MODALITIES):
            raise ValueError(f"the authors' model has {len(MODALITIES)} modalities, this one {signal.modalities}")
        state = _plain(ours_to_authors(signal.state_dict()))
        write_file(path, lambda file: torch.save(state, file))
    else:
        raise ValueError(f"naming must be 'ours' or 'authors', got {naming!r}")


def metadata(model: Signal, config: Config | str | None = None) -> dict[str, str]:
    """What a file of ours says about the model: text by name."""
    rows, columns = model.backbone.grid_size
    cameras, classifier = model.backbone.camera_embedding, model.get_parameter("heads.0.classifier.weight")
    said = {
        "signal_reid": VERSION,
        "grid_size": f"{rows} x {columns}",
        "num_identities": str(len(classifier)),
        "num_cameras": str(0 if cameras is None else len(cameras)),
    }
    if config is not None:
        said["config"] = config if isinstance(config, str) else dump_config(config)
    return said


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each tensor with memory of its own."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
