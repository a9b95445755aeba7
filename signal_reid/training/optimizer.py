"""The optimizer, with one parameter group per learning rate."""

from collections import defaultdict

import torch
from torch import nn

from signal_reid.config import OptimizerConfig


def base_rate(name: str, config: OptimizerConfig) -> float:
    """Learning rate of a parameter of a method before the schedule.

    Biases learn at `bias_factor` times the base rate, the backbone's own parameters (not the camera embedding) at
    `backbone_rate`, classifiers at `classifier_factor` times the base rate.
    """
    if name.startswith("backbone.") and name != "backbone.camera_embedding" and config.backbone_rate is not None:
        return config.backbone_rate
    if ".classifier." in name:
        return config.base_rate * config.classifier_factor
    if "bias" in name:
        return config.base_rate * config.bias_factor
    return config.base_rate


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer over the trained parameters; each group keeps its unscheduled rate as `base_rate`."""
    by_rate: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_rate[base_rate(name, config)].append(parameter)
    groups = [{"params": parameters, "lr": rate, "base_rate": rate} for rate, parameters in by_rate.items()]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, config.base_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    optimizer = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return optimizer(groups, config.base_rate, weight_decay=config.weight_decay, fused=True)
