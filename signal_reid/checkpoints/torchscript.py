"""The tensors of a TorchScript archive, read without running anything that the archive holds."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator

from torch import Tensor

from signal_reid.checkpoints.archive import Archive
from signal_reid.checkpoints.unpickling import Module, Unpickler


def is_torchscript(archive: Archive) -> bool:
    """Whether the archive was written by `torch.jit.save`; `torch.save` writes no constants."""
    return archive.holds("constants.pkl")


def read_torchscript(archive: Archive) -> dict[str, Tensor]:
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
    content = archive.read("data.pkl")
    module = Unpickler(io.BytesIO(content), len(content), archive.storage, scripted=True).load()
    if not isinstance(module, Module):
        raise pickle.UnpicklingError("it holds no module")
    return dict(_tensors(module, "", set()))


def _tensors(module: Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Each module is entered once, so that a cycle or a shared module in a hostile archive ends."""
    seen.add(id(module))
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Module) and id(value) not in seen:
            yield from _tensors(value, f"{prefix}{name}.", seen)
