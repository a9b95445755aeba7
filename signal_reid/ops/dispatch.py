"""Chooses the backend that serves an operator: `reference`, `cuda` or `triton`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("reference", "cuda", "triton")
CHOICES = ("auto", *BACKENDS)
PREFERENCE_ON_GPU = ("cuda", "triton", "reference")

_log = logging.getLogger(__name__)
_chosen: str | None = None


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve a call; the message says why."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator called inside from one backend, in the whole process.

    Args:
        name: `auto`, `reference`, `cuda` or `triton`. An explicit backend that cannot serve a call raises.

    Raises:
        ValueError: `name` is none of these.
    """
    global _chosen
    previous, _chosen = _chosen, _checked(name, "backend")
    try:
        yield
    finally:
        _chosen = previous


def current_backend() -> str:
    """The choice in force: `use_backend`, else the environment's SIGNAL_REID_BACKEND, else `auto`."""
    if _chosen is not None:
        return _chosen
    return _checked(os.environ.get("SIGNAL_REID_BACKEND", "auto"), "SIGNAL_REID_BACKEND")


def unavailable_reason(backend: str) -> str | None:
    """Why a backend cannot be used here, in plain words; None when it can."""
    package = _package(backend)
    return "this version of signal-reid has no such kernels" if package is None else package.unavailable_reason()


def implementation(op: str, tensor: torch.Tensor) -> ModuleType:
    """The module whose functions serve operator file `op` for this tensor, as far as the tensor alone tells.

    Raises:
        BackendError: the backend was chosen explicitly and cannot serve the tensor; the message says why.
    """
    return _load(next(_candidates(op, tensor)), op)


def call(op: str, function: str, tensor: torch.Tensor, *arguments: Any) -> Any:
    """Run `function` of operator file `op` in the backend that serves this tensor and these other arguments.

    Raises:
        BackendError: the backend was chosen explicitly and cannot serve the call; the message says why.
    """
    refusal = None
    for backend in _candidates(op, tensor):
        try:
            return getattr(_load(backend, op), function)(tensor, *arguments)
        except BackendError as error:
            refusal = error
            if current_backend() == "auto":
                _log_fallback_once(backend, str(error))
    assert refusal is not None
    raise refusal


def _candidates(op: str, tensor: torch.Tensor) -> Iterator[str]:
    """The backends to try in turn: the one that was chosen, or those that take the tensor, the fastest first."""
    choice = current_backend()
    for backend in _preference(tensor) if choice == "auto" else (choice,):
        reason = _reason_against(backend, tensor)
        if reason is None:
            yield backend
        elif choice == "auto":
            _log_fallback_once(backend, reason)
        else:
            raise BackendError(f"backend {choice} cannot serve {op} on {tensor.device}: {reason}")


def _preference(tensor: torch.Tensor) -> tuple[str, ...]:
    return PREFERENCE_ON_GPU if tensor.is_cuda else ("reference",)


def _checked(name: str, what: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{what} must be one of {', '.join(CHOICES)}, got {name!r}")
    return name


def _reason_against(backend: str, tensor: torch.Tensor) -> str | None:
    reason = unavailable_reason(backend)
    package = _package(backend)
    return reason if reason is not None or package is None else package.reason_against(tensor)


@cache
def _package(backend: str) -> ModuleType | None:
    name = f"signal_reid.ops.{backend}"
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


@cache
def _load(backend: str, op: str) -> ModuleType:
    return importlib.import_module(f"signal_reid.ops.{backend}.{op}")


@cache
def _log_fallback_once(backend: str, reason: str) -> None:
    _log.warning("backend %s is not used: %s", backend, reason)
