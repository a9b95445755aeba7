"""The class of a configuration for one method and one backbone: the common settings with their own sections."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import create_model

from signal_reid.config.schema import BackboneConfig, Config, ModelConfig

DEFAULT_METHOD = ModelConfig.model_fields["method"].default
DEFAULT_BACKBONE = BackboneConfig.model_fields["name"].default


def config_type(method: str | None = None, backbone: str | None = None) -> type[Config]:
    """The settings of a method on a backbone; by default of Signal on CLIP's vision transformer.

    Methods and backbones are found by name in their registries, which load no other than the one asked for.

    Raises:
        ConfigError: no method or backbone of that name.
    """
    return _narrowed(method or DEFAULT_METHOD, backbone or DEFAULT_BACKBONE)


def restored(method: str, backbone: str, values: dict[str, Any]) -> Config:
    """A configuration from its values, in another process."""
    return config_type(method, backbone).model_validate(values)


@cache
def _narrowed(method: str, backbone: str) -> type[Config]:
    from signal_reid.backbones.registry import BACKBONES  # both import the schema
    from signal_reid.methods.registry import METHODS

    chosen, backbone_settings = METHODS.get(method), BACKBONES.get(backbone).settings
    model = create_model(
        chosen.settings.__name__,
        __base__=chosen.settings,
        method=(str, method),
        backbone=(backbone_settings, backbone_settings(name=backbone)),
    )
    return create_model(
        "Config",
        __base__=Config,
        model=(model, model(method=method)),
        losses=(chosen.loss_settings, chosen.loss_settings()),
    )
