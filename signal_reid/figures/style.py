"""The style of every picture: a paper's column widths and type sizes, colours that stay apart in grey."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from signal_reid.runtime.errors import InputError
from signal_reid.runtime.spare_memory import require_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Width = Literal["column", "page"]
WIDTHS: dict[Width, float] = {"column": 3.3, "page": 6.9}
"""Inches of one column of a two-column paper, and of both with what is between them."""
SMALL, USUAL = 7.0, 8.0
"""Points of labels, and of titles."""
DPI = 300

INK, SOFT, LINE, PAPER = "#1a1a1a", "#595959", "#bfbfbf", "#ffffff"
SERIES = ("#004c7a", "#d55e00", "#56b4e9", "#cc79a7", "#009e73")
"""Colours of series, after Okabe and Ito, the first three from dark to light in grey; dashes and markers differ too."""
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
HEAT = "cividis"
"""A colour map that is told apart by colour-blind readers and grows lighter throughout."""

_DRAWING = 2**26  # bytes; one figure takes up to 45 MB, in small pieces, whose lack Python and pybind11 may not survive
_NO_TEXT = re.compile("[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a file's name may hold a dollar sign
    "font.size": SMALL,
    "axes.titlesize": USUAL,
    "axes.labelsize": SMALL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "figure.titlesize": USUAL,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.0,
    "ytick.major.size": 2.0,
    "lines.linewidth": 1.2,
    "patch.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "pdf.fonttype": 42,  # publishers ask for TrueType
    "svg.fonttype": "path",  # the same everywhere
    "svg.hashsalt": "signal-reid",  # the same picture is the same file
}


def legible(text: str) -> str:
    """A text with replacements for what no figure can hold: names of files may have control characters."""
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)


@contextmanager
def drawing_style(**changes: Any) -> Iterator[None]:
    """Matplotlib's settings inside the block are these, whatever the user's own style is.

    Raises:
        InputError: Matplotlib is not installed.
        MemoryError: there is not enough to draw with.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError("pictures need Matplotlib: pip install matplotlib") from None
    require_memory(_DRAWING)
    with mpl.rc_context():
        mpl.rcdefaults()
        settings: Any = {**_STYLE, **changes}
        mpl.rcParams.update(settings)
        yield


def new_figure(width: Width, height: float) -> Figure:
    """An empty figure, known to no global state; call it inside `drawing_style`.

    Args:
        width: of one column of a paper, or of its page.
        height: in inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTHS[width], height), facecolor=PAPER)
