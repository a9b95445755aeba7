"""Signal (AAAI 2026): multi-modal object re-identification, trained, evaluated and taken apart into operators.

Everything below is imported when it is first asked for, so that the operators need nothing but torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from signal_reid import checkpoints, evaluation, ops, training
    from signal_reid.config import Config, ConfigError, load_config
    from signal_reid.methods.base import Encoded, Method
    from signal_reid.methods.registry import build_model
    from signal_reid.program import evaluate, show, train
    from signal_reid.search import Retriever

__version__ = "0.2.0"

_PACKAGES = ("checkpoints", "evaluation", "ops", "training")
_HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "Encoded": "methods.base",
    "Method": "methods.base",
    "Retriever": "search",
    "build_model": "methods.registry",
    "evaluate": "program",
    "load_config": "config",
    "show": "program",
    "train": "program",
}

__all__ = [
    "Config",
    "ConfigError",
    "Encoded",
    "Method",
    "Retriever",
    "build_model",
    "checkpoints",
    "evaluate",
    "evaluation",
    "load_config",
    "ops",
    "show",
    "train",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"signal_reid.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"signal_reid.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
