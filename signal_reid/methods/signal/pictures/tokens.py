"""The patch tokens that SIM keeps, and by whose class token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signal_reid.figures import Layer, LayeredImages, Picture, Table
from signal_reid.figures.grid import Area, draw_image, draw_marked, image_grid
from signal_reid.figures.style import SMALL, Width, drawing_style
from signal_reid.methods.base import Method
from signal_reid.methods.pictures import MethodPicture, Shown, Subjects
from signal_reid.methods.signal.selective_interaction import TokenSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from signal_reid.methods.signal.model import Signal


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The tokens that SIM keeps of some samples.

    Args:
        kept_by: (B, M, M, rows, columns) bool; [b, q, m] are modality m's tokens that q's class token keeps.
        title: of the model; may be empty.
    """

    kept_by: Tensor
    title: str = ""

    @property
    def kept(self) -> Tensor:
        """(B, M, rows, columns) bool, those that any class token keeps."""
        return self.kept_by.any(1)

    @property
    def own(self) -> Tensor:
        """(B, M, rows, columns) bool, those that the modality's own class token keeps."""
        return self.kept_by.diagonal(dim1=1, dim2=2).movedim(-1, 1)


def find_kept(model: Signal, inputs: Tensor, cameras: Tensor | None = None, title: str = "") -> KeptTokens:
    """Run a model and tell which tokens it keeps.

    Args:
        model: with SIM.
        inputs: (B, M, 3, H, W) normalised images.
        cameras: (B,) int64, or none.
        title: of the model.
    """
    assert model.selective_interaction is not None
    kept = kept_by_each(model.selective_interaction.selection, *model.encode(inputs, cameras))
    return KeptTokens(kept.unflatten(-1, model.backbone.grid_size).cpu(), title)


def kept_by_each(selection: TokenSelection, tokens: Tensor, cls: Tensor) -> Tensor:
    """Whose class token keeps which tokens; the union over them is the selection's mask.

    Args:
        selection: of a model.
        tokens: (B, M, N, C).
        cls: (B, M, C).

    Returns:
        (B, M, M, N) bool; [b, q, m] are modality m's tokens that q's class token keeps.
    """
    B, M, N, _ = tokens.shape
    inter_query, k_inter = selection.inter_query(cls).to(tokens.dtype), selection.k_inter(M, N)
    with torch.autocast(tokens.device.type, enabled=False):  # it would round the scores
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        own = torch.einsum("bmc,bmnc->bmn", cls.to(wide.dtype), wide)
        across = torch.einsum("bqc,bmnc->bqmn", inter_query.to(wide.dtype), wide)
    kept = torch.zeros(B, M, M, N, dtype=torch.bool, device=tokens.device)
    for q in range(M):
        others = [m for m in range(M) if m != q]
        kept[:, q, q] = _best(own[:, q], selection.k_intra)
        kept[:, q, others] = _best(across[:, q, others].flatten(1), k_inter).unflatten(1, (M - 1, N))
    return kept


