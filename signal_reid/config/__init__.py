"""Configurations: the typed settings of a run (`schema`) and how files and overrides become them (`loading`)."""

from signal_reid.config.loading import PUBLISHED, ConfigError, dump_config, load_config
from signal_reid.config.schema import (
    AugmentationConfig,
    BackboneConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)

__all__ = [
    "PUBLISHED",
    "AugmentationConfig",
    "BackboneConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "dump_config",
    "load_config",
]
