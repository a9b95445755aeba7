"""The data set that a configuration asks for."""

from __future__ import annotations

from signal_reid.config import Config
from signal_reid.data.layouts import Dataset, Options, find_layout, open_dataset


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


def with_named_modalities(config: Config, dataset: Dataset) -> Config:
    """The configuration with the names of the modalities where only the data set's file tells them.

    They are written with the weights, so that a search knows which images it is given, and a test on another file takes
    the same columns.
    """
    if config.data.modalities is not None or find_layout(config.data.dataset).modalities:
        return config
    data = config.data.model_copy(update={"modalities": dataset.modalities})
    return config.model_copy(update={"data": data})


def open_configured(config: Config) -> Dataset:
    """Open the configured data set as it is configured; see `open_dataset` for the errors."""
    return open_dataset(config.data.dataset, config.data.root, options_of(config))
