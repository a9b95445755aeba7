"""Every backbone by name."""

from signal_reid.runtime.registry import Registry

BACKBONES = Registry("signal_reid.backbones", "signal_reid.backbones", "BACKBONE")
"""Every backbone by name: the files of this package and installed plug-ins."""
