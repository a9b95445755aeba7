"""From image files to uint8 tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from signal_reid.data.errors import DataError
from signal_reid.data.layouts import ImageSource, Sample
from signal_reid.data.progress import ProgressCallback
from signal_reid.runtime.troubles import explain

Interpolation = Literal["bicubic", "bilinear"]
TRAINING: Interpolation = "bicubic"
EVALUATION: Interpolation = "bilinear"
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_HIGH_DEPTH = ("I", "F")  # modes whose conversion to RGB would clip instead of scale
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What image files may hold, whatever they are called; Pillow runs other programs for some of its other formats."""
MOST_PIXELS = 2**25
"""Of one image, four times of which Pillow keeps in memory; a frame of an 8K camera fits."""
LONGEST_SIDE = 2**16
"""Pixels; the weights that Pillow resizes with take 32 bytes each."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_image(path: Path) -> Image.Image:
    """Decode a file to an RGB image.

    Raises:
        DataError: the file is missing, truncated, not an image, deeper than 8 bits, or of more than `MOST_PIXELS`.
        OSError: there are too many open files, or too little memory.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS or max(image.size) > LONGEST_SIDE:
                size = f"{image.width}x{image.height} pixels"
                raise DataError(f"{path}: an image of {size}, more than {MOST_PIXELS} or {LONGEST_SIDE} on a side")
            if image.mode.startswith(_HIGH_DEPTH):
                raise DataError(f"{path}: image mode {image.mode} is deeper than 8 bits, expected 8 bits per channel")
            return image.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image, or its header is damaged") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and explain(error) is not None:  # the machine's fault, not the file's
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: unreadable image ({' '.join(reason.split())})") from None


def read_sources(sources: Sequence[ImageSource]) -> list[Image.Image]:
    """The images of a sample in its order; a file that holds several is decoded once.

    Raises:
        DataError: an unreadable file, or a composite whose size is not what its boxes cover.
    """
    files = {path: read_image(path) for path in dict.fromkeys(source.path for source in sources)}
    for path, image in files.items():
        boxes = [source.box for source in sources if source.path == path and source.box is not None]
        if boxes and image.size != (max(box[2] for box in boxes), max(box[3] for box in boxes)):
            width, height = max(box[2] for box in boxes), max(box[3] for box in boxes)
            raise DataError(
                f"{path}: a composite of {len(boxes)} images must be {width}x{height} pixels, "
                f"got {image.width}x{image.height}"
            )
    return [files[s.path] if s.box is None else files[s.path].crop(s.box) for s in sources]


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
    images = read_sources(sample.sources)
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

    for _ in threaded(fill, range(len(samples)), len(samples), progress):
        pass


def threaded(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    total: int,
    progress: ProgressCallback | None = None,
) -> Iterator[_Result]:
    """Results of a function over items, in order, on several threads; Pillow releases the interpreter lock."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for done, result in enumerate(pool.map(function, items), start=1):
            if progress is not None:
                progress(done, total)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
