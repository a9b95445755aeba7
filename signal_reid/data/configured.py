"""The data set that a configuration asks for."""

from __future__ import annotations

from signal_reid.config import Config
from signal_reid.data.layouts import Dataset, Options, open_dataset


def options_of(config: Config) -> Options:
    """How the configuration wants its data set opened."""
    data = config.data
    return Options(
        modalities=data.modalities,
        unpaired=data.unpaired,
        queries=data.queries,
        background=data.images.background,
        orientation=data.images.orientation,
        ranges=data.images.ranges or {},
    )


def open_configured(config: Config) -> Dataset:
    """Open the configured data set as it is configured; see `open_dataset` for the errors."""
    return open_dataset(config.data.dataset, config.data.root, options_of(config))
