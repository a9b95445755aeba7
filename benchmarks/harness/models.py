"""The models that are measured: a published configuration, comparable weights, and the authors' twin."""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn

import signal_reid
from signal_reid.upstream.parameters import ours_to_authors

from .upstream import Upstream

IDENTITIES_AND_CAMERAS = {"rgbnt201": (171, 4), "rgbnt100": (50, 8), "msvr310": (155, 8)}
"""How many identities and cameras each training set has."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that change the published model."""
    parser.add_argument("--layers", type=int, default=12, help="transformer blocks (default 12)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings than the configuration's, of our side"
    )


def configuration(args: argparse.Namespace) -> signal_reid.Config:
    """The published configuration with `--layers` blocks and what is `--set`."""
    return signal_reid.load_config(args.config, [f"model.backbone.layers={args.layers}", *args.set])


@torch.no_grad()
def spread_weights(model: nn.Module, seed: int) -> None:
    """Draw weights that keep the samples of a random batch apart, so that results can be compared to many digits.

    With PyTorch's initialisation all features of an untrained model nearly coincide, and so do the vectors whose volume
    GAM takes.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("temperature"):
            continue
        if parameter.ndim >= 2 and "embedding" not in name.replace("patch_embedding", "") and "bias" not in name:
            fan_in = parameter.shape[0] if name.endswith("projection") else math.prod(parameter.shape[1:])
            parameter.copy_(drawn * fan_in**-0.5)
        else:
            parameter.copy_(0.05 * drawn + ("norm" in name or "neck" in name) * name.endswith("weight"))


def upstream_model(upstream: Upstream, ours: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The authors' model with our model's weights, on the host."""
    model = upstream.build_model(upstream.config(args.config), *IDENTITIES_AND_CAMERAS[args.config], args.layers)
    model.load_state_dict(ours_to_authors(ours.state_dict()))
    return model
