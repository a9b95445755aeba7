"""Bytes that a forward keeps for its backward, and bytes that are alive at once."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from signal_reid.training.module_calls import watching


def _storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


class KeptBytes(AbstractContextManager["KeptBytes"]):
    """Counts what a forward keeps for its backward, each piece of memory once, for the module that keeps it first.

    Neither parameters nor the batch count. Outside of any module it counts for the name of nothing.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]):
        self.by_module: dict[str, int] = defaultdict(int)
        self._seen = _storages(model) | {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self._inside = ""
        self._watch = watching(model, self._enter, self._leave)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self) -> KeptBytes:
        self._watch.__enter__()
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._watch.__exit__(*error)

    def _enter(self, name: str, *_: Any) -> None:
        self._inside = name

    def _leave(self) -> None:
        self._inside = ""

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen and storage.nbytes():
            self._seen.add(storage.data_ptr())
            self.by_module[self._inside] += storage.nbytes()
        return tensor.detach()  # the tensor itself would hold what holds it


@dataclass
class _Live:
    now: int = 0
    peak: int = 0
    storages: set[int] = field(default_factory=set)


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of the tensors that operators give, until nothing holds them; older ones are left out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._live = _Live()
        self._before = _storages(model)

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return self._live.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage(), inputs)
        return result

    def _follow(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        live, key = self._live, storage._cdata
        if key in live.storages or key in inputs or storage.data_ptr() in self._before:
            return
        live.storages.add(key)
        live.now += storage.nbytes()
        live.peak = max(live.peak, live.now)

        def gone(size: int = storage.nbytes()) -> None:
            live.storages.discard(key)
            live.now -= size

        weakref.finalize(storage, gone)
