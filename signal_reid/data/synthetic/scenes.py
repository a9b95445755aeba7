"""Cameras and what they see: cluttered backgrounds, light, blur and modalities shifted against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from signal_reid.data.synthetic.drawing import (
    COLOURS,
    DISTRACTOR,
    OCCLUDER,
    Box,
    Pencil,
    Surface,
    paint_pattern,
)
from signal_reid.data.synthetic.identities import generator

OVERSAMPLING = 2
"""Scenes are drawn at this multiple of the picture's size and averaged down, which softens the edges."""

SHIFT = 0.04
"""Largest shift of a modality against another, in heights."""

Table = NDArray[np.float32]
Image3 = NDArray[np.uint8]


class Subject(Protocol):
    """A person or a vehicle."""

    @property
    def surfaces(self) -> dict[int, Surface]: ...
    @property
    def patterns(self) -> tuple[str, str, str]: ...
    def draw(self, pencil: Pencil, rng: np.random.Generator, view: float) -> Box: ...


@dataclass(frozen=True)
class Framing:
    """How a kind of subject stands in its picture; the ranges are drawn from per picture."""

    size: tuple[int, int]
    """Height, width in pixels."""
    unit: tuple[float, float]
    """A subject's unit across in widths and upright in heights: other shapes of picture are those that fit, resized."""
    length: tuple[float, float]
    """How much of that unit subjects take."""
    ground: tuple[float, float]
    """Where the subject stands, in heights from the top."""
    sideways: float
    """Largest offset from the middle, in widths."""


@dataclass(frozen=True)
class Camera:
    """A place and a lens: what pictures from one camera (or one scene) have in common."""

    background: Image.Image
    """Labels, larger than a picture so that crops differ."""
    surfaces: Table
    """(256, 5) of the background."""
    texture: NDArray[np.float32]
    """Fine brightness variation, as large as the background."""
    cast: NDArray[np.float32]
    gains: tuple[float, float]
    """Contrast of near-infrared and thermal."""
    offsets: tuple[float, float]
    blur: float
    """Radius in heights."""
    noise: float
    mirrored: bool
    squeeze: float
    """Foreshortening of widths."""
    scale: float
    view: float

    @staticmethod
    def install(seed: int, number: int, framing: Framing) -> Camera:
        rng = generator(seed, "camera", number)
        height, width = _drawn_size(framing.size, margin=3 * SHIFT)
        surfaces = np.zeros((256, 5), np.float32)
        background = _draw_background(rng, surfaces, (height, width))
        coarse = Image.fromarray(rng.uniform(0, 255, (24, 24)).astype(np.uint8))
        size = (width // OVERSAMPLING, height // OVERSAMPLING)
        return Camera(
            background=background,
            surfaces=surfaces,
            texture=0.9 + 0.2 / 255 * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32),
            cast=rng.uniform(0.8, 1.15, 3).astype(np.float32),
            gains=(rng.uniform(0.75, 0.95), rng.uniform(0.75, 0.95)),
            offsets=(rng.uniform(-0.05, 0.1), rng.uniform(-0.05, 0.1)),
            blur=rng.uniform(0.0, 0.006),
            noise=rng.uniform(2, 5),
            mirrored=bool((number + seed) % 2),
            squeeze=rng.uniform(0.85, 1.05),
            scale=rng.uniform(0.93, 1.03),
            view=rng.uniform(-1, 1),
        )


