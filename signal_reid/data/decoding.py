"""From image files to uint8 tensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from signal_reid.data.errors import DataError
from signal_reid.data.images import TRAITS, Developed, develop
from signal_reid.data.layouts import ImageSource, Sample
from signal_reid.data.progress import ProgressCallback
from signal_reid.runtime.text import escaped
from signal_reid.runtime.threads import map_in_pool

Interpolation = Literal["bicubic", "bilinear"]
TRAINING: Interpolation = "bicubic"
EVALUATION: Interpolation = "bilinear"
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_logger = logging.getLogger("signal_reid")
_warned: set[str] = set()
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_sources(sources: Sequence[ImageSource]) -> list[Image.Image]:
    """The images of a sample in its order; a file that holds several is decoded once.

    Raises:
        DataError: an unreadable file, or a composite of another size than its boxes are of.
    """
    return [image for image, _ in develop_sources(sources)]


def develop_sources(sources: Sequence[ImageSource]) -> list[Developed]:
    """As `read_sources`, with what is remarkable about each file."""
    files = {key: develop(*key) for key in dict.fromkeys((source.path, source.reading) for source in sources)}
    developed = []
    for source in sources:
        image, traits = files[source.path, source.reading]
        developed.append(Developed(_part(image, source), traits))
    return developed


def _warn_once(source: ImageSource, traits: Sequence[str]) -> None:
    """Say of the first image of a kind what is done to all of them."""
    for trait in traits:
        if trait not in _warned:
            _warned.add(trait)
            _logger.warning("%s", escaped(f"{source.path} is {TRAITS[trait]}; others may be"))


def _part(image: Image.Image, source: ImageSource) -> Image.Image:
    width, height = image.size
    if source.whole is not None and image.size != source.whole:
        expected = f"{source.whole[0]}x{source.whole[1]}"
        raise DataError(f"{source.path}: a composite must be {expected} pixels, got {width}x{height}")
    if source.box is None:
        return image
    left, upper, right, lower = source.box
    if right > width or lower > height or left >= right or upper >= lower:
        raise DataError(f"{source.path}: of {width}x{height} pixels, has no part {source.box}")
    return image.crop(source.box)


def decode(sample: Sample, size: tuple[int, int], interpolation: Interpolation = TRAINING) -> Tensor:
    """Read a sample and resize it, antialiased, to one size.

    Args:
        sample: what to read.
        size: height, width in pixels.
        interpolation: `bicubic` (training) or `bilinear` (evaluation).

    Returns:
        uint8 (M, 3, H, W).

    Raises:
        DataError: naming the file that is unreadable, truncated or of the wrong size.
    """
    height, width = size
    developed = develop_sources(sample.sources)
    for source, (_, traits) in zip(sample.sources, developed, strict=True):
        _warn_once(source, traits)
    images = [image for image, _ in developed]
    result = np.empty((len(images), 3, height, width), dtype=np.uint8)
    for out, image in zip(result, images, strict=True):
        out[...] = np.asarray(image.resize((width, height), _RESAMPLING[interpolation])).transpose(2, 0, 1)
    return torch.from_numpy(result)


def decode_into(
    out: Tensor,
    samples: Sequence[Sample],
    interpolation: Interpolation,
    progress: ProgressCallback | None = None,
) -> None:
    """Decode all samples into a tensor, on several threads.

    Args:
        out: uint8 (len(samples), M, 3, H, W), written in place.
        samples: what to read.
        interpolation: see `decode`.
        progress: called with the samples done and their number.

    Raises:
        DataError: the first sample, in order, that cannot be read.
    """
    size = (out.shape[-2], out.shape[-1])

    def fill(index: int) -> None:
        out[index] = decode(samples[index], size, interpolation)

    for _ in threaded(fill, range(len(samples)), progress):
        pass


def threaded(
    function: Callable[[_Item], _Result], items: Sequence[_Item], progress: ProgressCallback | None = None
) -> Iterator[_Result]:
    """Results of a function over items, in order, on several threads; Pillow releases the interpreter lock."""
    for done, result in enumerate(map_in_pool(function, items, min(8, os.cpu_count() or 1)), start=1):
        if progress is not None:
            progress(done, len(items))
        yield result
