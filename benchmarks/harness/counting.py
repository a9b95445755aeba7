"""Counts what PyTorch dispatches: operators that do work, and those that make the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from signal_reid.methods.signal.global_alignment import GlobalAlignment
from signal_reid.methods.signal.local_alignment import LocalAlignment
from signal_reid.methods.signal.selective_interaction import TokenSelection
from signal_reid.ops import backend, gramian, library, use_backend
from signal_reid.ops.cuda import core

from .op_steps import CHANNELS, GRID, K_INTRA, MODALITIES
from .upstream import Upstream

LAUNCHES = {
    "select_tokens": 1,
    "gramian_volume": 1,
    "gramian_volume_backward": 2,
    "gramian_loss": 2,  # 3 above a batch of 256
    "gramian_loss_backward": 2,
    "deformable_sample": 1,
    "deformable_sample_backward": 1,
    "offset_head": 1,
    "offset_head_backward": 2,
    "pairwise_error": 2,  # ours, then a sum of PyTorch's
    "pairwise_error_backward": 1,
    "add_layer_norm": 1,
    "layer_norm": 1,
    "add_layer_norm_backward": 2,  # ours, then a sum of PyTorch's
    "attend_masked": 1,  # and a second where samples are so few that each takes several blocks
    "attend_masked_backward": 1,  # likewise
    "quick_gelu": 1,
    "quick_gelu_backward": 1,
}
"""Kernels that each library operator starts in the native core, as stated with its launchers.

The other library operators have none there: they are the operators of PyTorch that they call.
"""
# What they return is what they got, storage that nothing has written, or no tensor.
WITHOUT_WORK = {
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::promote_types",
}
COPIES_OF_NUMBERS = {"aten::lift_fresh"}  # a number that becomes a tensor, on a GPU copied there
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


@dataclass
class Count:
    """Operators that PyTorch dispatched, views left out; those that wait for the device; kernels of all of them."""

    operators: int = 0
    syncs: int = 0
    launches: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self, result: Count):
        super().__init__()
        self.result = result

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "signal_reid" and name not in LAUNCHES:
            with self:
                return library.ENTRIES[name](*args, **(kwargs or {}))
        if _works(function):
            self.result.operators += 1
            self.result.launches += LAUNCHES[name] if namespace == "signal_reid" else 1
        self.result.syncs += _waits(function, args)
        return function(*args, **(kwargs or {}))


class StandIn:
    """Takes the calls of the native core and does nothing, or passes them on to it; it needs no GPU for either."""

    architectures = ()

    def __init__(self, native: Any = None):
        self._native = native

    def probe(self, device: int) -> None:
        """No device is asked, as none is used."""

    def __getattr__(self, launcher: str) -> Any:
        function = getattr(self._native, launcher) if self._native is not None else lambda *_, **__: 0
        setattr(self, launcher, function)  # found without a detour from now on
        return function


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Serve every tensor as one on a GPU, by launchers that do nothing: what is counted is right, results are not."""
    with (
        mock.patch.object(backend, "preference", return_value=("cuda", "reference")),
        mock.patch.object(gramian, "known_value", return_value=None),  # of a tensor on a GPU nothing is known
        core.use(StandIn()),  # type: ignore[arg-type]
        use_backend("auto"),
    ):
        yield


def count(step: Callable[[], object]) -> Count:
    """What one call of a function dispatches; PyTorch's own operators count as one launch each."""
    result = Count()
    with _Counter(result):
        step()
    return result


def _works(function: Any) -> bool:
    name = function._schema.name
    view = function.is_view and name not in COPIES_OF_NUMBERS
    return not view and name not in WITHOUT_WORK and not name.startswith("prim::")


def _waits(function: Any, args: Sequence[Any]) -> bool:
    """Indexing by a mask has to know how many there are."""
    name = function._schema.name
    by_mask = name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return name in WAITING or by_mask


def count_modules(batch: int, upstream: Upstream | None) -> list[dict[str, Any]]:
    """Rows for the forward of selection, GAM and LAM, ours and the authors'."""
    tokens, cls = torch.randn(batch, MODALITIES, GRID[0] * GRID[1], CHANNELS), torch.randn(batch, MODALITIES, CHANNELS)
    ours = {
        "selection": partial(TokenSelection(CHANNELS, K_INTRA), tokens, cls),
        "GAM": partial(GlobalAlignment(), tokens),
        "LAM": partial(LocalAlignment(CHANNELS, MODALITIES, GRID), tokens),
    }
    sides: dict[str, Mapping[str, Callable[[], object]]] = {"ours": ours}
    if upstream is not None:
        sides = {"upstream": _upstream_modules(upstream, tokens, cls), **sides}
    rows = []
    with torch.no_grad():
        for name in ours:
            for label, calls in sides.items():
                with as_on_a_gpu() if label == "ours" else nullcontext():
                    found = count(calls[name])
                row = {"module": name, "implementation": label, "operators": found.operators, "syncs": found.syncs}
                rows.append(row | ({"launches": found.launches} if label == "ours" else {}))
    return rows


def _upstream_modules(upstream: Upstream, tokens: Tensor, cls: Tensor) -> dict[str, Callable[[], object]]:
    x, alignment = [part.contiguous() for part in tokens.unbind(1)], upstream.alignment(GRID)
    selection = upstream.modules["interaction"].TokenSelection(CHANNELS, K_INTRA)
    return {
        "selection": partial(selection, *x, *cls.unbind(1)),
        "GAM": partial(alignment.Cls_Align, *x),
        "LAM": partial(alignment.patch_Align, *x),
    }