def photograph(subject: Subject, camera: Camera, framing: Framing, rng: np.random.Generator) -> list[Image.Image]:
    """Take a triplet: RGB, near-infrared and thermal, each an RGB image of the framing's size."""
    slack = [camera.background.size[axis] - _drawn_size(framing.size, SHIFT)[1 - axis] for axis in (0, 1)]
    corner = [int(rng.integers(0, room + 1)) for room in slack]
    width, height = (_drawn_size(framing.size, SHIFT)[1 - axis] for axis in (0, 1))
    canvas = camera.background.crop((corner[0], corner[1], corner[0] + width, corner[1] + height))
    surfaces = camera.surfaces.copy()
    for part, surface in subject.surfaces.items():
        surfaces[part] = surface
    _draw_distractors(canvas, rng, surfaces)
    panel = _draw_subject(subject, canvas, camera, framing, rng)
    _draw_occluder(canvas, rng, surfaces)
    labels = np.asarray(canvas)
    light = _light(rng, camera, framing, corner)
    pictures = []
    for modality in range(3):
        rows, columns = (size * OVERSAMPLING for size in framing.size)
        top, left = (int(rng.integers(0, room + 1)) for room in (height - rows, width - columns))
        view = labels[top : top + rows, left : left + columns].copy()
        x0, y0, x1, y1 = panel
        paint_pattern(view, (x0 - left, y0 - top, x1 - left, y1 - top), subject.patterns[modality])
        pictures.append(_expose(view, surfaces, camera, modality, light, rng))
    return pictures


def _drawn_size(size: tuple[int, int], margin: float) -> tuple[int, int]:
    """Height, width of a canvas that leaves `margin` heights around a picture on every side."""
    room = 2 * round(margin * size[0])
    return (size[0] + room) * OVERSAMPLING, (size[1] + room) * OVERSAMPLING


def _any_surface(rng: np.random.Generator, vivid: float) -> Surface:
    """Some paint that clothes and cars have too; `vivid` is the share of its colour that is kept."""
    red, green, blue = (vivid * value + (1 - vivid) * 110 for value in COLOURS[rng.integers(len(COLOURS))])
    return red, green, blue, float(rng.uniform(0.1, 0.9)), float(rng.uniform(0.05, 0.75))


def _draw_background(rng: np.random.Generator, surfaces: Table, size: tuple[int, int]) -> Image.Image:
    """Sky or wall, ground, buildings, doors and poles, with labels from 0 up."""
    height, width = size
    canvas = Image.new("L", (width, height), 0)
    horizon = rng.uniform(0.45, 0.7)
    pencil = Pencil(canvas, (0, 0), (width, height))
    pencil.box((0, horizon, 1, 1), 1)
    for label in range(2, 18):
        x, half = rng.uniform(0, 1), rng.uniform(0.03, 0.16)
        top = rng.uniform(0.0, 0.6)
        pencil.box((x - half, top, x + half, rng.uniform(top + 0.1, max(horizon, top + 0.15))), label)
    for label in range(18, 26):
        x, y, slope = rng.uniform(0, 1), rng.uniform(horizon, 1), rng.uniform(-0.3, 0.3)
        pencil.polygon([(x, y), (x + 0.25, y), (x + 0.25 + slope, y + 0.08), (x + slope, y + 0.08)], label)
    for label in range(26):
        surfaces[label] = _any_surface(rng, vivid=rng.uniform(0.1, 0.6))
    return canvas


def _draw_distractors(canvas: Image.Image, rng: np.random.Generator, surfaces: Table) -> None:
    """Things beside the subject that wear what other identities wear."""
    width, height = canvas.size
    pencil = Pencil(canvas, (0, 0), (width, height))
    for label in range(DISTRACTOR, DISTRACTOR + int(rng.integers(2, 6))):
        surfaces[label] = _any_surface(rng, vivid=0.9)
        x, y = rng.uniform(0, 0.3), rng.uniform(0.1, 0.9)
        centre = (x if rng.random() < 0.5 else 1 - x, y)
        radii = (rng.uniform(0.03, 0.1), rng.uniform(0.03, 0.1))
        if rng.random() < 0.5:
            pencil.ellipse(centre, radii, label)
        else:
            pencil.box((centre[0] - radii[0], y - radii[1], centre[0] + radii[0], y + radii[1]), label)


def _draw_subject(
    subject: Subject, canvas: Image.Image, camera: Camera, framing: Framing, rng: np.random.Generator
) -> Box:
    height, width = (size * OVERSAMPLING for size in framing.size)
    size = camera.scale * rng.uniform(*framing.length)
    mirrored = camera.mirrored != (rng.random() < 0.25)
    origin = (
        canvas.size[0] / 2 + width * framing.sideways * rng.uniform(-1, 1),
        (canvas.size[1] - height) / 2 + height * rng.uniform(*framing.ground),
    )
    across = size * framing.unit[0] * width * camera.squeeze * rng.uniform(0.92, 1.05) * (-1 if mirrored else 1)
    upright = size * framing.unit[1] * height
    view = float(np.clip(camera.view + rng.uniform(-0.4, 0.4), -1, 1))
    return subject.draw(Pencil(canvas, origin, (across, upright)), rng, view)


