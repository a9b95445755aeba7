"""Signal (AAAI 2026): multi-modal object re-identification, trained, evaluated and taken apart into operators."""

from signal_reid import checkpoints, evaluation, ops, training
from signal_reid.config import Config, ConfigError, load_config
from signal_reid.nn import Signal, SignalOutput, build_model

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "Signal",
    "SignalOutput",
    "build_model",
    "checkpoints",
    "evaluation",
    "load_config",
    "ops",
    "training",
]
