"""Figures as files and as text: PNG, SVG or PDF by the suffix that is asked for."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from signal_reid.figures.style import DPI, drawing_style
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import write_file
from signal_reid.runtime.spare_memory import require_memory_of_codec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
_NO_DATES = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""What Matplotlib would write of the day and of itself: the same picture is to be the same file."""


def picture_path(path: str | Path) -> Path:
    """A path that `save_figure` can write to, checked before there is anything to write.

    Raises:
        InputError: the suffix is none of .png, .svg and .pdf.
        FileNotFoundError: no such directory.
    """
    path = Path(path)
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise InputError(f"a picture's name must end in .png, .svg or .pdf, got {path.name}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: no directory {path.parent}")
    return path


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format that the file's suffix names, whole or not at all.

    Raises:
        InputError: another suffix.
        FileNotFoundError: no such directory.
    """
    path = picture_path(path)
    write_file(path, lambda file: _print(figure, file, path.suffix.lower().removeprefix(".")))


def png_bytes(figure: Figure, dpi: float = DPI) -> bytes:
    """The figure as the content of a PNG file."""
    file = io.BytesIO()
    _print(figure, file, "png", dpi)
    return file.getvalue()


def svg_text(figure: Figure) -> str:
    """The figure as the content of an SVG file whose text stays text, for a page."""
    file = io.BytesIO()
    _print(figure, file, "svg", text="none")
    return file.getvalue().decode()


def _print(figure: Figure, file: BinaryIO, kind: str, dpi: float = DPI, text: str = "path") -> None:
    width, height = (math.ceil(inches * dpi) for inches in figure.get_size_inches())
    require_memory_of_codec(width, height)  # by which Matplotlib writes PNG, and pictures within other formats
    whole = io.BytesIO()  # the writers of PDF and PNG seek, which a file that is written atomically does not
    with drawing_style(**{"svg.fonttype": text}):
        figure.savefig(whole, format=kind, dpi=dpi, metadata=_NO_DATES[kind])
    file.write(whole.getvalue())
