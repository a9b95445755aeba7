"""Stylised vehicles: bodywork, paint and heat of an identity, drawn as labelled parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from signal_reid.data.synthetic.drawing import COLOURS, Box, Part, Pencil, Point, Surface
from signal_reid.data.synthetic.identities import AttributeDraw

BELT = -0.2
"""Height of the window sill, in vehicle lengths above the ground."""

PROFILES: dict[str, tuple[tuple[float, float, int], ...]] = {
    "hatchback": ((-0.5, -0.06, Part.SHADE), (-0.5, -0.22, Part.WINDOW), (-0.42, -0.36, Part.PANEL),
                  (0.08, -0.36, Part.WINDOW), (0.24, BELT, Part.HOOD), (0.5, -0.16, Part.SHADE)),
    "sedan": ((-0.5, -0.06, Part.SHADE), (-0.5, -0.2, Part.PANEL), (-0.36, -0.21, Part.WINDOW),
              (-0.22, -0.33, Part.PANEL), (0.06, -0.33, Part.WINDOW), (0.22, BELT, Part.HOOD),
              (0.5, -0.16, Part.SHADE)),
    "van": ((-0.5, -0.06, Part.SHADE), (-0.5, -0.44, Part.PANEL), (0.26, -0.44, Part.WINDOW),
            (0.4, -0.22, Part.HOOD), (0.5, -0.17, Part.SHADE)),
    "pickup": ((-0.5, -0.06, Part.SHADE), (-0.5, -0.19, Part.PANEL), (-0.12, -0.19, Part.WINDOW),
               (-0.08, -0.37, Part.PANEL), (0.14, -0.37, Part.WINDOW), (0.26, BELT, Part.HOOD),
               (0.5, -0.18, Part.SHADE)),
    "truck": ((-0.5, -0.06, Part.SHADE), (-0.5, -0.5, Part.CARGO), (0.18, -0.5, Part.CARGO), (0.18, -0.4, Part.PANEL),
              (0.4, -0.4, Part.WINDOW), (0.46, BELT, Part.HOOD), (0.5, -0.18, Part.SHADE)),
}  # fmt: skip
"""Outlines of the side, rear to front: a corner and the part that the edge starting there shows when seen slanted."""

CABINS: dict[str, tuple[float, float, float]] = {
    "hatchback": (-0.42, 0.14, -0.34), "sedan": (-0.27, 0.12, -0.31), "van": (-0.44, 0.31, -0.41),
    "pickup": (-0.06, 0.18, -0.35), "truck": (0.2, 0.42, -0.37),
}  # fmt: skip
"""Rear, front and top of the side windows."""


@dataclass(frozen=True)
class Vehicle:
    surfaces: dict[int, Surface]
    patterns: tuple[str, str, str]
    """Pattern of the bodywork in RGB, near-infrared and thermal."""
    profile: str
    height: float
    wheel: float
    rack: bool
    sill: float
    """Height of the second paint along the sill."""

    @staticmethod
    def of_identity(seed: int, identity: int) -> Vehicle:
        pick = AttributeDraw(seed, identity).pick
        body, sill = pick(COLOURS), pick(COLOURS)
        second = pick([colour for colour in COLOURS if colour != body])
        reflect, heat = (0.12, 0.45, 0.85), (0.15, 0.4, 0.65)
        body_nir, body_heat = pick(reflect), pick(heat)
        shade = 0.75 * body[0], 0.75 * body[1], 0.75 * body[2]
        engine = pick((0.2, 0.6, 1.0))
        window = (*pick(((40, 50, 60), (150, 180, 190))), pick((0.08, 0.6)), pick((0.1, 0.45, 0.8)))
        wheel_heat = pick((0.1, 0.9))
        surfaces: dict[int, Surface] = {
            Part.PANEL: (*body, body_nir, body_heat),
            Part.PANEL_ALT: (
                *second,
                body_nir + (0.4 if body_nir < 0.5 else -0.4),
                body_heat + (0.3 if body_heat < 0.5 else -0.3),
            ),
            Part.LOWER: (*sill, pick(reflect), pick(heat)),
            Part.SHADE: (*shade, 0.8 * body_nir, body_heat),
            Part.HOOD: (*shade, 0.9 * body_nir, engine),
            Part.ENGINE: (*body, body_nir, engine),
            Part.WINDOW: window,
            Part.TYRE: (25, 25, 28, 0.12, wheel_heat),
            Part.RIM: (*pick(((60, 60, 60), (215, 215, 220))), pick((0.25, 0.8)), wheel_heat),
            Part.LAMP: (250, 240, 200, 0.95, 0.5),
            Part.EXHAUST: (40, 40, 40, 0.2, pick((0.1, 1.0))),
            Part.CARGO: (*second, pick(reflect), pick(heat)),
        }
        return Vehicle(
            surfaces=surfaces,
            patterns=(
                pick(("plain", "rows", "columns", "checks", "centre")),
                pick(("plain", "columns", "centre", "checks")),
                pick(("plain", "centre", "top", "columns")),
            ),
            profile=pick(tuple(PROFILES)),
            height=pick((0.9, 1.05, 1.2)),
            wheel=pick((0.065, 0.085)),
            rack=pick((True, False)),
            sill=pick((0.0, 0.05, 0.09)),
        )

    def draw(self, pencil: Pencil, rng: np.random.Generator, view: float) -> Box:
        """Draw a vehicle on y = 0, one unit long when seen from the side and facing right.

        Args:
            view: -1..1; how far it is turned to show its rear (negative) or its front (positive).

        Returns:
            The bodywork's box on the canvas.
        """
        length, depth, pitch = 1 - 0.35 * abs(view), 0.28 * view, rng.uniform(-0.02, 0.02)

        def place(x: float, y: float) -> Point:
            return length * x - depth / 2, self.height * y + pitch * x

        outline = [(place(x, y), part) for x, y, part in PROFILES[self.profile]]
        corners = [point for point, _ in outline] + [place(0.5, -0.06)]
        sides = [(start, end, part) for (start, part), end in zip(outline, corners[1:], strict=True)]
        for (x0, y0), (x1, y1), part in sides if depth > 0 else sides[::-1]:
            pencil.polygon([(x0, y0), (x1, y1), (x1 + depth, y1 - 0.015), (x0 + depth, y0 - 0.015)], part)
        self._lamps(pencil, place(0.5 if depth > 0 else -0.5, -0.13), depth)
        pencil.polygon(corners, Part.PANEL)
        self._side(pencil, place)
        for x in (-0.31, 0.31):
            hub = place(x, -self.wheel / self.height)
            pencil.ellipse(hub, (self.wheel * length, self.wheel), Part.TYRE)
            pencil.ellipse(hub, (self.wheel * length * 0.6, self.wheel * 0.6), Part.RIM)
        pencil.ellipse(place(-0.49, -0.04), (0.035, 0.025), Part.EXHAUST)
        return pencil.box_to_canvas((*place(-0.5, min(y for _, y, _ in PROFILES[self.profile])), *place(0.5, -0.06)))

    def _side(self, pencil: Pencil, place: Callable[[float, float], Point]) -> None:
        rear, front, top = CABINS[self.profile]

        def quad(box: Box, part: Part) -> None:
            left, upper, right, lower = box
            pencil.polygon([place(left, upper), place(right, upper), place(right, lower), place(left, lower)], part)

        quad((0.24, BELT + 0.035, 0.49, -0.09), Part.ENGINE)
        if self.profile == "truck":
            quad((-0.5, -0.5, 0.18, -0.14), Part.CARGO)
        if self.sill:
            quad((-0.5, -0.06 - self.sill, 0.5, -0.05), Part.LOWER)
        middle = (rear + front) / 2
        pencil.polygon([place(rear, BELT), place(rear + 0.05, top), place(middle - 0.01, top),
                        place(middle - 0.01, BELT)], Part.WINDOW)  # fmt: skip
        pencil.polygon([place(middle + 0.01, BELT), place(middle + 0.01, top), place(front - 0.06, top),
                        place(front, BELT)], Part.WINDOW)  # fmt: skip
        if self.rack:
            quad((rear, top - 0.07, front - 0.08, top - 0.05), Part.TYRE)

    def _lamps(self, pencil: Pencil, corner: Point, depth: float) -> None:
        for fraction in (0.15, 0.85):
            centre = (corner[0] + fraction * depth, corner[1])
            pencil.ellipse(centre, (0.02, 0.02), Part.LAMP)
