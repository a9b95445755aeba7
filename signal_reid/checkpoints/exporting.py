"""Writes the weights of a model for users: safetensors in our naming, or the file of another program."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from signal_reid.checkpoints.wrapping import unwrap
from signal_reid.config import Config, dump_config
from signal_reid.methods.base import Method
from signal_reid.runtime import tensor_files
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_file

VERSION = "1"
"""Version of our files; a reader refuses what it does not know."""


def export(model: nn.Module, path: str | Path, naming: str = "ours", config: Config | str | None = None) -> None:
    """Write a model's weights, atomically.

    Args:
        model: a method's model, perhaps wrapped by DistributedDataParallel or torch.compile.
        path: the file to replace.
        naming: `ours` writes safetensors, whose metadata hold the method, the patch grid, the counts of identities and
            cameras and the configuration; another one that the method can write, such as Signal's `authors`, writes
            the state dict that the other program loads.
        config: the configuration to carry along in a file of ours, or its YAML.

    Raises:
        ValueError: another naming, or a model that the other program cannot hold.
        OSError: the file cannot be written; what was there before is untouched.
    """
    inner = unwrap(model)
    if naming == "ours":
        content = tensor_files.serialise(_plain(inner.state_dict()), {"format": "pt", **metadata(inner, config)})
        write_file(path, lambda file: file.write(content))
        return
    writers = {known.name: known.from_ours for known in type(inner).namings if known.from_ours is not None}
    if naming not in writers:
        allowed = " or ".join(map(repr, ("ours", *writers)))
        raise InputError(f"naming must be {allowed}, got {naming!r}")
    state = _plain(writers[naming](inner.state_dict()))
    write_file(path, lambda file: torch.save(state, file))


def metadata(model: Method, config: Config | str | None = None) -> dict[str, str]:
    """What a file of ours says about the model: text by name."""
    rows, columns = model.backbone.grid_size
    cameras = model.backbone.camera_embedding
    said = {
        "signal_reid": VERSION,
        "method": model.method,
        "grid_size": f"{rows} x {columns}",
        "num_identities": str(model.num_identities),
        "num_cameras": str(0 if cameras is None else len(cameras)),
    }
    if config is not None:
        said["config"] = config if isinstance(config, str) else dump_config(config)
    return said


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each tensor with memory of its own."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
