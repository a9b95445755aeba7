"""Every method by name, and building the one that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from signal_reid.runtime.registry import Registry

if TYPE_CHECKING:
    from signal_reid.config import Config
    from signal_reid.methods.base import Method

METHODS = Registry("signal_reid.methods", "signal_reid.methods", "METHOD")
"""Every method by name: the folders of this package and installed plug-ins."""


def build_model(config: Config, num_identities: int, num_cameras: int) -> Method:
    """Build the configured method with random weights.

    Args:
        config: `model.method` names the method; its sections of the configuration say the rest.
        num_identities: classes of the training identities, at least 2.
        num_cameras: rows of the camera embedding.

    Raises:
        ValueError: fewer than two identities.
    """
    method: type[Method] = METHODS.get(config.model.method)
    return method(config, num_identities, num_cameras)
