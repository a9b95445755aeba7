"""What class tokens attend to: in SIM's interaction over all modalities, and in the last blocks of the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.figures import Layer, LayeredImages, Picture, Table
from signal_reid.figures.grid import Area, ImageGrid, draw_heat, draw_image, draw_outline, image_grid, inches
from signal_reid.figures.style import HEAT, SMALL, Width, drawing_style
from signal_reid.methods.base import Method
from signal_reid.methods.pictures import MethodPicture, Shown, Subjects
from signal_reid.methods.signal.selective_interaction import CrossModalInteraction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from signal_reid.methods.signal.model import Signal

BLOCKS = 3
"""How many of the backbone's blocks are drawn."""
SCALE = 0.4
"""Inches below the images, for the scale of colours."""


@dataclass(frozen=True, eq=False)
class Attended:
    """What class tokens attend to in some samples, on average over heads.

    Args:
        interaction: (B, M, M, rows, columns), [b, q, m] what q's class token gives to modality m's tokens, which sums
            to 1 over m, rows and columns; none where the model has no SIM.
        kept: (B, M, rows, columns) bool, the tokens that SIM keeps; none where the model has no SIM.
        backbone: (B, blocks, M, rows, columns), what the class token gives to its own modality's patches, the last
            block's last; none where the backbone does not tell.
        title: of the model; may be empty.
    """

    interaction: Tensor | None
    kept: Tensor | None
    backbone: Tensor | None
    title: str = ""

    @property
    def rows(self) -> list[tuple[Tensor, Tensor | None]]:
        """The attention of each row of the picture (B, M, rows, columns), and in SIM's the kept tokens."""
        rows: list[tuple[Tensor, Tensor | None]] = []
        if self.interaction is not None:
            rows += [(part, self.kept) for part in self.interaction.unbind(1)]
        if self.backbone is not None:
            rows += [(part, None) for part in self.backbone.unbind(1)]
        return rows

    def labels(self, modalities: Sequence[str]) -> list[str]:
        """A phrase for each row."""
        labels = [f"SIM, {name}'s class token" for name in modalities] if self.interaction is not None else []
        blocks = self.backbone.shape[1] if self.backbone is not None else 0
        return labels + [f"backbone, last block{f' but {i}' if i else ''}" for i in reversed(range(blocks))]


def find_attended(model: Signal, inputs: Tensor, cameras: Tensor | None = None, title: str = "") -> Attended:
    """Run a model and tell what its class tokens attend to.

    Args:
        model: any.
        inputs: (B, M, 3, H, W) normalised images.
        cameras: (B,) int64, or none.
        title: of the model.
    """
    (B, M), grid = inputs.shape[:2], model.backbone.grid_size
    interaction = kept = None
    if model.selective_interaction is not None:
        tokens, cls = model.encode(inputs, cameras)
        mask = model.selective_interaction.selection(tokens, cls)  # (B, M, N)
        given = interaction_attention(model.selective_interaction.interaction, tokens, mask, cls)
        interaction, kept = given.mean(1).unflatten(-1, grid).cpu(), mask.unflatten(-1, grid).cpu()
    repeated = cameras.repeat_interleave(M) if cameras is not None else None
    backbone = model.backbone.class_attention(inputs.flatten(0, 1), repeated, BLOCKS)  # (blocks, B * M, heads, N)
    if backbone is not None:
        backbone = backbone.mean(2).unflatten(-1, grid).unflatten(1, (B, M)).transpose(0, 1).cpu()
    return Attended(interaction, kept, backbone, title)


