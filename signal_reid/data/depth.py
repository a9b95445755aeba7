"""Which values of images deeper than 8 bits become black and white, measured on the training images."""

from __future__ import annotations

import numpy as np

from signal_reid.config import Config
from signal_reid.data.configured import open_configured
from signal_reid.data.decoding import threaded
from signal_reid.data.images import deep_values
from signal_reid.data.layouts import ImageSource
from signal_reid.data.progress import ProgressCallback

MOST_VALUES = 2**24
"""Values of a modality that are looked at; of more images, fewer of each."""


def with_measured_ranges(config: Config, progress: ProgressCallback | None = None) -> Config:
    """The configuration with a range for each modality whose training images are deeper than 8 bits.

    Without `data.images.percentiles` it is returned as it is. Ranges that it states are kept. Equal images give equal
    ranges, and what is written with the weights says them, so that a test reads its images as the training did.

    Args:
        config: `data` is used.
        progress: called with the images looked at and their number.

    Raises:
        FileNotFoundError, DataError: see `open_dataset`.
    """
    images = config.data.images
    if images.percentiles is None:
        return config
    dataset = open_configured(config)
    ranges = dict(images.ranges or {})
    for place, modality in enumerate(dataset.modalities):
        if modality not in ranges:
            sources = [sample.sources[place] for sample in dataset.train]
            measured = _percentiles(sources, images.percentiles, progress)
            if measured is not None:
                ranges[modality] = measured
    if not ranges:
        return config
    data = config.data.model_copy(update={"images": images.model_copy(update={"ranges": ranges})})
    return config.model_copy(update={"data": data})


def _percentiles(
    sources: list[ImageSource], percentiles: tuple[float, float], progress: ProgressCallback | None
) -> tuple[float, float] | None:
    """Percentiles of the values of the deep images among some; none where there are none."""
    each = max(64, MOST_VALUES // max(1, len(sources)))
    looked_at = threaded(lambda source: _some_values(source, each), sources, progress)
    found = [values for values in looked_at if values is not None]
    if not found:
        return None
    low, high = np.percentile(np.concatenate(found), percentiles)
    return float(low), float(high if high > low else low + 1)


def _some_values(source: ImageSource, most: int) -> np.ndarray | None:
    """At most so many values, evenly over the image's part; none where it is not deep."""
    values = deep_values(source.path)
    if values is None:
        return None
    if source.box is not None:
        left, upper, right, lower = source.box
        values = values[upper:lower, left:right]
    flat = values.reshape(-1)
    flat = flat[:: max(1, -(-len(flat) // most))].astype(np.float64)
    return flat[np.isfinite(flat)]
