"""Stylised people: proportions, clothes and heat of an identity, drawn as labelled parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from signal_reid.data.synthetic.drawing import COLOURS, Box, Part, Pencil, Surface
from signal_reid.data.synthetic.identities import AttributeDraw


@dataclass(frozen=True)
class Person:
    surfaces: dict[int, Surface]
    patterns: tuple[str, str, str]
    """Pattern of the upper garment in RGB, near-infrared and thermal."""
    build: float
    torso: float
    """Length of the torso over the height."""
    long_sleeves: bool
    legwear: str
    headwear: str
    bag: str

    @staticmethod
    def of_identity(seed: int, identity: int) -> Person:
        pick = AttributeDraw(seed, identity).pick
        garment, legs, bag = pick(COLOURS), pick(COLOURS), pick(COLOURS)
        second = pick([colour for colour in COLOURS if colour != garment])
        hair = pick(((30, 24, 20), (120, 70, 30), (225, 195, 120), (200, 40, 40)))
        skin = pick(((236, 190, 160), (190, 130, 95), (110, 75, 55)))
        reflect, heat = (0.12, 0.45, 0.85), (0.3, 0.58, 0.86)
        garment_nir, garment_heat = pick(reflect), pick(heat)
        contrast_nir = garment_nir + (0.4 if garment_nir < 0.5 else -0.4)
        contrast_heat = garment_heat + (0.3 if garment_heat < 0.6 else -0.3)
        surfaces: dict[int, Surface] = {
            Part.PANEL: (*garment, garment_nir, garment_heat),
            Part.PANEL_ALT: (*second, contrast_nir, contrast_heat),
            Part.LOWER: (*legs, pick(reflect), pick(heat)),
            Part.SKIN: (*skin, 0.65, 0.97),
            Part.HAIR: (*hair, pick((0.15, 0.8)), pick((0.35, 0.7))),
            Part.BAG: (*bag, pick(reflect), pick((0.05, 0.95))),
            Part.SHOES: (*pick(((30, 30, 30), (235, 235, 235), (200, 60, 40))), 0.3, pick((0.2, 0.8))),
            Part.STRAP: (*bag, 0.3, 0.3),
        }
        return Person(
            surfaces=surfaces,
            patterns=(
                pick(("plain", "rows", "columns", "checks", "bottom")),
                pick(("plain", "rows", "centre", "top")),
                pick(("plain", "centre", "top", "bottom")),
            ),
            build=pick((0.8, 1.0, 1.25)),
            torso=pick((0.3, 0.36, 0.42)),
            long_sleeves=pick((True, False)),
            legwear=pick(("trousers", "shorts", "skirt")),
            headwear=pick(("short", "long", "cap")),
            bag=pick(("none", "shoulder", "backpack")),
        )

    def draw(self, pencil: Pencil, rng: np.random.Generator, view: float) -> Box:
        """Draw a walking person, one unit tall, standing on y = 0.

        Args:
            view: 0 from the front, 1 from the back; between them the face turns away.

        Returns:
            The upper garment's box on the canvas.
        """
        shoulders, hips = -0.85, -0.85 + self.torso
        half = 0.12 * self.build
        stride, swing = rng.uniform(-0.09, 0.09), rng.uniform(-0.07, 0.07)
        self._arm(pencil, (-half, shoulders + 0.02), -swing)
        self._leg(pencil, (-half * 0.45, hips), -stride)
        self._leg(pencil, (half * 0.45, hips), stride)
        if self.legwear == "skirt":
            hem = hips + 0.24
            pencil.polygon(
                [(-half * 0.8, hips), (half * 0.8, hips), (half * 1.15, hem), (-half * 1.15, hem)], Part.LOWER
            )
        if self.bag == "backpack":
            pencil.box((-half - 0.075, shoulders + 0.02, -half * 0.3, hips - 0.06), Part.BAG)
        torso = [(-half, shoulders), (half, shoulders), (half * 0.85, hips + 0.02), (-half * 0.85, hips + 0.02)]
        pencil.polygon(torso, Part.PANEL)
        if self.bag == "shoulder":
            pencil.limb((-half * 0.7, shoulders), (half * 0.9, hips - 0.04), 0.022, Part.STRAP)
            pencil.box((half * 0.5, hips - 0.08, half * 0.5 + 0.13, hips + 0.07), Part.BAG)
        self._arm(pencil, (half, shoulders + 0.02), swing)
        self._head(pencil, rng.uniform(-0.012, 0.012), view)
        return pencil.box_to_canvas((-half, shoulders, half, hips))

    def _arm(self, pencil: Pencil, shoulder: tuple[float, float], swing: float) -> None:
        outward = 0.03 if shoulder[0] > 0 else -0.03
        elbow = (shoulder[0] + outward + swing * 0.4, shoulder[1] + 0.17)
        hand = (elbow[0] + swing, elbow[1] + 0.17)
        pencil.limb(elbow, hand, 0.055, Part.PANEL if self.long_sleeves else Part.SKIN)
        pencil.limb(shoulder, elbow, 0.07, Part.PANEL)
        pencil.ellipse(hand, (0.028, 0.028), Part.SKIN)

    def _leg(self, pencil: Pencil, hip: tuple[float, float], stride: float) -> None:
        width = 0.1 * self.build
        knee = (hip[0] + stride * 0.45, hip[1] / 2 - 0.02)
        ankle = (hip[0] + stride, -0.03)
        pencil.limb(knee, ankle, width * 0.8, Part.LOWER if self.legwear == "trousers" else Part.SKIN)
        pencil.limb(hip, knee, width, Part.SKIN if self.legwear == "skirt" else Part.LOWER)
        pencil.box((ankle[0] - 0.045, -0.04, ankle[0] + 0.06, 0.0), Part.SHOES)

    def _head(self, pencil: Pencil, tilt: float, view: float) -> None:
        pencil.box((-0.03 + tilt, -0.88, 0.03 + tilt, -0.84), Part.SKIN)
        if self.headwear == "long":
            pencil.box((-0.075 + tilt, -0.94, 0.075 + tilt, -0.81), Part.HAIR)
        pencil.ellipse((tilt, -0.925), (0.065, 0.075), Part.SKIN)
        cap = 0.07 + 0.075 * view
        pencil.polygon([(-0.068 + tilt, -1 + cap), (-0.06 + tilt, -0.98), (tilt, -1.01),
                        (0.06 + tilt, -0.98), (0.068 + tilt, -1 + cap)], Part.HAIR)  # fmt: skip
        if self.headwear == "cap":
            pencil.box((-0.06 + tilt, -0.965, 0.12 + tilt, -0.94), Part.HAIR)