def _best(scores: Tensor, k: int) -> Tensor:
    """Mask of the k largest of the last dimension; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def draw_kept(
    found: Sequence[KeptTokens],
    images: Tensor,
    names: Sequence[str],
    modalities: Sequence[str],
    area: Area,
    width: Width | None = None,
) -> Figure:
    """Draw the kept tokens of samples.

    Args:
        found: of one model, or of several to stand side by side.
        images: (B, M, 3, H, W) uint8.
        names: of the samples.
        modalities: of a sample's images.
        area: the part of an image that the grid of tokens divides evenly: top, left, bottom, right in pixels.
        width: of a paper's column or page; none: what suits the number of images.

    Returns:
        Rows: the images, the tokens that are kept, then those that each class token keeps, its own modality's in a
        thick frame. Below each, the number of tokens.
    """
    rows = ["image", "kept", *(f"kept by\n{name}'s\nclass token" for name in modalities)]
    aspect = images.shape[-2] / images.shape[-1]
    with drawing_style():
        titles = [kept.title for kept in found]
        grid = image_grid(names, titles, rows, modalities, aspect, captions=range(1, len(rows)), width=width)
        for sample, group in enumerate(grid.axes):
            for block, kept in zip(group, found, strict=True):
                _draw_sample(block, images[sample], kept.kept_by[sample], area)
    return grid.figure


def _draw_sample(block: list[list[Axes]], images: Tensor, kept_by: Tensor, area: Area) -> None:
    """Rows of axes for images (M, 3, H, W) and (M, M, rows, columns)."""
    for axes, image in zip(block[0], images, strict=True):
        draw_image(axes, image)
    for row, masks in zip(block[1:], [kept_by.any(0), *kept_by], strict=True):
        for axes, image, mask in zip(row, images, masks, strict=True):
            draw_image(axes, image)
            draw_marked(axes, mask, area)
            axes.set_xlabel(f"{int(mask.sum())} of {mask.numel()}", fontsize=SMALL, labelpad=1.5)
    for q, row in enumerate(block[2:]):
        for side in row[q].spines.values():
            side.set_linewidth(1.6)


class Tokens(MethodPicture):
    """What `signal-reid show tokens` draws."""

    name = "tokens"
    title = "Token selection"
    about = "the patch tokens that SIM keeps, and by whose class token"
    parts = ("selective_interaction",)

    def draw(self, models: Mapping[str, Method], subjects: Subjects, width: Width | None = None) -> Picture:
        shown = subjects.chosen(1 if len(models) > 1 else 3)
        found = [find_kept(_signal(model), shown.inputs, shown.cameras, title) for title, model in models.items()]
        area = next(iter(models.values())).backbone.token_area

        def figure() -> Figure:
            return draw_kept(found, shown.images, shown.names, subjects.modalities, area, width)

        layers = [layers_of(kept, shown, subjects.modalities, area) for kept in found]
        tables = [counts(kept, shown.names, subjects.modalities) for kept in found]
        return Picture(self.name, self.title, figure, _caption(subjects.modalities), (), tables, layers)


def layers_of(kept: KeptTokens, shown: Shown, modalities: Sequence[str], area: Area) -> LayeredImages:
    """The kept tokens as layers: all, each modality's own, and those that each class token keeps of the others."""
    layers = [Layer("kept by any class token", kept.kept), Layer("kept by its own class token", kept.own)]
    for q, name in enumerate(modalities):
        cells = kept.kept_by[:, q].clone()
        cells[:, q] = False
        layers.append(Layer(f"kept by {name}'s class token", cells))
    return LayeredImages(shown.images, shown.names, modalities, area, layers, kept.title)


def counts(kept: KeptTokens, names: Sequence[str], modalities: Sequence[str]) -> Table:
    """How many tokens of each modality are kept, and by whom."""
    total = kept.kept.shape[-2] * kept.kept.shape[-1]
    rows: list[list[str | int]] = []
    for name, any_kept, kept_by in zip(names, kept.kept, kept.kept_by, strict=True):
        causes = {"any class token": any_kept, **{f"{m}'s": kept_by[q] for q, m in enumerate(modalities)}}
        rows += [[name, cause, *mask.sum((-2, -1)).tolist()] for cause, mask in causes.items()]
    title = f"Tokens kept of {total}" + (f", {kept.title}" if kept.title else "")
    return Table(title, ["sample", "kept by", *modalities], rows)


def _caption(modalities: Sequence[str]) -> str:
    each = ", ".join(modalities)
    return (
        f"The patch tokens that selective interaction keeps of each modality ({each}). First row: the images. Second "
        "row: the tokens that any class token keeps; the others are veiled. Rows below: the tokens that one modality's "
        "class token keeps, its own modality's in a thick frame. Below each image: how many tokens that are."
    )


def _signal(model: Method) -> Signal:
    from signal_reid.methods.signal.model import Signal

    assert isinstance(model, Signal)
    return model
