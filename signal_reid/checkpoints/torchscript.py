"""The tensors of a TorchScript archive, read without running anything that the archive holds."""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_TYPED_CONTAINERS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
"""How the archive marks lists and dictionaries among a module's attributes, such as a convolution's padding."""


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether the archive was written by `torch.jit.save`; `torch.save` writes no constants."""
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Read the parameters and buffers of the scripted module.

    `torch.load(weights_only=True)` refuses these archives, and `torch.jit.load` compiles the program inside, which may
    then run operators that touch files. The weights alone need neither: the archive's pickle is a tree of modules and
    tensors. Here it is unpickled with every class replaced by an inert stand-in, so a file can hold at worst wrong
    numbers; a pickle that asks for anything else is refused.

    Args:
        archive: the opened archive.

    Returns:
        Tensors by dotted name, as `state_dict()` of the loaded module would name them.

    Raises:
        pickle.UnpicklingError: the archive asks for a class or function that a tree of tensors does not need.
    """
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder").decode() != sys.byteorder:
        raise pickle.UnpicklingError(f"its byte order is not this machine's ({sys.byteorder})")
    with archive.open(f"{root}data.pkl") as file:
        module = _Unpickler(file, archive, root).load()
    if not isinstance(module, _Module):
        raise pickle.UnpicklingError("it holds no module")
    return dict(_tensors(module, "", set()))


class _Module:
    """Stands in for every scripted class: keeps its attributes, runs nothing."""

    attributes: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in _TYPED_CONTAINERS:
            return _container
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not part of a tree of tensors")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _container(content: Any, *_: Any) -> Any:
    return content


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _tensors(module: _Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Each module is entered once, so that a cycle or a shared module in a hostile archive ends."""
    seen.add(id(module))
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module) and id(value) not in seen:
            yield from _tensors(value, f"{prefix}{name}.", seen)
