"""Features as a map of two dimensions, and how similar right and wrong pairs are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.evaluation import FeatureSet, dropped
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.evaluation.trained import Trained
from signal_reid.figures import Picture, Table
from signal_reid.figures.style import PAPER, SERIES, SMALL, SOFT, WIDTHS, Width, drawing_style, legible, new_figure
from signal_reid.report.contents import camera_caption
from signal_reid.report.pictures import GeneralPicture, Request
from signal_reid.runtime.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Projection = Literal["pca", "tsne", "umap"]
CameraName = Callable[[int], str]
TITLES: dict[str, str] = {"pca": "principal components", "tsne": "t-SNE", "umap": "UMAP"}
IDENTITIES = 20
"""Identities on a map, where no number is asked for: more are not told apart by colour."""
MARKERS = "os^DvPX*<>hp"
BINS, DRAWN = 4000, 50
"""Bins of the histograms, and at most as many of them as are drawn over the similarities that occur."""
LONGEST = 9
"""Characters of a camera's name in the legend, which has four in a line."""
PAIRS = 2**22
"""Pairs whose similarities are in memory at once."""


def project(features: Tensor, projection: Projection = "pca", seed: int = 0) -> np.ndarray:
    """Place features on a plane; the same features and seed give the same places.

    Args:
        features: (n, d), at least 3; scaled to unit length here, so that distances are what is ranked.
        projection: `pca` needs nothing but PyTorch; `tsne` needs scikit-learn, `umap` umap-learn.
        seed: of t-SNE and UMAP.

    Returns:
        (n, 2) fp64.

    Raises:
        InputError: fewer than 3 features, or the library is not installed.
    """
    if len(features) < 3:
        raise InputError(f"a map needs at least 3 samples, got {len(features)}")
    unit = F.normalize(features.double().cpu(), dim=1)
    if projection == "pca":
        return _principal(unit).numpy()
    values = unit.float().numpy()
    near = min(30, len(values) - 1)
    if projection == "tsne":
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise _missing("tsne", "scikit-learn") from None
        start = _principal(unit)
        start = 1e-4 * start / start[:, 0].std().clamp_min(1e-12)  # its own PCA is randomised where features are many
        perplexity = min(30.0, (len(values) - 1) / 3)
        placed = TSNE(init=start.float().numpy(), perplexity=perplexity, random_state=seed).fit_transform(values)
        return np.asarray(placed, dtype=np.float64)
    try:
        from umap import UMAP
    except ImportError:
        raise _missing("umap", "umap-learn") from None
    placed = UMAP(n_neighbors=min(15, near), random_state=seed, n_jobs=1).fit_transform(values)
    return np.asarray(placed, dtype=np.float64)


def _principal(unit: Tensor) -> Tensor:
    """The two directions of most variance of (n, d) fp64; the largest value in each is positive."""
    centred = unit - unit.mean(0)
    places = torch.zeros(len(unit), 2, dtype=unit.dtype)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = min(2, u.shape[1])
    places[:, :kept] = u[:, :kept] * s[:kept]
    largest = places.gather(0, places.abs().argmax(0, keepdim=True))
    return places * torch.where(largest < 0, -1.0, 1.0)


def _missing(projection: str, library: str) -> InputError:
    return InputError(f"map={projection} needs {library}: pip install 'signal-reid[embedding]'")