def _draw_occluder(canvas: Image.Image, rng: np.random.Generator, surfaces: Table) -> None:
    """In front of some subjects: a pole, or a wall that hides their lowest part."""
    surfaces[OCCLUDER] = _any_surface(rng, vivid=0.6)
    pencil = Pencil(canvas, (0, 0), canvas.size)
    kind, x = rng.random(), rng.uniform(0.2, 0.8)
    if kind < 0.2:
        pencil.box((x, 0, x + rng.uniform(0.03, 0.07), 1), OCCLUDER)
    elif kind < 0.35:
        pencil.box((0, rng.uniform(0.82, 0.92), 1, 1), OCCLUDER)


@dataclass(frozen=True)
class Light:
    exposure: float
    """Brightness of RGB; low at night."""
    shading: NDArray[np.float32]
    """(H, W) brightness over the picture."""
    flare: tuple[float, float] | None
    """Where a lamp glares into RGB, in picture coordinates; none by day."""
    gains: NDArray[np.float32]
    """(3,) of this picture alone."""


def _light(rng: np.random.Generator, camera: Camera, framing: Framing, corner: list[int]) -> Light:
    height, width = framing.size
    night = rng.random() < 0.35
    slope = rng.uniform(-0.2, 0.2, 2)
    ramp = 1 + slope[0] * np.linspace(-1, 1, height)[:, None] + slope[1] * np.linspace(-1, 1, width)[None, :]
    top, left = corner[1] // OVERSAMPLING, corner[0] // OVERSAMPLING
    flare = (float(rng.uniform(0, 1)), float(rng.uniform(0, 0.6))) if night and rng.random() < 0.4 else None
    return Light(
        exposure=rng.uniform(0.12, 0.3) if night else rng.uniform(0.8, 1.1),
        shading=(ramp * camera.texture[top : top + height, left : left + width]).astype(np.float32),
        flare=flare,
        gains=rng.uniform(0.9, 1.1, 3).astype(np.float32),
    )


def _expose(
    labels: NDArray[np.uint8], surfaces: Table, camera: Camera, modality: int, light: Light, rng: np.random.Generator
) -> Image.Image:
    """Colour the labels as one modality sees them and develop the picture."""
    if modality == 0:
        table = surfaces[:, :3] * camera.cast
    else:
        gain, offset = camera.gains[modality - 1], camera.offsets[modality - 1]
        table = 255 * (gain * surfaces[:, modality + 2 : modality + 3] + offset)
    drawn = np.take(np.clip(table, 0, 255).astype(np.uint8), labels, axis=0)
    picture = Image.fromarray(drawn if modality == 0 else drawn[..., 0]).reduce(OVERSAMPLING)
    height, width = picture.size[1], picture.size[0]
    radius = camera.blur * height * (1, 1, 1.8)[modality]
    if radius > 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(radius))
    values = np.asarray(picture, np.float32).reshape(height, width, -1)
    gain = light.gains[modality] * (light.exposure if modality == 0 else 1.0)
    values = values * (gain * (light.shading if modality < 2 else np.sqrt(light.shading))[..., None])
    if modality == 0 and light.flare is not None:
        values += _flare(light.flare, height, width)[..., None]
    values += rng.standard_normal(values.shape, np.float32) * camera.noise
    developed = np.clip(values, 0, 255).astype(np.uint8)
    return Image.fromarray(developed if modality == 0 else np.repeat(developed, 3, axis=2))


def _flare(centre: tuple[float, float], height: int, width: int) -> NDArray[np.float32]:
    size = max(height, width)
    y = (np.arange(height)[:, None] - centre[1] * height) / size
    x = (np.arange(width)[None, :] - centre[0] * width) / size
    return (230 * np.exp(-(x * x + y * y) / 0.012)).astype(np.float32)
