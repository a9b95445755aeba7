"""What GAM tells apart: the volumes of a batch, matched against mismatched, and what the temperature makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid.figures import Picture, Table
from signal_reid.figures.charts import histogram_lines
from signal_reid.figures.grid import inches
from signal_reid.figures.style import HEAT, INK, SERIES, SOFT, WIDTHS, Width, drawing_style, new_figure
from signal_reid.methods.base import Method
from signal_reid.methods.pictures import MethodPicture, Subjects
from signal_reid.ops import gramian_volume, mean_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from signal_reid.methods.signal.model import Signal

TEMPERATURES = torch.logspace(-4, 1, 201, dtype=torch.float64)
"""Where the loss is looked at to find the temperature that suits it best."""
HIGH = 1.95
"""Inches of a line of charts."""
SIDE = HIGH - 0.68
"""Inches of a chart's height, and of the matrix's sides."""
BOXES = ((0.3, SIDE), (2.55, 1.8), (4.95, 1.83))
"""Left and width, in inches, of the three charts of a page's line."""
NOTHING = 0.05
"""Share of the way from guessing to the least loss below which GAM is said to have learned nothing."""


@dataclass(frozen=True, eq=False)
class Volumes:
    """The volumes of a batch and what GAM's loss makes of them.

    Args:
        volumes: (B, B) fp64; [i, j] is spanned by the first modality of sample i and the others of sample j.
        identities: (B,) int64.
        similarity: of each modality, the mean cosine between the mean tokens of different samples.
        temperature: of the model, positive.
        label_smoothing: of the loss.
        title: of the model; may be empty.
    """

    volumes: Tensor
    identities: Tensor
    similarity: tuple[float, ...]
    temperature: float
    label_smoothing: float
    title: str = ""

    def losses(self, temperatures: Tensor) -> Tensor:
        """(T,) -> (T,) fp64, GAM's loss at other temperatures: the mean cross-entropy of all rows and columns."""
        logits = -self.volumes / temperatures.to(self.volumes)[:, None, None]  # (T, B, B)
        target = torch.arange(len(self.volumes)).expand(len(temperatures), -1)
        return torch.stack(
            [
                F.cross_entropy(lines, target, label_smoothing=self.label_smoothing, reduction="none").mean(-1)
                for lines in (logits.transpose(1, 2), logits)  # classes are the second dimension: rows, then columns
            ]
        ).mean(0)

    @property
    def loss(self) -> float:
        """At the model's own temperature."""
        return self.losses(torch.tensor([self.temperature])).item()

    @property
    def guessing(self) -> float:
        """The loss of one who tells nothing apart: ln(B)."""
        return math.log(len(self.volumes))

    @property
    def least(self) -> float:
        """The least loss that there can be, which label smoothing keeps above 0: the entropy of its targets."""
        B, smoothing = len(self.volumes), self.label_smoothing
        right, wrong = 1 - smoothing + smoothing / B, smoothing / B
        return -right * math.log(right) - ((B - 1) * wrong * math.log(wrong) if wrong else 0.0)

    @property
    def way(self) -> float:
        """How much of the way from guessing to the least loss is behind the model; below 0 where it is worse."""
        return (self.guessing - self.loss) / (self.guessing - self.least)

    @property
    def best(self) -> tuple[float, float]:
        """The temperature at which these volumes would have the least loss, and that loss."""
        losses = self.losses(TEMPERATURES)
        at = int(losses.argmin())
        return TEMPERATURES[at].item(), losses[at].item()

    @property
    def worth_it(self) -> bool:
        """Whether the best temperature would do noticeably better than guessing."""
        return self.guessing - self.best[1] >= NOTHING * (self.guessing - self.least)

    @property
    def found(self) -> tuple[float, float]:
        """The share of lines (rows and columns) whose match has the least volume, and the share of those in which some
        sample of the same identity has it."""
        first = torch.cat([self.volumes.argmin(1), self.volumes.argmin(0)])
        index = torch.arange(len(self.volumes)).repeat(2)
        same = self.identities[first] == self.identities[index]
        return (first == index).double().mean().item(), same.double().mean().item()

    @property
    def groups(self) -> dict[str, Tensor]:
        """The volumes of matched samples, of others of the same identity, and of other identities; none is empty."""
        diagonal = torch.eye(len(self.volumes), dtype=torch.bool)
        same = (self.identities[:, None] == self.identities) & ~diagonal
        groups = {
            "matched": self.volumes[diagonal],
            "same identity": self.volumes[same],
            "other identity": self.volumes[~same & ~diagonal],
        }
        return {name: values for name, values in groups.items() if len(values)}