@dataclass(frozen=True, eq=False)
class Similarities:
    """Cosine similarities of the pairs that the protocol ranks.

    Args:
        edges: (bins + 1,) of the histograms, from -1 to 1.
        right, wrong: (bins,) how many pairs of one identity, and of two.
        means: of right and wrong pairs; NaN where there are none.
        deviations: standard deviations of both.
    """

    edges: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    means: tuple[float, float]
    deviations: tuple[float, float]

    def drawn(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges, right and wrong of at most `DRAWN` bins over the similarities that occur."""
        used = np.flatnonzero(self.right + self.wrong)
        span = int(used[-1] + 1 - used[0])
        size = -(-span // DRAWN)  # bins that are drawn as one
        count = -(-span // size)
        first = max(0, min(int(used[0]), len(self.right) - size * count))
        starts = np.arange(first, first + size * count, size)
        end = min(first + size * count, len(self.right))
        parts = [np.add.reduceat(counts[:end], starts) for counts in (self.right, self.wrong)]
        return self.edges[[*starts, end]], parts[0], parts[1]

    @property
    def overlap(self) -> float:
        """The area that both drawn histograms, normalised, share: 0 where they are apart; NaN where one is empty."""
        if not self.right.sum() or not self.wrong.sum():
            return float("nan")
        _, right, wrong = self.drawn()
        return float(np.minimum(right / right.sum(), wrong / wrong.sum()).sum())


def similarities(query: FeatureSet, gallery: FeatureSet, protocol: str, bins: int = BINS) -> Similarities:
    """Cosine similarity of each query with each gallery item that the protocol keeps.

    Args:
        query, gallery: on one device.
        protocol: see `dropped`.
        bins: of the histograms.
    """
    units = [F.normalize(items.features.float(), dim=1) for items in (query, gallery)]
    counts, sums = torch.zeros(2, bins, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    step = max(1, PAIRS // len(gallery))
    for start in range(0, len(query), step):
        rows = query[start : start + step]
        cosine = (units[0][start : start + step] @ units[1].T).clamp(-1, 1)
        same = rows.identities[:, None] == gallery.identities
        for kind, pairs in enumerate((same & ~dropped(protocol, rows, gallery), ~same)):
            found = cosine[pairs].double()
            counts[kind] += torch.histc(found.float(), bins, -1, 1).double().cpu()
            sums[kind] += torch.stack([found.new_tensor(len(found)), found.sum(), found.square().sum()]).cpu()
    mean = sums[:, 1] / sums[:, 0]
    deviation = (sums[:, 2] / sums[:, 0] - mean.square()).clamp_min(0).sqrt()
    right, wrong = counts.numpy()
    means, deviations = mean.tolist(), deviation.tolist()
    return Similarities(
        np.linspace(-1, 1, bins + 1), right, wrong, (means[0], means[1]), (deviations[0], deviations[1])
    )


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Samples on a plane.

    Args:
        places: (n, 2).
        identities, cameras: (n,) int64.
        projection: what made the places.
        of: the number of identities that these were chosen from.
    """

    places: np.ndarray
    identities: np.ndarray
    cameras: np.ndarray
    projection: Projection
    of: int


def embedding_map(
    gallery: FeatureSet, projection: Projection = "pca", identities: int = IDENTITIES, seed: int = 0
) -> EmbeddingMap:
    """Place the samples of some identities, spread evenly over all of them."""
    known = gallery.identities.unique().cpu()
    if identities < 1:
        raise InputError(f"count must be at least 1, got {identities}")
    places = torch.linspace(0, len(known) - 1, min(identities, len(known))).round().long()
    kept = gallery[torch.isin(gallery.identities.cpu(), known[places]).to(gallery.features.device)]
    located = project(kept.features, projection, seed)
    return EmbeddingMap(located, kept.identities.cpu().numpy(), kept.cameras.cpu().numpy(), projection, len(known))


def draw_map(found: EmbeddingMap, width: Width = "column", camera_name: CameraName = str) -> Figure:
    """The map alone."""
    with drawing_style():
        figure = new_figure(width, 0.9 * WIDTHS[width])
        figure.set_layout_engine("constrained")
        _draw_map(figure.add_subplot(), found, camera_name)
    return figure


def draw_similarities(pairs: Similarities, width: Width = "column") -> Figure:
    """The histograms alone."""
    with drawing_style():
        figure = new_figure(width, 0.9 * WIDTHS[width])
        figure.set_layout_engine("constrained")
        _draw_similarities(figure.add_subplot(), pairs)
    return figure


def draw_embedding(
    found: EmbeddingMap, pairs: Similarities, width: Width = "page", camera_name: CameraName = str
) -> Figure:
    """The map, coloured by identity and shaped by camera, and the histograms of similarities beside (below) it."""
    with drawing_style():
        beside = width == "page"
        figure = new_figure(width, 3.2 if beside else 5.4)
        grid = (
            figure.add_gridspec(1, 2, width_ratios=(1.25, 1))
            if beside
            else figure.add_gridspec(2, 1, height_ratios=(1.5, 1))
        )
        figure.set_layout_engine("constrained")
        _draw_map(figure.add_subplot(grid[0]), found, camera_name)
        _draw_similarities(figure.add_subplot(grid[1]), pairs)
    return figure


def _draw_map(axes: Axes, found: EmbeddingMap, camera_name: CameraName) -> None:
    colours = identity_colours(len(np.unique(found.identities)))
    for i, identity in enumerate(np.unique(found.identities)):
        for camera in np.unique(found.cameras):
            chosen = (found.identities == identity) & (found.cameras == camera)
            marker = MARKERS[int(camera) % len(MARKERS)]
            axes.plot(*found.places[chosen].T, marker, color=colours[i], markersize=3.5, markeredgewidth=0)
        middle = found.places[found.identities == identity].mean(0)
        ground = {"facecolor": PAPER, "alpha": 0.7, "linewidth": 0, "pad": 0.6}
        axes.annotate(str(identity), middle, fontsize=SMALL, ha="center", va="center", bbox=ground)
    for camera in np.unique(found.cameras):
        label = legible(camera_caption(camera_name(int(camera)), LONGEST))
        axes.plot([], [], MARKERS[int(camera) % len(MARKERS)], color=SOFT, markersize=3.5, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4, handletextpad=0.1, columnspacing=1)
    axes.set_title(f"{TITLES[found.projection]}, colour and number: identity")
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_similarities(axes: Axes, pairs: Similarities) -> None:
    edges, right, wrong = pairs.drawn()
    lines: list[tuple[str, np.ndarray, Any]] = [("right pairs", right, "-"), ("wrong pairs", wrong, "--")]
    for i, (label, counts, line) in enumerate(lines):
        if counts.sum():
            share = counts / counts.sum()
            axes.stairs(share, edges, color=SERIES[i], linestyle=line, label=label, linewidth=1.2)
            axes.stairs(share, edges, color=SERIES[i], alpha=0.2, fill=True)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel("share of the pairs")
    axes.set_title("similarity of pairs")
    axes.legend()


def identity_colours(count: int) -> list[tuple[float, float, float]]:
    """Colours around the circle of hues, of three lightnesses that are seen on white and on black."""
    from matplotlib.colors import hsv_to_rgb

    return [tuple(hsv_to_rgb((i / max(1, count), 0.85, (0.75, 0.55, 0.9)[i % 3]))) for i in range(count)]


def map_picture(found: EmbeddingMap, camera_name: CameraName = str) -> Picture:
    """The map with its numbers.

    Args:
        found: the map.
        camera_name: from the number of a camera to what it is called, such as `Dataset.camera_name`.
    """
    shown = len(np.unique(found.identities))
    caption = (
        f"{len(found.places)} gallery samples of {shown} of {found.of} identities on a plane "
        f"({TITLES[found.projection]}); colour and number are the identity, the shape is the camera."
    )
    rows: list[list[str | int | float]] = [
        [int(identity), camera_name(int(camera)), float(x), float(y)]
        for identity, camera, (x, y) in zip(found.identities, found.cameras, found.places, strict=True)
    ]
    table = Table("Places on the map", ["identity", "camera", "x", "y"], rows)
    return Picture(
        "embedding", "Features on a plane", draw_map(found, camera_name=camera_name), caption, tables=[table]
    )


def similarities_picture(pairs: Similarities) -> Picture:
    """The histograms with their numbers."""
    caption = "Cosine similarities of queries with gallery items of their own identity (right pairs) and of others."
    notes = [
        f"The histograms of right and wrong pairs share {pairs.overlap:.1%} of their area; apart, they share none."
    ]
    counts = (int(pairs.right.sum()), int(pairs.wrong.sum()))
    rows: list[list[str | int | float]] = [
        [kind, counts[i], pairs.means[i], pairs.deviations[i]] for i, kind in enumerate(("right", "wrong"))
    ]
    table = Table("Cosine similarity", ["pairs", "number", "mean", "deviation"], rows)
    return Picture("similarities", "Similarity of pairs", draw_similarities(pairs), caption, notes, [table])


class EmbeddingPicture(GeneralPicture):
    """What `signal-reid show embedding` draws."""

    name = "embedding"
    title = "Features on a plane"
    about = "a map of test identities (--map pca, tsne or umap), and similarities of right and wrong pairs"

    def draw(self, trained: Trained, request: Request) -> Picture:
        evaluation = Evaluator(trained.config, trained.dataset, trained.device).run(trained.model)
        seed = trained.config.training.seed
        count = IDENTITIES if request.count is None else request.count
        found = embedding_map(evaluation.gallery, request.map, count, seed)
        pairs = similarities(evaluation.query, evaluation.gallery, trained.config.evaluation.protocol)
        camera_name = trained.dataset.camera_name
        placed, similar = map_picture(found, camera_name), similarities_picture(pairs)
        figure = draw_embedding(found, pairs, request.width or "page", camera_name)
        caption = f"{placed.caption} {similar.caption}"
        return Picture(self.name, self.title, figure, caption, similar.notes, [*similar.tables, *placed.tables])
