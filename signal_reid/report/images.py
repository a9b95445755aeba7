"""Images as text inside a page, scaled so that the page stays within its size."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from signal_reid.figures import png_bytes
from signal_reid.runtime.spare_memory import require_memory_of_codec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDES = (256, 192, 144, 112, 88, 64, 48, 32)
"""The largest width and height of an image in a page, in pixels: the first of these that keeps the page's size."""
QUALITY = 85
FIGURE_DPI = 200
"""Dots per inch of a figure, where nothing is scaled."""


class PageImages:
    """Encodes the images of one page, and counts what it had to scale.

    Args:
        side: the largest width and height, in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.count = 0
        self.scaled = 0

    def uri(self, image: Tensor) -> Markup:
        """An image (3, H, W) uint8 as the data URI of a JPEG."""
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        self.count += 1
        if max(picture.size) > self.side:
            self.scaled += 1
            picture.thumbnail((self.side, self.side), Image.Resampling.BICUBIC)
        return _uri(picture, "jpeg", quality=QUALITY)

    def uris(self, images: Tensor) -> list[Markup]:
        """Each image of (M, 3, H, W) uint8 as the data URI of a JPEG."""
        return [self.uri(image) for image in images]

    def figure(self, figure: Figure) -> tuple[Markup, int, int]:
        """A figure as the data URI of a PNG of 256 colours, with its width and height in CSS pixels."""
        self.count += 1
        dpi = FIGURE_DPI * self.side / SIDES[0]
        if dpi < FIGURE_DPI:
            self.scaled += 1
        drawn = Image.open(io.BytesIO(png_bytes(figure, dpi)))
        require_memory_of_codec(*drawn.size)
        picture = drawn.convert("RGB").quantize(256)
        width, height = (round(96 * size) for size in figure.get_size_inches())
        return _uri(picture, "png"), width, height

    @property
    def note(self) -> str:
        """What happened to the images encoded so far."""
        if not self.scaled:
            return f"None of its {self.count} images had to be scaled down."
        return f"{self.scaled} of its {self.count} images were scaled down, to at most {self.side} pixels a side."


def _uri(picture: Image.Image, kind: str, **options: int) -> Markup:
    require_memory_of_codec(*picture.size)
    file = io.BytesIO()
    picture.save(file, kind, optimize=True, **options)  # a tenth smaller, tiny ones by half
    return Markup(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
