"""Pictures as maps of part labels: one drawing of a scene, coloured once per modality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Surface = tuple[float, float, float, float, float]
"""Red, green, blue in 0..255; near-infrared reflectance and heat in 0..1."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

COLOURS: tuple[tuple[float, float, float], ...] = (
    (205, 38, 38), (238, 200, 40), (40, 150, 60), (60, 190, 205),
    (38, 62, 190), (190, 60, 170), (235, 235, 230), (40, 40, 44),
)  # fmt: skip
"""What clothes, cars and distractors are painted with."""


class Part(IntEnum):
    """Labels of a subject's parts; smaller labels belong to the background, larger ones to what stands in front."""

    PANEL = 100
    PANEL_ALT = 101
    """The second tone of the panel's pattern."""
    LOWER = 102
    SKIN = 103
    HAIR = 104
    BAG = 105
    SHOES = 106
    STRAP = 107
    HOOD = 110
    ENGINE = 111
    WINDOW = 112
    SHADE = 113
    TYRE = 114
    RIM = 115
    LAMP = 116
    EXHAUST = 117
    CARGO = 118


DISTRACTOR = 60
OCCLUDER = 200


class Pencil:
    """Draws labels on a canvas in a subject's own coordinates; a negative horizontal scale mirrors."""

    def __init__(self, canvas: Image.Image, origin: Point, scale: Point) -> None:
        self._draw = ImageDraw.Draw(canvas)
        self._origin, self._scale = origin, scale

    def to_canvas(self, point: Point) -> Point:
        return (
            self._origin[0] + self._scale[0] * point[0],
            self._origin[1] + self._scale[1] * point[1],
        )

    def polygon(self, points: Sequence[Point], label: int) -> None:
        self._draw.polygon([self.to_canvas(point) for point in points], fill=label)

    def box(self, box: Box, label: int) -> None:
        self._draw.rectangle(self.box_to_canvas(box), fill=label)

    def ellipse(self, centre: Point, radii: Point, label: int) -> None:
        (x, y), (rx, ry) = centre, radii
        self._draw.ellipse(self.box_to_canvas((x - rx, y - ry, x + rx, y + ry)), fill=label)

    def limb(self, start: Point, end: Point, width: float, label: int) -> None:
        """A straight limb with square ends, never thinner than half its width when seen on edge."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = max((dx * dx + dy * dy) ** 0.5, 1e-6)
        nx, ny = -dy / length * width / 2, dx / length * width / 2
        corners = [(start[0] + nx, start[1] + ny), (end[0] + nx, end[1] + ny)]
        corners += [(end[0] - nx, end[1] - ny), (start[0] - nx, start[1] - ny)]
        self.polygon(corners, label)

    def box_to_canvas(self, box: Box) -> Box:
        x0, y0 = self.to_canvas((box[0], box[1]))
        x1, y1 = self.to_canvas((box[2], box[3]))
        return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


Mask = NDArray[np.bool_]
Coordinates = NDArray[np.float32]

PATTERNS: dict[str, Callable[[Coordinates, Coordinates], Mask]] = {
    "plain": lambda u, v: np.zeros(np.broadcast_shapes(u.shape, v.shape), bool),
    "rows": lambda u, v: ((v * 3) % 1 > 0.5) | (u < 0),
    "columns": lambda u, v: ((u * 3) % 1 > 0.5) | (v < 0),
    "checks": lambda u, v: ((u * 2) % 1 > 0.5) ^ ((v * 2) % 1 > 0.5),
    "top": lambda u, v: (v < 0.45) & (u > -1),
    "bottom": lambda u, v: (v > 0.55) & (u > -1),
    "centre": lambda u, v: (abs(u - 0.5) < 0.25) & (abs(v - 0.5) < 0.3),
}
"""Which pixels of a panel carry its second tone, from the place in the panel: u across, v down, both in 0..1."""


def paint_pattern(labels: NDArray[np.uint8], panel: Box, pattern: str) -> None:
    """Turn PANEL into PANEL_ALT in place, where the pattern says so.

    Args:
        labels: (H, W) uint8.
        panel: the panel's box in pixels of `labels`; it may reach beyond them.
        pattern: a key of `PATTERNS`.
    """
    height, width = labels.shape
    left, top, right, bottom = panel
    rows = np.arange(max(int(top), 0), min(int(bottom) + 1, height))
    columns = np.arange(max(int(left), 0), min(int(right) + 1, width))
    if pattern == "plain" or not len(rows) or not len(columns):
        return
    u = ((columns - left) / max(right - left, 1)).astype(np.float32)[None, :]
    v = ((rows - top) / max(bottom - top, 1)).astype(np.float32)[:, None]
    window = labels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    window[PATTERNS[pattern](u, v) & (window == Part.PANEL)] = Part.PANEL_ALT