def interaction_attention(interaction: CrossModalInteraction, tokens: Tensor, mask: Tensor, cls: Tensor) -> Tensor:
    """The probabilities of SIM's attention: softmax(q k^T / sqrt(d)) over all tokens, dropped ones being zero.

    Args:
        interaction: of a model.
        tokens: (B, M, N, C).
        mask: (B, M, N) bool.
        cls: (B, M, C).

    Returns:
        (B, heads, M, M, N) fp32; [b, h, q, m] is what q's class token gives to modality m's tokens.
    """
    B, M, N, C = tokens.shape
    heads = interaction.heads
    weight, bias = interaction.qkv.weight.view(3, C, C), interaction.qkv.bias.view(3, C)
    q = F.linear(cls, weight[0], bias[0]).view(B, M, heads, C // heads)
    k = F.linear(tokens * mask[..., None], weight[1], bias[1]).view(B, M * N, heads, C // heads)
    scores = torch.einsum("bqhd,bnhd->bhqn", q.float(), k.float()) * (C // heads) ** -0.5
    return scores.softmax(-1).unflatten(-1, (M, N))


def draw_attended(
    found: Sequence[Attended],
    images: Tensor,
    names: Sequence[str],
    modalities: Sequence[str],
    area: Area,
    width: Width | None = None,
) -> ImageGrid:
    """Draw what class tokens attend to.

    Args:
        found: of one model, or of several to stand side by side, which have the same rows.
        images: (B, M, 3, H, W) uint8.
        names: of the samples.
        modalities: of a sample's images.
        area: the part of an image that the grid of tokens divides evenly: top, left, bottom, right in pixels.
        width: of a paper's column or page; none: what suits the number of images.

    Returns:
        Rows: the images; SIM's interaction by each class token, dropped tokens outlined; the backbone's last blocks.
        Each row of a sample has a scale of its own, from 0 to its largest value.
    """
    labels = [f"{kind},\n{what}" for kind, what in (label.split(", ", 1) for label in found[0].labels(modalities))]
    labels = [label.replace("'s class", "'s\nclass").replace(" but", "\nbut") for label in labels]
    aspect = images.shape[-2] / images.shape[-1]
    with drawing_style():
        below = [row for row, (_, kept) in enumerate(found[0].rows, start=1) if kept is not None]
        titles = [attended.title for attended in found]
        rows = ["image", *labels]
        grid = image_grid(names, titles, rows, modalities, aspect, captions=below, below=SCALE, width=width)
        for sample, group in enumerate(grid.axes):
            for block, attended in zip(group, found, strict=True):
                for axes, image in zip(block[0], images[sample], strict=True):
                    draw_image(axes, image)
                for axes_row, (given, kept) in zip(block[1:], attended.rows, strict=True):
                    _draw_row(axes_row, images[sample], given[sample], None if kept is None else kept[sample], area)
        _draw_scale(grid)
    return grid


def _draw_row(row: list[Axes], images: Tensor, given: Tensor, kept: Tensor | None, area: Area) -> None:
    """Attention (M, rows, columns) over images (M, 3, H, W)."""
    for m, axes in enumerate(row):
        draw_heat(axes, scaled(given)[m], area, images[m])
        if kept is not None:
            draw_outline(axes, ~kept[m], area, "white", 0.5)
            axes.set_xlabel(f"{given[m].sum():.0%}", fontsize=SMALL, labelpad=1.5)


def scaled(given: Tensor) -> Tensor:
    """(..., M, rows, columns) over the largest of the last three dimensions."""
    return given / given.amax((-3, -2, -1), keepdim=True).clamp_min(torch.finfo(given.dtype).tiny)


def _draw_scale(grid: ImageGrid) -> None:
    import matplotlib as mpl

    _, bottom, across, _ = grid.below
    axes = grid.figure.add_axes(inches(grid.figure, (across / 2 - 0.6, bottom + 0.22, 1.2, 0.08)))
    axes.imshow(torch.linspace(0, 1, 256)[None].numpy(), cmap=mpl.colormaps[HEAT], aspect="auto", extent=(0, 1, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([0, 1], ["none", "most of the row"])


class Attention(MethodPicture):
    """What `signal-reid show attention` draws."""

    name = "attention"
    title = "Attention of class tokens"
    about = "what class tokens attend to in SIM's interaction and in the backbone's last blocks"

    def draw(self, models: Mapping[str, Method], subjects: Subjects, width: Width | None = None) -> Picture:
        shown = subjects.chosen(1 if len(models) > 1 else 3)
        signals = cast("Mapping[str, Signal]", models)
        found = [find_attended(model, shown.inputs, shown.cameras, title) for title, model in signals.items()]
        area, modalities = next(iter(models.values())).backbone.token_area, subjects.modalities

        def figure() -> Figure:
            return draw_attended(found, shown.images, shown.names, modalities, area, width).figure

        layers = [layers_of(attended, shown, modalities, area) for attended in found]
        tables = [numbers(attended, shown.names, modalities) for attended in found]
        return Picture(self.name, self.title, figure, CAPTION, _left_out(found[0]), tables, layers)


CAPTION = (
    "What class tokens attend to, on average over heads. First row: the images. Rows of SIM: one modality's class "
    "token over the tokens of all modalities, dropped ones outlined; below each image is its share of the attention. "
    "Rows of the backbone: each modality's class token over its own patches. Each row of a sample has a scale of its "
    "own, from none to the most that a token of the row gets."
)


def _left_out(attended: Attended) -> list[str]:
    notes = []
    if attended.interaction is None:
        notes.append("There is no row of SIM: the model has no selective interaction.")
    if attended.backbone is None:
        notes.append("There is no row of the backbone: it does not tell what its class token attends to.")
    return notes


def layers_of(attended: Attended, shown: Shown, modalities: Sequence[str], area: Area) -> LayeredImages:
    """The rows of the picture as layers that colour the images."""
    labels = attended.labels(modalities)
    layers = [Layer(label, scaled(given)) for label, (given, _) in zip(labels, attended.rows, strict=True)]
    return LayeredImages(shown.images, shown.names, modalities, area, layers, attended.title)


def numbers(attended: Attended, names: Sequence[str], modalities: Sequence[str]) -> Table:
    """The share of each modality, of dropped tokens, and over how many tokens the attention is spread.

    In rows of the backbone, each modality's share is of its own class token's attention, the rest of which the class
    token keeps to itself; and the spread is the mean over modalities.
    """
    rows: list[list[str | float]] = []
    for i, name in enumerate(names):
        for label, (given, kept) in zip(attended.labels(modalities), attended.rows, strict=True):
            one = given[i].double()
            dropped: float | str = one[~kept[i]].sum().item() if kept is not None else ""
            over = spread(one) if kept is not None else sum(map(spread, one)) / len(one)
            rows.append([name, label, *one.sum((-2, -1)).tolist(), dropped, over])
    title = "Shares of attention" + (f", {attended.title}" if attended.title else "")
    return Table(title, ["sample", "of", *modalities, "dropped tokens", "spread over"], rows)


def spread(given: Tensor) -> float:
    """Over how many tokens attention is spread: the exponential of its entropy, once it sums to 1."""
    p = given.flatten() / given.sum()
    return torch.special.entr(p).sum().exp().item()
