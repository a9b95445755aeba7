"""Renders a template as one HTML file that needs no other, within a stated size."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from signal_reid.report.contents import camera_caption
from signal_reid.report.images import SIDES, PageImages
from signal_reid.report.tables import csv_uri
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_atomically

SIZE_LIMIT = 10_000_000
"""Bytes of a page; the images are scaled so that it is kept."""


def write_page(path: str | Path, template: str, size_limit: int = SIZE_LIMIT, **contents: Any) -> None:
    """Write a page whole or not at all.

    Args:
        path: the file to replace.
        template: the name of a template that extends `page.html.j2`.
        size_limit: bytes of the file; its images are scaled down together until it fits.
        contents: what the template reads, beside `images`, `style`, `script` and `policy`.

    Raises:
        FileNotFoundError: no such directory.
        InputError: the page does not fit even with the smallest images.
    """
    write_atomically(Path(path), render(template, size_limit, **contents))


def render(template: str, size_limit: int = SIZE_LIMIT, **contents: Any) -> bytes:
    """The bytes of a page; see `write_page`."""
    style, script = _asset("report.css"), _asset("report.js")
    page = _environment().get_template(template)
    size = 0
    for side in SIDES:
        images = PageImages(side)
        text = page.render(
            images=images, style=style, script=script, policy=_policy(style, script), limit=size_limit, **contents
        )
        encoded = text.encode("utf-8", "backslashreplace")  # the name of a file may hold what is no text
        if (size := len(encoded)) <= size_limit:
            return encoded
    raise InputError(
        f"the page takes {megabytes(size)} with images of at most {SIDES[-1]} pixels, "
        f"and is to take {megabytes(size_limit)}; show fewer queries, or allow a larger page (--size-limit)"
    )


def percent(fraction: float) -> str:
    """A fraction in percent with one decimal, as papers give it."""
    return "n/a" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def megabytes(count: int) -> str:
    """Bytes for a reader."""
    return f"{count / 1e6:.3g} MB"


def in_order(names: Iterable[str]) -> list[str]:
    """Names, each once, in the order of the numbers in them: cam2 before cam10."""
    parts = {name: re.split(r"([0-9]+)", name) for name in names}
    return sorted(parts, key=lambda name: [int(p) if i % 2 else p for i, p in enumerate(parts[name])])


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    """The path of an arrow to its second point, with a head of at most 3 pixels."""
    dx, dy = x1 - x0, y1 - y0
    length = math.hypot(dx, dy)
    if length == 0:
        return f"M{x0:g} {y0:g}h0"
    dx, dy = (min(3.0, 0.5 * length) * part / length for part in (dx, dy))
    left, right = (x1 - dx - 0.5 * dy, y1 - dy + 0.5 * dx), (x1 - dx + 0.5 * dy, y1 - dy - 0.5 * dx)
    head = f"M{left[0]:.1f} {left[1]:.1f}L{x1:.1f} {y1:.1f}L{right[0]:.1f} {right[1]:.1f}"
    return f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}{head}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("signal_reid.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, megabytes=megabytes, csv_uri=csv_uri, in_order=in_order, camera_caption=camera_caption
    )
    environment.globals["arrow"] = arrow
    return environment


def _asset(name: str) -> Markup:
    """A file of the template folder, as it is inside the page."""
    return Markup((files("signal_reid.report") / "templates" / name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """What the page may do: nothing but its own style, its own script and images inside the file."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
