"""What a user decides about a data set: which modalities, what becomes of unpaired files, how images are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Unpaired = Literal["error", "skip"]
Orientation = Literal["apply", "refuse"]


@dataclass(frozen=True)
class Reading:
    """How an image file becomes 8-bit RGB where it is not that already."""

    range: tuple[float, float] | None = None
    """The values of an image deeper than 8 bits that become 0 and 255, linearly between; none: such an image is
    refused."""
    background: tuple[int, int, int] = (0, 0, 0)
    """RGB that transparent pixels are composited on."""
    orientation: Orientation = "apply"
    """Whether an image that EXIF says is rotated or mirrored is turned or refused."""


PLAIN = Reading()


@dataclass(frozen=True)
class Options:
    """How a data set is opened; the section `data` of the configuration explains each."""

    modalities: tuple[str, ...] | None = None
    """Which, in this order; none: all that the data set has."""
    unpaired: Unpaired | None = None
    """none: as the layout says."""
    queries: str | None = None
    """A file that names the samples which alone are queries; none: the whole query split."""
    background: tuple[int, int, int] = (0, 0, 0)
    orientation: Orientation = "apply"
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By modality; see `Reading.range`."""

    def reading(self, modality: str) -> Reading:
        """How the images of a modality are read."""
        return Reading(self.ranges.get(modality), self.background, self.orientation)


DEFAULT = Options()
