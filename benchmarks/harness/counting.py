"""Counts what a call does on a GPU: kernels launched, bytes moved, operations, and waits of the host. It needs no GPU.

PyTorch's dispatcher says which operators run, on which tensors; a launcher of the native core says which kernels it
starts. Counted this way, an operator of PyTorch is one launch, which is the least that it takes, and moves each of its
tensors once. Workspaces that a launcher asks for are left out. The tensors need no values: see `without_values`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from signal_reid.ops import backend, gramian, library, use_backend
from signal_reid.ops.cuda import core

LAUNCHES: dict[str, int | Callable[[Mapping[str, Any]], int]] = {
    "select_tokens": lambda fields: 1 if fields["splits"] == 1 else 2,
    "gramian_volume": 1,
    "gramian_volume_backward": 2,
    "gramian_loss": lambda fields: 2 if fields["B"] <= 256 else 3,
    "gramian_loss_backward": 2,
    "deformable_sample": 1,
    "deformable_sample_backward": 1,
    "offset_head": 1,
    "offset_head_backward": 2,
    "pairwise_error": 1,
    "pairwise_error_backward": 1,
    "add_layer_norm": 1,
    "add_layer_norm_backward": 1,
    "attend_masked": lambda fields: 1 if fields["splits"] == 1 else 2,
    "attend_masked_backward": lambda fields: 1 if fields["splits"] == 1 else 2,
    "quick_gelu": 1,
    "quick_gelu_backward": 1,
}
"""Kernels that each launcher of the native core starts, given the fields of its struct, as stated with it."""
LAUNCHES_OF_PYTORCH = {"aten::native_layer_norm_backward": 2}  # the rows' gradient, then that of weight and bias
KEPT = 0.95
"""Share of the tokens that a selection keeps, where a mask has no values."""
# What they return is what they got, storage that nothing has written, or no tensor.
WITHOUT_WORK = {
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::promote_types",
}
COPIES_OF_NUMBERS = {"aten::lift_fresh"}  # a number that becomes a tensor, on a GPU copied there
OVERWRITING = {"aten::copy_", "aten::zero_", "aten::fill_", "aten::_foreach_copy_"}
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


@dataclass
class Work:
    """One operator of PyTorch, or one call of a launcher.

    Attributes:
        launches: kernels.
        moved: bytes read and written.
        operations: additions and multiplications.
        on_tensor_cores: whether those are the products of 16-bit matrices, PyTorch's or those of `ON_TENSOR_CORES`.
    """

    name: str
    launches: int
    moved: int
    operations: int = 0
    on_tensor_cores: bool = False


@dataclass
class Count:
    """What a call did: the operators that PyTorch dispatched, views left out, and waits of the host for the device."""

    work: list[Work] = field(default_factory=list)
    operators: int = 0
    syncs: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.work + other.work, self.operators + other.operators, self.syncs + other.syncs)

    @property
    def launches(self) -> int:
        return sum(work.launches for work in self.work)

    @property
    def moved(self) -> int:
        return sum(work.moved for work in self.work)

    @property
    def operations(self) -> int:
        return sum(work.operations for work in self.work)


class _Counter(TorchDispatchMode):
    def __init__(self, result: Count):
        super().__init__()
        self.result = result

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "signal_reid":
            return self._look_inside(name, args, kwargs)
        if namespace == "aten":
            with self:  # inside an operator of ours, those of PyTorch arrive before they are taken apart
                output = function.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = function(*args, **kwargs)
        if _works(function):
            self.result.operators += 1
            self.result.work.append(_work_of_pytorch(function, args, kwargs, output))
        self.result.syncs += _waits(function, args)
        return output

    def _look_inside(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Count an operator of ours as its launches and as what it calls; it moves its tensors if it launches."""
        before = StandIn.launches
        inner, self.result.work = self.result.work, []
        with self:
            output = library.ENTRIES[name](*args, **kwargs)
        inner, self.result.work = self.result.work, inner
        launches = StandIn.launches - before - _ours(inner)
        if launches:
            self.result.operators += 1
            moved = MOVED.get(name, _bytes_of_all)(args, output)
            operations = OPERATIONS.get(name, _none)(*args)
            low = name in ON_TENSOR_CORES and args[0].dtype in (torch.float16, torch.bfloat16)
            work = Work(f"signal_reid::{name}", launches, moved, operations, low)
            self.result.work.append(work)
        self.result.work += inner
        return output


class StandIn:
    """Takes the calls of the native core and does nothing, or passes them on to it; it needs no GPU for either.

    Attributes:
        launches: kernels that all launchers of stand-ins would have started so far, but for calls that are passed on.
    """

    architectures = ()
    launches = 0

    def __init__(self, native: Any = None):
        self._native = native

    def probe(self, device: int) -> None:
        """No device is asked, as none is used."""

    def __getattr__(self, launcher: str) -> Any:
        function = getattr(self._native, launcher) if self._native is not None else partial(self._take, launcher)
        setattr(self, launcher, function)  # found without a detour from now on
        return function

    def _take(self, launcher: str, fields: Any = None, **sizes: int) -> int:
        if isinstance(fields, Mapping):  # else it asks for the size of a workspace
            launches = LAUNCHES[launcher]
            StandIn.launches += launches if isinstance(launches, int) else launches(fields)
        return 0


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


