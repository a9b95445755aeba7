"""What all pictures share: one style for print, their parts as values, and files that appear whole or not at all.

Nothing here knows a model. `signal_reid.methods.pictures` says how a method offers pictures,
`signal_reid.report.pictures` holds those of any method, and `signal_reid.show` draws either. Matplotlib is imported
when a picture is drawn.
"""

from signal_reid.figures.contents import Layer, LayeredImages, Picture, Table
from signal_reid.figures.saving import picture_path, png_bytes, save_figure, svg_text

__all__ = [
    "Layer",
    "LayeredImages",
    "Picture",
    "Table",
    "picture_path",
    "png_bytes",
    "save_figure",
    "svg_text",
]
