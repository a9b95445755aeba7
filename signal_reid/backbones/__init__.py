"""Backbones: each is a file that owns its network and the namings of its weight files."""

from signal_reid.runtime.registry import Registry

REGISTRY = Registry("signal_reid.backbones", __name__, "BACKBONE")
"""Every backbone by name: the files of this package and installed plug-ins."""
