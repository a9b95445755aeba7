"""What a training state must be before any of it is loaded: an optimizer's kernels trust the tensors they are given."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from signal_reid.checkpoints.errors import CheckpointError

_OF_THE_MACHINE = ("fused", "foreach", "capturable", "differentiable")
"""What a parameter group says of how it is computed, which the running optimizer decides."""
_SCALER = {
    "scale": float,
    "growth_factor": float,
    "backoff_factor": float,
    "growth_interval": int,
    "_growth_tracker": int,
}
_MT19937 = struct.Struct("<QiiQ")  # seed, draws left in the block, whether seeded, place in the block
_MT19937_BYTES = 5056
_MT19937_BLOCK = 624
_CUDA_RNG_BYTES = 16  # seed and offset


def check_model(wanted: Mapping[str, Tensor], given: Mapping[Any, Any]) -> None:
    """Check that the entries of a saved model are those of the model: names, shapes and kinds of numbers.

    Raises:
        CheckpointError: they are of another model.
    """
    names = sorted(map(str, wanted.keys() | given.keys()))
    different = [name for name in names if not _alike(wanted.get(name), given.get(name))]
    if different:
        raise CheckpointError(
            f"the training state is of another model: {len(different)} entries differ, first {different[0]}"
        )


def checked_optimizer(optimizer: torch.optim.Optimizer, given: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of an optimizer, every tensor of it held against the parameter that it belongs to.

    Args:
        optimizer: the one to load into.
        given: what its `state_dict` was when it was saved.

    Returns:
        What `load_state_dict` takes: the saved moments and settings; how a step is computed (fused or not) stays as
        the optimizer has it.

    Raises:
        CheckpointError: other parameter groups or settings, or a tensor of another shape, dtype or layout in memory.
    """
    own = optimizer.state_dict()
    groups = _groups(own["param_groups"], given.get("param_groups"))
    state = given.get("state")
    if not isinstance(state, dict):
        raise CheckpointError("the optimizer's state in the training state is damaged")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = _state_names(optimizer)
    seen: set[int] = set()
    for index, entries in state.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(entries, dict):
            raise CheckpointError(f"the optimizer's state in the training state is of no parameter: {index!r:.40}")
        if entries and names is not None and set(entries) != names:
            raise CheckpointError(
                f"the optimizer's state of parameter {index} must hold {', '.join(sorted(names))}, "
                f"got {', '.join(sorted(map(str, entries)))[:120]}"
            )
        for name, value in entries.items():
            problem = _problem(name, value, parameters[index], seen)
            if problem is not None:
                raise CheckpointError(f"the optimizer's {str(name)[:40]} of parameter {index} {problem}")
    return {"state": state, "param_groups": groups}


def check_scaler(given: Mapping[str, Any]) -> None:
    """Check the saved state of a gradient scaler.

    Raises:
        CheckpointError: it is damaged.
    """
    for name, kind in _SCALER.items():
        value = given.get(name)
        if value is None or not _is_number(value, kind) or value < (0 if name == "_growth_tracker" else 1e-30):
            raise CheckpointError(f"the gradient scaler's {name.strip('_')} in the training state is damaged")


def check_rng(rng: Mapping[str, Any]) -> None:
    """Check the saved states of the random generators, which PyTorch reads beyond their end where they lie.

    Raises:
        CheckpointError: they are damaged.
    """
    cuda = rng.get("cuda")
    if not _is_cpu_rng(rng.get("cpu")):
        raise CheckpointError("the state of the CPU's random generator in the training state is damaged")
    if not isinstance(cuda, list) or not all(_is_bytes(state, _CUDA_RNG_BYTES) for state in cuda):
        raise CheckpointError("the state of a GPU's random generator in the training state is damaged")


def _alike(wanted: Tensor | None, given: Any) -> bool:
    if wanted is None or not isinstance(given, Tensor):
        return False
    return wanted.shape == given.shape and wanted.dtype == given.dtype and given.layout == torch.strided