def find_volumes(
    model: Signal, inputs: Tensor, identities: Tensor, cameras: Tensor | None = None, title: str = ""
) -> Volumes:
    """Run a model and take the volumes of all pairs of samples.

    Args:
        model: with GAM.
        inputs: (B, M, 3, H, W) normalised images.
        identities: (B,) int64.
        cameras: (B,) int64, or none.
        title: of the model.
    """
    alignment = model.global_alignment
    assert alignment is not None
    features = F.normalize(mean_tokens(model.encode(inputs, cameras).tokens).float(), dim=-1, eps=1e-12)  # (B, M, C)
    volumes = gramian_volume(*features.unbind(1)).double().cpu()
    cosines = torch.einsum("imc,jmc->mij", features, features).flatten(1).double().cpu()  # (M, B * B)
    B = len(volumes)
    similarity = tuple(((cosines.sum(1) - B) / (B * (B - 1))).tolist())  # without each sample and itself
    settings = alignment.temperature.item(), alignment.label_smoothing
    return Volumes(volumes, identities.cpu(), similarity, *settings, title)


def draw_volumes(found: Sequence[Volumes], modalities: Sequence[str], width: Width | None = None) -> Figure:
    """Draw the volumes of a batch.

    Args:
        found: of one model, or of several below one another.
        modalities: of a sample's images.
        width: page (the usual) puts the three charts of a model side by side, column below one another.

    Returns:
        For each model: the matrix of volumes, the distribution of matched and mismatched ones, and the loss at every
        temperature beside that of guessing.
    """
    width = width or "page"
    per_line = 3 if width == "page" else 1
    lines = 3 * len(found) // per_line
    with drawing_style():
        figure = new_figure(width, lines * HIGH + 0.02)
        for i, volumes in enumerate(found):
            for j, chart in enumerate((_draw_matrix, _draw_groups, _draw_temperature)):
                line, place = divmod(i * 3 + j, per_line)
                left, across = BOXES[place] if width == "page" else (0.5, WIDTHS[width] - 0.6)
                across = SIDE if j == 0 else across
                box = (left, (lines - 1 - line) * HIGH + 0.42, across, SIDE)
                chart(figure.add_axes(inches(figure, box)), volumes, modalities)
    return figure


def _draw_matrix(axes: Axes, volumes: Volumes, modalities: Sequence[str]) -> None:
    import matplotlib as mpl

    image = axes.imshow(volumes.volumes.numpy(), cmap=mpl.colormaps[HEAT], interpolation="nearest", aspect="equal")
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.04, 0, 0.06, 1)))
    bar.outline.set_linewidth(0.4)
    axes.spines[:].set_visible(True)
    changes = (volumes.identities.diff() != 0).nonzero().flatten() + 0.5
    axes.set_xticks(changes.tolist(), [""] * len(changes))
    axes.set_yticks(changes.tolist(), [""] * len(changes))
    axes.set_xlabel(f"{', '.join(modalities[1:])} of sample")
    axes.set_ylabel(f"{modalities[0]} of sample")
    axes.set_title(_titled(volumes, "volumes"), loc="left")


def _draw_groups(axes: Axes, volumes: Volumes, modalities: Sequence[str]) -> None:
    least, most = volumes.volumes.min().item(), volumes.volumes.max().item()
    margin = 0.03 * (most - least) or 0.05
    highest = histogram_lines(axes, volumes.groups, (least - margin, most + margin), bins=20)
    axes.set_ylim(0, 1.5 * highest)  # room for the legend
    axes.set_xlabel("volume")
    axes.set_ylabel("share of pairs")
    axes.set_title("matched and mismatched", loc="left")
    axes.legend(loc="upper right", handlelength=1.8, labelspacing=0.2, borderaxespad=0)


