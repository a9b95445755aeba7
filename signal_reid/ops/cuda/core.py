"""Loads the compiled module `signal_reid._C` and launches its kernels on a tensor's device and stream."""

from __future__ import annotations

import importlib
import importlib.machinery
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from signal_reid.ops.cuda import record
from signal_reid.ops.cuda.record import Record

MOST_BLOCKS = 2**31 - 1  # of one launch, on every GPU
DTYPE_TAGS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum class DType of csrc/runtime.cuh
EMULATED_MULTIPROCESSORS = 4
OLDEST = 50  # the oldest architecture that the kernels compile for
PACKAGE = Path(__file__).parents[2]

_substitute: ModuleType | None = None


@contextmanager
def use(module: ModuleType) -> Iterator[None]:
    """Launch on another build of the native core, such as one that emulates a GPU on host memory."""
    global _substitute
    previous, _substitute = _substitute, module
    try:
        yield
    finally:
        _substitute = previous


def on_host() -> bool:
    """Whether the module in force serves the host's memory: `use` put it in place, or it is built for no GPU."""
    return _substitute is not None or (_reason_against_native() is None and not _native().architectures)


def unavailable_reason(start: bool = False) -> str | None:
    """Why no GPU of this process can run the kernels, in plain words; None when one can.

    Args:
        start: whether GPUs are started to ask them, which initialises CUDA; otherwise only those are asked that this
            process uses already.
    """
    reason = reason_against_build()
    if reason is not None:
        return reason
    if on_host():
        return reason_against_device(0)
    if not torch.cuda.is_available():
        return "this torch sees no GPU"
    reasons = [
        reason_against_device(index) if start or _is_started(index) else None
        for index in range(torch.cuda.device_count())
    ]
    return reasons[0] if all(reasons) else None


def reason_against_device(index: int) -> str | None:
    """Why the kernels cannot run on this GPU, in plain words; None when they can. It is started and asked once."""
    return reason_against_build() or _reason_of(native(), index)


def reason_against_build() -> str | None:
    """Why the native core cannot be called at all, in plain words; None when it can. No GPU is asked."""
    return None if _substitute is not None else _reason_against_native()


def native() -> ModuleType:
    """The compiled module in force.

    Raises:
        ImportError: it was not built, or does not load; see `unavailable_reason`.
    """
    return _substitute if _substitute is not None else _native()


def launch(name: str, tensor: Tensor, fields: dict[str, Any]) -> None:
    """Call a launcher of the native core on the device and current stream of `tensor`.

    Args:
        fields: those of the launcher's struct in csrc/ops.h by name, tensors as addresses; device and stream are added
            to them, and the launcher makes the device current for as long as it runs.

    Raises:
        RuntimeError: in the words of the CUDA runtime.
        TypeError: a field is missing, unknown or of another type.
    """
    fields["device"] = tensor.get_device()  # -1 on the host
    fields["stream"] = stream_of(tensor)
    getattr(native(), name)(fields)


def stream_of(tensor: Tensor) -> int:
    """The address of the stream that PyTorch currently uses on the tensor's device; 0 on the host."""
    if not tensor.is_cuda:
        return 0
    # A tenth of the time of torch.cuda.current_stream.
    return int(torch._C._cuda_getCurrentRawStream(tensor.get_device()))


def dtype_tag(tensor: Tensor) -> int:
    """The native core's number of the tensor's dtype, which must be one of `DTYPE_TAGS`."""
    return DTYPE_TAGS[tensor.dtype]


@cache
def multiprocessors(device: int) -> int:
    """Number of multiprocessors of a device, or of the emulated one where the device's number is -1."""
    return EMULATED_MULTIPROCESSORS if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


@cache
def _native() -> ModuleType:
    reason = _reason_against_use()
    if reason is not None:
        raise ImportError(reason)
    return importlib.import_module("signal_reid._C")


@cache
def _reason_against_native() -> str | None:
    reason = _reason_against_use()
    if reason is not None:
        return reason
    try:
        _native()
    except ImportError as error:
        return f"the native core does not load: {error}"
    return None


def _reason_against_use() -> str | None:
    """Why the compiled module is not to be loaded, in plain words; None when it is there and fits."""
    # In this very package: what an editable installation of another checkout adds to the import system finds its own.
    found = importlib.machinery.PathFinder.find_spec("signal_reid._C", [str(PACKAGE)])
    build = record.read(PACKAGE)
    if found is None or found.origin is None:
        why = "" if build is None else f" ({build.reason or 'it was, and is no longer there'})"
        return f"the native core is not built{why}; to insist on it, {_again()}"
    return record.reason_against(Path(found.origin), build)


@cache
def _reason_of(module: ModuleType, index: int) -> str | None:
    """What a build of the native core finds on a GPU; the emulator is built for none and asked all the same."""
    reason = None
    if module.architectures:
        capability = torch.cuda.get_device_capability(index)
        reason = _reason_against_capability(module.architectures, capability, record.read(PACKAGE))
    return reason or module.probe(index)


def _is_started(index: int) -> bool:
    """Whether this process uses a GPU already."""
    return torch.cuda.is_initialized() and torch._C._cuda_hasPrimaryContext(index)  # type: ignore[attr-defined]


def _reason_against_capability(
    architectures: tuple[str, ...], capability: tuple[int, int], build: Record | None
) -> str | None:
    """Why kernels built for these cannot run there; the PTX of the oldest is compiled for any newer device."""
    wanted = 10 * capability[0] + capability[1]
    if wanted >= min(map(int, architectures)):
        return None
    reason = f"the native core is built for {', '.join(f'sm_{a}' for a in architectures)}, this GPU is sm_{wanted}"
    if wanted < OLDEST:
        return f"{reason}, and the kernels need sm_{OLDEST} or newer"
    known, nvcc = (build.known, build.nvcc) if build is not None and build.known else (("75",), "13")
    fit = max((int(a) for a in known if int(a) <= wanted), default=None)
    if fit is None:
        again = _again(f"SIGNAL_REID_CUDA_ARCHS={wanted} ")
        return f"{reason}; nvcc {nvcc} does not compile for that, nvcc 12 does: with its CUDA_HOME, {again}"
    # Those that it is built for stay, as a newer GPU would run what is compiled for the oldest.
    wider = ";".join(map(str, sorted({fit, *map(int, architectures)})))
    return f"{reason}; {_again(f'SIGNAL_REID_CUDA_ARCHS={wider!r} ')}"


def _again(settings: str = "") -> str:
    """How to build the core anew: pip alone would take the wheel that it keeps, or leave the same version in place."""
    command = "pip install --no-cache-dir --force-reinstall --no-deps ..."
    return f"install again: {settings}SIGNAL_REID_BUILD_CUDA=1 {command}"