def _groups(own: list[dict[str, Any]], given: Any) -> list[dict[str, Any]]:
    """The saved groups with the settings that are the machine's as the optimizer has them."""
    members = [group["params"] for group in own]
    if not isinstance(given, list) or not all(isinstance(group, dict) for group in given):
        raise CheckpointError("the optimizer's parameter groups in the training state are damaged")
    theirs = [group.get("params") for group in given]
    if not all(_is_numbers(numbers) for numbers in theirs) or theirs != members:
        raise CheckpointError("the training state is of an optimizer with other parameter groups")
    return [_group(ours, group) for ours, group in zip(own, given, strict=True)]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _group(own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    settings = [name for name in own if name != "params" and name not in _OF_THE_MACHINE]
    for name in settings:
        if not _fits(own[name], given.get(name, own[name])):
            raise CheckpointError(f"the optimizer's setting {name} in the training state cannot be {given[name]!r:.60}")
    return {**own, **{name: given[name] for name in settings if name in given}}


def _fits(own: Any, given: Any) -> bool:
    """Whether a setting may be loaded: a number for a number, and what chooses the formula as it is."""
    if isinstance(own, tuple):
        return isinstance(given, (list, tuple)) and len(given) == len(own) and all(map(_fits, own, given))
    return _is_number(given, float) if _is_number(own, float) else type(given) is type(own) and given == own


def _state_names(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """What the optimizer keeps of a parameter; none where it is not known."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        amsgrad = any(group["amsgrad"] for group in optimizer.param_groups)
        return {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())
    return {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else None


def _problem(name: str, value: Any, parameter: nn.Parameter, seen: set[int]) -> str | None:
    """Why an entry of the optimizer's state cannot be used with a parameter; none if it can."""
    if value is None and name == "momentum_buffer":  # SGD before its first step
        return None
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return f"must be a tensor, got {type(value).__name__}"
    if name == "step":
        if value.ndim or value.dtype != torch.float32 or not (value.isfinite() and value >= 0):
            return f"must be one float32 number from 0, got {_described(value)}"
        return None
    if value.shape != parameter.shape or value.dtype != parameter.dtype:
        return f"must be {_described(parameter)} as the parameter, got {_described(value)}"
    if _strides(value) != _strides(parameter) or value.untyped_storage().nbytes() < value.numel() * value.itemsize:
        return "does not lie in memory as the parameter does"
    if value.numel():  # two that share their memory would be averaged into each other
        address = value.untyped_storage().data_ptr()
        if address in seen:
            return "shares its memory with another"
        seen.add(address)
    return None


def _strides(value: Tensor) -> list[int]:
    """Strides of the dimensions that are stepped along."""
    return [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _is_number(value: Any, kind: Callable[..., Any]) -> bool:
    """Whether it is a finite number, whole where `kind` is int."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    return abs(value) < 2**63 and math.isfinite(value)


def _is_bytes(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape == (size,) and value.is_contiguous()


def _is_cpu_rng(value: Any) -> bool:
    """Whether PyTorch may draw from this state: it does not hold the place in a block against the block's end."""
    if not _is_bytes(value, _MT19937_BYTES):
        return False
    _, left, seeded, place = _MT19937.unpack_from(value.cpu().numpy().tobytes())
    return seeded == 1 and 1 <= left <= _MT19937_BLOCK and place + left <= _MT19937_BLOCK + 1


def numbers(progress: Mapping[str, Any], fields: Mapping[str, type]) -> Iterator[tuple[str, Any]]:
    """The named numbers of a saved position.

    Raises:
        CheckpointError: one is missing or is none.
    """
    for name, kind in fields.items():
        value = progress.get(name)
        if value is None or not _is_number(value, kind) or (kind is int and value < 0):
            raise CheckpointError(f"the progress in the training state is damaged: {name} is {value!r:.60}")
        yield name, value


def within_epoch(progress: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """The steps done of an unfinished epoch and the sums of their losses.

    Raises:
        CheckpointError: they are damaged.
    """
    _, within = next(numbers(progress, {"within": int}))
    sums = progress.get("sums")
    if not isinstance(sums, dict) or not all(isinstance(name, str) for name in sums):
        raise CheckpointError(f"the progress in the training state is damaged: sums is {sums!r:.60}")
    return within, {name: float(value) for name, value in numbers(sums, dict.fromkeys(sums, float))}
