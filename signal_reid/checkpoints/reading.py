"""Files of tensors, whatever wrote them, read without running code that they hold."""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from torch import Tensor

from signal_reid.checkpoints.archive import Archive
from signal_reid.checkpoints.errors import CheckpointError
from signal_reid.checkpoints.legacy import read_legacy
from signal_reid.checkpoints.torchscript import is_torchscript, read_torchscript
from signal_reid.checkpoints.unpickling import Unpickler
from signal_reid.runtime import tensor_files
from signal_reid.runtime.text import read_json, shortened, shown
from signal_reid.runtime.troubles import ran_out_of_memory

DIRECTORY_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What is looked for, in this order, in a directory and in a repository on the hub."""

_INDEX = ".index.json"
_LONGEST_CONFIGURATION = 1 << 20  # bytes
_NESTED = ("state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")
_PLAIN = (bool, int, float, str, type(None))


class Contents(NamedTuple):
    """What a file holds."""

    origin: str
    """The file, as errors name it."""
    state: dict[str, Tensor]
    """Tensors by name, without the prefixes of wrappers (`module.` of DDP, `_orig_mod.` of torch.compile)."""
    metadata: dict[str, str]
    """Text that our files carry along; empty for others."""
    path: Path | None = None
    """Where the file lies; none for a state dict."""


def read_configuration(contents: Contents, name: str) -> Mapping[str, Any] | None:
    """What a JSON file beside the weights says; none where there is none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = None if contents.path is None else contents.path.parent / name
    if path is None or not path.is_file():
        return None
    try:
        described = read_json(path.read_bytes()) if path.stat().st_size <= _LONGEST_CONFIGURATION else None
    except ValueError:
        described = None
    if not isinstance(described, dict):
        raise CheckpointError(f"{path}: damaged, not the configuration of a model")
    return described


def read(source: str | Path | Mapping[str, Any]) -> Contents:
    """Read a checkpoint of any kind.

    Args:
        source: a safetensors file, a file of `torch.save` or `torch.jit.save`, the index of a sharded checkpoint, a
            directory that holds one of these under its usual name, or a state dict.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, is no checkpoint, or holds Python objects besides tensors.
    """
    if isinstance(source, Mapping):
        return _contents("the state dict", source, {})
    path = _file(Path(source))
    if path.name.endswith(_INDEX):
        return _contents(str(path), _read_shards(path), {})._replace(path=path)
    objects, metadata = _read_file(path)
    return _contents(str(path), objects, metadata)._replace(path=path)


def load_objects(path: Path) -> Any:
    """What `torch.save` wrote, tensors and plain Python values only; every record is held against its checksum.

    Raises:
        CheckpointError: the file is damaged, or holds other Python objects.
        MemoryError: there is too little memory for it.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        return _read_zip(path) if zipped else read_legacy(path)
    except Exception as error:
        if ran_out_of_memory(error):
            raise MemoryError(str(error)) from None
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the machine's; a damaged place is not one
            raise
        raise _unreadable(path, error) from None


def _file(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    if not path.is_dir():
        return path
    for name in DIRECTORY_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"checkpoint: directory {path} holds none of {', '.join(DIRECTORY_FILES)}")


def _read_file(path: Path) -> tuple[Any, dict[str, str]]:
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    if start[8:] == b"{":  # first: the length before it may begin as the others do
        return _read_safetensors(path)
    if start.startswith((b"PK", b"\x80")):
        return load_objects(path), {}
    raise CheckpointError(f"{path}: not a checkpoint (neither safetensors nor written by torch.save)")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return tensor_files.read(path)
    except tensor_files.DamagedFileError as error:
        raise CheckpointError(str(error)) from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: the safetensors file is truncated or damaged ({_line(error)})") from None


def _read_zip(path: Path) -> Any:
    with Archive(path) as archive:
        archive.check_byte_order()
        if is_torchscript(archive):
            objects: Any = read_torchscript(archive)
        else:
            content = archive.read("data.pkl")
            objects = Unpickler(io.BytesIO(content), len(content), archive.storage).load()
        archive.check_rest()
        return objects


def _read_shards(path: Path) -> dict[str, Tensor]:
    try:
        files = sorted(set(read_json(path.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: not the index of a sharded checkpoint (no weight_map)") from None
    state: dict[str, Tensor] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not _may_name_a_file(name):
            raise CheckpointError(f"{path}: shards must lie beside the index, got {shown(name)}")
        if name.endswith(_INDEX):
            raise CheckpointError(f"{path}: its shard {shortened(name)} is an index itself")
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path}: its shard {shortened(name)} is missing")
        state |= read(path.parent / name).state
    return state


def _may_name_a_file(name: str) -> bool:
    return "\0" not in name and len(name.encode(errors="surrogatepass")) <= 255


def _contents(origin: str, objects: Any, metadata: dict[str, str]) -> Contents:
    if isinstance(objects, Mapping):
        if isinstance(stored := objects.get("metadata"), Mapping):
            metadata = {key: value for key, value in stored.items() if isinstance(key, str) and isinstance(value, str)}
        nested = next((objects[key] for key in _NESTED if isinstance(objects.get(key), Mapping)), None)
        objects = objects if nested is None else nested
    if not isinstance(objects, Mapping):
        raise CheckpointError(f"{origin}: not a state dict but {type(objects).__name__}")
    if not objects:
        raise CheckpointError(f"{origin}: holds no tensors")
    if any(isinstance(value, Tensor) for value in objects.values()):  # numbers that a trainer keeps beside its weights
        objects = {name: value for name, value in objects.items() if type(value) not in _PLAIN}
    for name, value in objects.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{origin}: not a state dict, {name!r:.60} is {type(value).__name__} and not a tensor"
            )
    return Contents(origin, _unwrapped(dict(objects)), metadata)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked is not None:
        return CheckpointError(
            f"{path}: holds the Python object {asked[1]} besides tensors, and is not read because that could run code"
        )
    return CheckpointError(f"{path}: truncated, damaged, or not a checkpoint ({_line(error)})")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
