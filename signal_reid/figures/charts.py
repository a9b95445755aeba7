"""Small charts that several pictures have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signal_reid.figures.style import DASHES, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40


def histogram_lines(axes: Axes, series: Mapping[str, Tensor], limits: tuple[float, float], bins: int = BINS) -> float:
    """Histograms over each other as lines that differ in colour and in dashes.

    Args:
        axes: to draw in.
        series: values (n,) by name.
        limits: of the bins.
        bins: how many.

    Returns:
        The largest share of a bin, so that charts side by side can have one scale.
    """
    edges, most = torch.linspace(*limits, bins + 1), 0.0
    for i, (name, values) in enumerate(series.items()):
        share = shares(values, limits, bins)
        drawn = axes.stairs(share.numpy(), edges.numpy(), label=name, linewidth=1.2, color=SERIES[i % len(SERIES)])
        drawn.set(linestyle=DASHES[i % len(DASHES)])
        most = max(most, share.max().item())
    axes.set_xlim(*limits)
    axes.set_ylim(0, 1.05 * most or 1.0)
    return most


def shares(values: Tensor, limits: tuple[float, float], bins: int = BINS) -> Tensor:
    """The share of values (n,) in each of the equal bins between the limits, (bins,)."""
    counted = torch.histc(values.float().cpu(), bins, *limits)
    return counted / max(1, values.numel())
