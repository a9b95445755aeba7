"""Configurations: the typed settings of a run (`schema`) and how files and overrides become them (`loading`)."""

from signal_reid.config.loading import ConfigError, dump_config, flat_settings, load_config
from signal_reid.config.published import published_names
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
    Section,
    TrainingConfig,
)

__all__ = [
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
    "Section",
    "TrainingConfig",
    "dump_config",
    "flat_settings",
    "load_config",
    "published_names",
]