def _draw_temperature(axes: Axes, volumes: Volumes, modalities: Sequence[str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    (temperature, loss), start = volumes.best, TEMPERATURES[0].item()
    axes.plot(TEMPERATURES, volumes.losses(TEMPERATURES), color=SERIES[0])
    for height, dashes, above, name in (
        (volumes.guessing, "--", False, f"guessing, ln {len(volumes.volumes)}"),
        (volumes.least, ":", True, "least possible"),
    ):
        axes.axhline(height, color=SOFT, linestyle=dashes, linewidth=0.9)
        beside, side = ((2, 1.5), "bottom") if above else ((2, -2), "top")
        axes.annotate(name, (start, height), xytext=beside, textcoords="offset points", color=SOFT, va=side)
    axes.plot([volumes.temperature], [volumes.loss], "o", ms=4, mfc=SERIES[1], mec=INK, mew=0.5, label="the model's")
    if volumes.worth_it:
        axes.plot([temperature], [loss], "D", ms=3.5, mfc="white", mec=INK, mew=0.7, label="best for these")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([1e-4, 1e-2, 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(FixedLocator([1e-3, 0.1, 10]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(start, TEMPERATURES[-1].item())
    axes.set_ylim(0, max(1.9 * volumes.guessing, 1.5 * min(volumes.loss, 4 * volumes.guessing)))  # and the legend
    axes.set_xlabel("temperature")
    axes.set_ylabel("loss")
    axes.set_title("loss by temperature", loc="left")
    axes.legend(loc="upper right", handlelength=1, labelspacing=0.2, borderaxespad=0)


def _titled(volumes: Volumes, what: str) -> str:
    return f"{volumes.title}: {what}" if volumes.title else what


def numbers(found: Sequence[Volumes]) -> list[Table]:
    """The volumes of each group of pairs, and the losses."""
    groups: list[list[str | float | int]] = []
    losses: list[list[str | float | int]] = []
    for volumes in found:
        for name, values in volumes.groups.items():
            deviation = values.std(unbiased=False).item()
            groups.append([volumes.title or "model", name, len(values), values.mean().item(), deviation])
        match, same = volumes.found
        losses.append(
            [
                volumes.title or "model",
                volumes.loss,
                volumes.guessing,
                volumes.least,
                volumes.temperature,
                *volumes.best,
                match,
                same,
            ]
        )
    header = [
        "of",
        "loss",
        "guessing",
        "least",
        "temperature",
        "best one",
        "loss there",
        "match first",
        "identity first",
    ]
    return [
        Table("Volumes", ["of", "pairs", "number", "mean", "deviation"], groups),
        Table("Loss of global alignment", header, losses),
    ]


def remarks(volumes: Volumes) -> list[str]:
    """Whether GAM has learned anything, and what stands in its way, in whole sentences."""
    B, of = len(volumes.volumes), f"{volumes.title}: " if volumes.title else ""
    verdict = (
        "GAM tells the samples of this batch no better apart than guessing does"
        if volumes.way < NOTHING
        else f"GAM has gone {volumes.way:.0%} of the way from guessing to the least loss that there can be"
    )
    said = [
        f"{verdict}: its loss is {volumes.loss:.3f}, guessing among {B} samples costs ln({B}) = "
        f"{volumes.guessing:.3f}, and label smoothing keeps the loss above {volumes.least:.3f}.",
        _about_matches(volumes),
        _about_temperature(volumes),
    ]
    alike = ", ".join(f"{value:.3f}" for value in volumes.similarity)
    said.append(
        f"Mean tokens of different samples have a cosine of {alike} in the modalities; the closer to 1, the less there "
        "is for volumes to tell apart."
    )
    copies = int((volumes.identities[:, None] == volumes.identities).sum(1).max())
    if 1 < copies < B:
        said.append(
            f"The batch holds up to {copies} samples of an identity, and the loss counts all but the match as wrong: "
            f"who knows identities alone cannot come much below ln({copies}) = {math.log(copies):.3f}."
        )
    return [of + sentence for sentence in said]


def _about_matches(volumes: Volumes) -> str:
    match, same = volumes.found
    sizes = (volumes.identities[:, None] == volumes.identities).sum(1)
    chance = (sizes / len(sizes)).mean().item()
    return (
        f"The match has the least volume in {match:.0%} of the rows and columns (by chance {1 / len(sizes):.0%}), a "
        f"sample of the same identity in {same:.0%} (by chance {chance:.0%})."
    )


def _about_temperature(volumes: Volumes) -> str:
    (temperature, loss), groups = volumes.best, volumes.groups
    mismatched = torch.cat([values for name, values in groups.items() if name != "matched"])
    gap = (mismatched.mean() - groups["matched"].mean()).item()
    size = f"{abs(gap):.3g} {'larger' if gap > 0 else 'smaller'}"
    so = (
        f"A mismatched volume is on average {size} than a matched one, which the temperature of "
        f"{volumes.temperature:.3g} turns into {abs(gap) / volumes.temperature:.2g} in the logits"
    )
    if not volumes.worth_it:
        return f"{so}; at no temperature would these volumes do much better than guessing."
    return f"{so}; at the temperature that suits these volumes best, {temperature:.2g}, the loss would be {loss:.3f}."


class VolumesPicture(MethodPicture):
    """What `signal-reid show volumes` draws."""

    name = "volumes"
    title = "Volumes of global alignment"
    about = "GAM's volumes of a batch of test identities, matched against mismatched, and its loss by temperature"
    parts = ("global_alignment",)

    def problem(self, model: Method) -> str | None:
        alignment = cast("Signal", model).global_alignment
        temperature = alignment.temperature.item() if alignment is not None else 1.0
        return None if temperature > 0 else f"GAM's temperature must be positive, got {temperature:.3g}"

    def draw(self, models: Mapping[str, Method], subjects: Subjects, width: Width | None = None) -> Picture:
        shown = subjects.batch()
        found = [
            find_volumes(model, shown.inputs, shown.identities, shown.cameras, title)
            for title, model in cast("Mapping[str, Signal]", models).items()
        ]
        figure = draw_volumes(found, subjects.modalities, width)
        notes = [sentence for volumes in found for sentence in remarks(volumes)]
        first, others = subjects.modalities[0], " and ".join(subjects.modalities[1:])
        caption = (
            f"What global alignment makes of a batch of {len(shown.names)} test samples. First: the volume of each "
            f"pair, {first} of one sample with {others} of another; matches lie on the diagonal, ticks part "
            "identities. Second: the volumes of matches and mismatches. Third: the loss at every temperature; the "
            "dashed line is the loss of guessing."
        )
        return Picture(self.name, self.title, figure, caption, notes, numbers(found))