@contextmanager
def without_values() -> Iterator[FakeTensorMode]:
    """Tensors made inside have shapes and dtypes, and no values: what works on them takes no time to speak of."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, mock.patch.object(Tensor, "data_ptr", return_value=0):
        yield mode


def count(step: Callable[[], object]) -> Count:
    """What one call of a function dispatches."""
    result = Count()
    with _Counter(result):
        step()
    return result


def profiled_launches(step: Callable[[], object]) -> int:
    """Kernels, copies and fills that one call starts on the GPU, as PyTorch's profiler sees them."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of the elements that lie in memory: an expanded tensor has fewer than its shape says."""
    return sum(
        math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0) * x.element_size()
        for x in tensors
    )


def _tensors(*values: Any) -> list[Tensor]:
    return list({id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}.values())


def _bytes_of_all(args: Sequence[Any], output: Any) -> int:
    return bytes_of(*_tensors(args, output))


def _ours(work: Sequence[Work]) -> int:
    return sum(part.launches for part in work if part.name.startswith("signal_reid::"))


def _none(*arguments: Any) -> int:
    return 0


def _work_of_pytorch(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Work:
    name = function._schema.name
    moved = bytes_of(*_tensors(args, kwargs, output))
    if name not in OVERWRITING:  # what is worked on in place is read and written
        parameters = zip(args, function._schema.arguments, strict=False)
        moved += bytes_of(*_tensors([x for x, a in parameters if a.alias_info is not None and a.alias_info.is_write]))
    formula = flop_registry.get(function.overloadpacket)
    operations = formula(*args, **kwargs, out_val=output) if formula else 0
    low = formula is not None and _tensors(args)[0].dtype in (torch.float16, torch.bfloat16)
    launches = LAUNCHES_OF_PYTORCH.get(name, 1)
    if name == "aten::baddbmm" and kwargs.get("beta", 1) != 0:
        launches += 1  # what is added to is copied into the result first
    return Work(name, launches, moved, operations, low)


def _works(function: Any) -> bool:
    name = function._schema.name
    view = function.is_view and name not in COPIES_OF_NUMBERS
    return not view and name not in WITHOUT_WORK and not name.startswith("prim::")


def _waits(function: Any, args: Sequence[Any]) -> bool:
    """Indexing by a mask has to know how many there are."""
    name = function._schema.name
    by_mask = name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return name in WAITING or by_mask


def kept_tokens(mask: Tensor) -> int:
    """How many tokens a mask keeps; without values `KEPT` of them."""
    return int(KEPT * mask.numel()) if isinstance(mask, FakeTensor) else int(mask.sum())


def _share_kept(mask: Tensor) -> float:
    return kept_tokens(mask) / max(1, mask.numel())


def _of_masked_attention(args: Sequence[Any], output: Any) -> int:
    """Tokens that were dropped, and their logits, are not read."""
    tokens, mask = next((x, y) for x, y in pairwise(args) if y.dtype == torch.bool)
    logits = _tensors(output[1], args[5:])[:1]
    dropped = 1 - _share_kept(mask)
    return _bytes_of_all(args, output) - int(dropped * bytes_of(tokens, *logits))


def _of_sampling(args: Sequence[Any], output: Any) -> int:
    """Four tokens around each point are read."""
    tokens, offsets = args[-5:-3] if isinstance(args[-5], Tensor) else args[:2]
    read = min(bytes_of(tokens), 4 * offsets.numel() * tokens.shape[-1] * tokens.element_size())
    return _bytes_of_all(args, output) - bytes_of(tokens) + read


MOVED: dict[str, Callable[[Sequence[Any], Any], int]] = {
    "attend_masked": _of_masked_attention,
    "attend_masked_backward": _of_masked_attention,
    "deformable_sample": _of_sampling,
    "deformable_sample_backward": _of_sampling,
}
"""Bytes of library operators whose kernels do not read every input whole, from their arguments and results."""


def _products_of_selection(tokens: Tensor, *_: Any) -> int:
    return 2 * tokens.numel() * tokens.shape[1]


def _products_of_masked_attention(*args: Any) -> int:
    queries, tokens, mask = args[:3] if len(args) == 3 else args[1:4]
    products = 2 if len(args) == 3 else 4
    return int(products * 2 * _share_kept(mask) * tokens.numel() * queries.shape[1])


def _products_of_volumes(features: Tensor, others: int, passes: int) -> int:
    """Projections of every pair on an orthonormal basis of the others."""
    return passes * 2 * features.shape[0] ** 2 * others * features.shape[-1]


OPERATIONS: dict[str, Callable[..., int]] = {
    "select_tokens": _products_of_selection,
    "attend_masked": _products_of_masked_attention,
    "attend_masked_backward": _products_of_masked_attention,
    "gramian_loss": lambda features, *_: _products_of_volumes(features, features.shape[1] - 1, 1),
    "gramian_loss_backward": lambda features, *_: _products_of_volumes(features, features.shape[1] - 1, 3),
    "gramian_volume": lambda anchor, others: _products_of_volumes(anchor, len(others), 1),
    "gramian_volume_backward": lambda grad, anchor, others: _products_of_volumes(anchor, len(others), 3),
}
"""Additions and multiplications of library operators that do more than a few for each number that they read."""

ON_TENSOR_CORES = {"attend_masked", "attend_masked_backward"}
"""Library operators whose kernels multiply on tensor cores in fp16 and bf16."""
