"""Image files as 8-bit RGB, whatever they hold: what is done to them is stated, and nothing is lost silently."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from signal_reid.data.errors import DataError
from signal_reid.data.layouts.options import PLAIN, Reading
from signal_reid.runtime.spare_memory import require_memory, require_memory_of_codec
from signal_reid.runtime.troubles import explain

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What image files may hold, whatever they are called; Pillow runs other programs for some of its other formats."""
MOST_PIXELS = 2**25
"""Most pixels of one image, four times of which Pillow keeps in memory; a frame of an 8K camera fits."""
LONGEST_SIDE = 2**16
"""Pixels; the weights that Pillow resizes with take 32 bytes each."""

TRAITS = {
    "rotated": "rotated or mirrored by EXIF, and turned (data.images.orientation=refuse stops at them)",
    "transparent": "transparent in places, and composited on a colour (data.images.background)",
    "cmyk": "CMYK, and converted to RGB without a colour profile",
    "named": "of another format than the name says",
}
"""What may be remarkable about an image that can be read, in words that go on from "images are"."""

_HIGH_DEPTH = ("I", "F")  # modes whose conversion to RGB would clip instead of scale
_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by what EXIF says of how it lies."""
_FULL = (0, 65535)
_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}


class UnfitImageError(DataError):
    """An image that a setting can mend; `kind` is what images that it would mend have in common."""

    kind = "unfit"
    reason = ""

    @classmethod
    def of(cls, path: Path, kind: str, reason: str) -> UnfitImageError:
        error = cls(f"{path}: {reason}")
        error.kind, error.reason = kind, reason
        return error


_ENOUGH = 2**26  # bytes beside the pixels; where a machine has them, a file that lacks memory asked for too much


class Developed(NamedTuple):
    image: Image.Image
    """8-bit RGB."""
    traits: tuple[str, ...]
    """The names of `TRAITS` that it has."""


def read_image(path: Path, reading: Reading = PLAIN) -> Image.Image:
    """Decode a file to an RGB image; see `develop` for the arguments and the errors."""
    return develop(path, reading).image


def develop(path: Path, reading: Reading = PLAIN) -> Developed:
    """Decode a file to an RGB image, and say what is remarkable about it.

    Args:
        path: the file.
        reading: what to do where it is deeper than 8 bits, transparent, or rotated by EXIF.

    Raises:
        UnfitImageError: deeper than 8 bits without a range, or rotated where that is refused.
        DataError: the file is missing, truncated, not an image, or of more than `MOST_PIXELS`.
        MemoryError, OSError: there is too little memory, or there are too many open files.
    """
    size = (0, 0)
    try:
        with Image.open(path, formats=FORMATS) as image:
            size = image.size
            if _is_too_large(image):
                pixels = f"{image.width}x{image.height} pixels"
                raise DataError(f"{path}: an image of {pixels}, more than {MOST_PIXELS} or {LONGEST_SIDE} on a side")
            return developed(image, path, reading)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image, or its header is damaged") from None
    except (MemoryError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _blame_machine(error, size)
        reason = getattr(error, "strerror", None) or str(error) or "it asks for too much memory"
        raise DataError(f"{path}: unreadable image ({' '.join(reason.split())})") from None


def deep_values(path: Path) -> np.ndarray | None:
    """The values (H, W) of an image deeper than 8 bits; none where it is not, is too large, or cannot be read.

    Raises:
        MemoryError, OSError: there is too little memory, or there are too many open files.
    """
    size = (0, 0)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if not image.mode.startswith(_HIGH_DEPTH) or _is_too_large(image):
                return None
            size = image.size
            require_memory_of_codec(*size)
            return np.asarray(image)
    except (MemoryError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _blame_machine(error, size)
        return None


def _is_too_large(image: Image.Image) -> bool:
    return image.width * image.height > MOST_PIXELS or max(image.size) > LONGEST_SIDE


def _blame_machine(error: Exception, size: tuple[int, int]) -> None:
    """Raise an error that is not the file's fault; one of memory is, where there is enough for `size` and more."""
    if isinstance(error, MemoryError):
        require_memory_of_codec(*size)
        require_memory(_ENOUGH)
    elif explain(error) is not None:
        raise error


def developed(image: Image.Image, path: Path, reading: Reading = PLAIN) -> Developed:
    """As `develop`, of an image that is open already; errors call it by `path`.

    Raises:
        UnfitImageError, DataError: as `develop`.
    """
    require_memory_of_codec(*image.size)
    traits, deep_colour = [], _is_deep_colour(image)  # before EXIF, for which Pillow may decode the image
    if _SUFFIXES.get(path.suffix.lower(), image.format) != image.format and image.format != "MPO":
        traits.append("named")
    orientation = _orientation(image)
    if orientation != 1:
        if reading.orientation == "refuse":
            reason = "rotated or mirrored by EXIF; data.images.orientation=apply turns it"
            raise UnfitImageError.of(path, "rotated", reason)
        traits.append("rotated")
    if image.mode.startswith(_HIGH_DEPTH):
        result = _mapped(image, path, reading.range)
    else:
        if deep_colour and reading.range != _FULL:
            reason = (
                "16 bits for each of several channels, of which the upper 8 can be read; save one channel, or state "
                "that all 16 are used with data.images.ranges={MODALITY: [0, 65535]}"
            )
            raise UnfitImageError.of(path, "deep colour", reason)
        if image.mode == "CMYK":
            traits.append("cmyk")
        result, transparent = _opaque(image, reading.background)
        traits += ["transparent"] * transparent
    if orientation != 1 and not _is_turned(image):
        result = result.transpose(_TURN[orientation])
    return Developed(result.convert("RGB"), tuple(traits))


def _orientation(image: Image.Image) -> int:
    """What EXIF says of how the image lies, from 1 (upright) to 8."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (EOFError, KeyError, OSError, SyntaxError, TypeError, ValueError, struct.error) as error:
        if explain(error) is not None:
            raise
        return 1  # EXIF itself is damaged
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _is_turned(image: Image.Image) -> bool:
    """Whether Pillow has made an image upright that EXIF says is not: of TIFF it does so while it decodes.

    Newer versions then take what EXIF said away; Pillow 10.0 leaves it.
    """
    return _orientation(image) == 1 or bool(getattr(image, "_tile_orientation", None))


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether Pillow would drop half of the bits, which the mode does not tell; asked before the image is decoded."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3]
        raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        if isinstance(raw, str) and ";16" in raw:
            return True
    return False


def _mapped(image: Image.Image, path: Path, value_range: tuple[float, float] | None) -> Image.Image:
    values = np.asarray(image).astype(np.float64)  # (H, W)
    if value_range is None:
        reason = (
            f"image mode {image.mode} is deeper than 8 bits; data.images.ranges={{MODALITY: [LOW, HIGH]}} says which "
            "values are black and white, data.images.percentiles=[0.5, 99.5] measures them when training starts"
        )
        raise UnfitImageError.of(path, "deep", reason)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: holds values that are no finite numbers")
    low, high = value_range
    return Image.fromarray(np.rint(np.clip((values - low) * (255 / (high - low)), 0, 255)).astype(np.uint8))


def _opaque(image: Image.Image, background: tuple[int, int, int]) -> tuple[Image.Image, bool]:
    """An image without transparency, and whether it had some."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        image.load()
        return image, False
    colours = image.convert("RGBA")
    lowest = colours.getchannel("A").getextrema()[0]
    if lowest == 255:
        return image, False
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), colours), True
