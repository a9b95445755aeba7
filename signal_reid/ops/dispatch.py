"""Chooses the backend that serves an operator; `backend` says which there are and what each must offer.

`auto`, the default, takes the fastest backend that has the operator and takes the tensor: cuda, triton, then reference
on a GPU; cpu, then reference on a CPU; reference on any other device. What it passes over for a reason is logged once.

An explicit choice binds every operator that the chosen backend has: it serves the call, or BackendError says why it
cannot. An operator that the backend does not have is served as `auto` would without it, so that a whole model runs.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch

from signal_reid.ops import backend as backends

BACKENDS = backends.BACKENDS
CHOICES = ("auto", *BACKENDS)

_log = logging.getLogger(__name__)
_chosen: str | None = None


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve a call; the message says why."""


class use_backend(AbstractContextManager[None]):  # noqa: N801 - called like a function, as `torch.no_grad` is
    """Serve every operator from one backend, in the whole process.

    From the call on, as `torch.set_grad_enabled` does: `use_backend("triton")`. In a block, after which what was chosen
    before is in force again: `with use_backend("triton"): ...`. In a function: `@use_backend("triton")` above it.

    Args:
        name: `auto`, `reference`, `cpu`, `cuda` or `triton`. An explicit backend raises where it has an operator but
            cannot serve the call; an operator that it does not have is served as by `auto`.

    Raises:
        ValueError: `name` is none of these.
    """

    def __init__(self, name: str):
        global _chosen
        self.name = _checked(name, "backend")
        self._before, _chosen = _chosen, name

    def __enter__(self) -> None:
        global _chosen
        _chosen = self.name

    def __exit__(self, *_: object) -> None:
        global _chosen
        _chosen = self._before

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose operators are served from the backend; nothing else is."""
        self.__exit__()

        @wraps(function)
        def served(*arguments: Any, **options: Any) -> Any:
            with use_backend(self.name):
                return function(*arguments, **options)

        return served


def current_backend() -> str:
    """The choice in force: `use_backend`, else the environment's SIGNAL_REID_BACKEND, else `auto`."""
    if _chosen is not None:
        return _chosen
    return _checked(os.environ.get("SIGNAL_REID_BACKEND", "auto"), "SIGNAL_REID_BACKEND")


def unavailable_reason(backend: str, start: bool = False) -> str | None:
    """Why a backend cannot be used here, in plain words; None when it can.

    Args:
        start: whether GPUs that this process does not use yet are started to ask them.
    """
    return backends.package(backend).unavailable_reason(start)


def describe(start: bool = False) -> dict[str, str]:
    """Each backend and whether it can be used here, and the one in force, by name in plain words.

    Args:
        start: as in `unavailable_reason`.
    """
    facts = {}
    for backend in BACKENDS:
        reason = unavailable_reason(backend, start)
        facts[f"backend {backend}"] = "available" if reason is None else f"not available: {reason}"
    return {**facts, "backend in force": current_backend()}


def left_to_pytorch(op: str, tensor: torch.Tensor) -> bool:
    """Whether PyTorch's own operator is to serve, as no backend but the oracle would, and nobody chose the oracle.

    A backend that was chosen explicitly and cannot serve says so when it is called.
    """
    return tensor.is_meta or (_binding(op) is None and next(_candidates(op, tensor, None)) == "reference")


def call(op: str, function: str, tensor: torch.Tensor, *arguments: Any) -> Any:
    """Run `function` of operator file `op` in the backend that serves this tensor and these other arguments.

    Raises:
        BackendError: the backend was chosen explicitly and cannot serve the call; the message says why.
    """
    refusal, chosen = None, _binding(op)
    for backend in _candidates(op, tensor, chosen):
        try:
            return getattr(module(backend, op), function)(tensor, *arguments)
        except BackendError as error:
            refusal = error
            if chosen is None:
                _log_fallback_once(backend, str(error))
    assert refusal is not None
    raise refusal


@cache
def module(backend: str, op: str) -> ModuleType:
    """The module of operator file `op` in a backend that has it."""
    return importlib.import_module(f"signal_reid.ops.{backend}.{op}")


def _binding(op: str) -> str | None:
    """The backend that was chosen explicitly, if it has this operator."""
    choice = current_backend()
    return choice if choice != "auto" and backends.serves(choice, op) else None


def _candidates(op: str, tensor: torch.Tensor, chosen: str | None) -> Iterator[str]:
    """The backends to try in turn: the one that was chosen, or those that take the tensor, the fastest first."""
    for backend in backends.preference(tensor) if chosen is None else (chosen,):
        if not backends.serves(backend, op):
            continue
        reason = backends.package(backend).reason_against(tensor)
        if reason is None:
            yield backend
        elif chosen is None:
            _log_fallback_once(backend, reason)
        else:
            raise BackendError(f"backend {backend} cannot serve {op} on {tensor.device}: {reason}")


def _checked(name: str, what: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{what} must be one of {', '.join(CHOICES)}, got {name!r}")
    return name


@cache
def _log_fallback_once(backend: str, reason: str) -> None:
    _log.warning("backend %s is not used: %s", backend, reason)
