"""Evaluation where modalities are missing in the query, the gallery or both, from one run of the backbone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from signal_reid.config import Config
from signal_reid.data import Dataset
from signal_reid.data.progress import ProgressCallback
from signal_reid.evaluation.evaluator import Evaluation, Extractor, as_items, check_measurable, measure
from signal_reid.evaluation.features import FeatureSet
from signal_reid.evaluation.metrics import Metrics
from signal_reid.methods.base import Encoded, Method
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.troubles import EVALUATION_MEMORY, explained

Present = tuple[int, ...]
"""The modalities that a sample has, ascending, at least one."""

STANDS_FOR_ABSENT = {
    "zeros": "an image of zeros after normalisation stands for a missing one",
    "present": "nothing stands for a missing image: the present parts of the feature are compared",
}
"""What `evaluation.absent` says, for the reader of a table."""


class Setting(NamedTuple):
    """Which modalities the queries and the gallery items have."""

    query: Present
    gallery: Present


@dataclass(frozen=True, eq=False)
class MissingTable:
    """What a model measures in each setting.

    Args:
        modalities: names, in their order.
        absent: what stands for a missing modality, `zeros` or `present`.
        complete: the evaluation where nothing is missing.
        rows: the settings asked for and their metrics.
    """

    modalities: tuple[str, ...]
    absent: str
    complete: Evaluation
    rows: list[tuple[Setting, Metrics]]

    @property
    def mean(self) -> dict[str, float] | None:
        """The means over every setting whose query and gallery lack the same; None where not all were measured."""
        summaries = {setting: metrics.summary() for setting, metrics in self.rows}
        wanted = field_settings(len(self.modalities))
        if not wanted or any(setting not in summaries for setting in wanted):
            return None
        return {name: sum(summaries[s][name] for s in wanted) / len(wanted) for name in summaries[wanted[0]]}

    def missing(self, present: Present) -> list[str]:
        """The names of what a side lacks."""
        return [name for index, name in enumerate(self.modalities) if index not in present]

    def as_json(self) -> dict[str, object]:
        """Plain values: `absent`, `complete`, `settings` (`query_missing`, `gallery_missing` and numbers), `mean`."""
        rows = [
            {
                "query_missing": self.missing(setting.query),
                "gallery_missing": self.missing(setting.gallery),
                **metrics.summary(),
            }
            for setting, metrics in self.rows
        ]
        return {"absent": self.absent, "complete": self.complete.metrics.summary(), "settings": rows, "mean": self.mean}


def subsets(modalities: int) -> list[Present]:
    """Every choice of at least one modality, those that lack fewest first."""
    everything = range(modalities)
    return [
        tuple(i for i in everything if i not in missing)
        for size in everything
        for missing in combinations(everything, size)
    ]


def field_settings(modalities: int) -> list[Setting]:
    """Every choice of missing modalities, the same in query and gallery: six for three, as the field reports them."""
    return [Setting(present, present) for present in subsets(modalities) if len(present) < modalities]


def parse_settings(texts: Iterable[str], modalities: Sequence[str]) -> list[Setting]:
    """The settings that a user names.

    Args:
        texts: `all` for every choice of missing modalities, the same in query and gallery; `any-to-any` for every pair
            of what the query and the gallery have; `RGB,TI` for these missing in both; `query=RGB,TI`, `gallery=NI` or
            both with a semicolon between them for these missing there.
        modalities: names, in their order.

    Raises:
        InputError: an unknown modality, all of them missing, or another text.
    """
    settings: list[Setting] = []
    for text in texts:
        if text == "all":
            settings += field_settings(len(modalities))
        elif text == "any-to-any":
            every = subsets(len(modalities))
            settings += [Setting(query, gallery) for query in every for gallery in every]
        else:
            settings.append(_parse_setting(text, modalities))
    return list(dict.fromkeys(settings))


def _parse_setting(text: str, modalities: Sequence[str]) -> Setting:
    whole = tuple(range(len(modalities)))
    if "=" not in text:
        present = _parse_missing(text, modalities)
        return Setting(present, present)
    sides = {"query": whole, "gallery": whole}
    for part in text.split(";"):
        side, equals, names = part.partition("=")
        if not equals or side.strip() not in sides:
            raise InputError(
                f"missing must be all, any-to-any, NAME,... or query=NAME,...;gallery=NAME,..., got {text!r}"
            )
        sides[side.strip()] = _parse_missing(names, modalities)
    return Setting(sides["query"], sides["gallery"])


def _parse_missing(text: str, modalities: Sequence[str]) -> Present:
    missing = [name.strip() for name in text.split(",")]
    for name in missing:
        if name not in modalities:
            raise InputError(f"missing must name modalities of {', '.join(modalities)}, got {name!r}")
    present = tuple(index for index, name in enumerate(modalities) if name not in missing)
    if not present:
        raise InputError(f"missing must leave at least one of {', '.join(modalities)}, got {text!r}")
    return present


def no_parts(model: Method) -> InputError:
    """The error of `evaluation.absent=present` for a method whose feature cannot be compared in parts."""
    return InputError(
        f"the feature of {model.title} has no parts by modality; evaluation.absent=zeros compares it whole"
    )


class SubsetFeatures(nn.Module):
    """The features of samples as they would be with some modalities missing, side by side: (B, S * D).

    The backbone runs once over the images, and once over an image of zeros for each camera and modality; what follows
    it, which is cheap, runs once for each subset. Of a method that mixes modalities in `encode` the backbone runs for
    each subset too.

    Args:
        model: a method's.
        wanted: S subsets.
        absent: see `evaluation.absent`.
        cameras: all that the samples have.
    """

    def __init__(self, model: Method, wanted: Sequence[Present], absent: str, cameras: Sequence[int]):
        super().__init__()
        self.model, self.wanted, self.absent = model, list(wanted), absent
        self.cameras = sorted(cameras)
        self._zeros: Encoded | None = None

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        whole = self.model.encode(images, cameras)
        return torch.cat([self._feature(whole, images, cameras, present) for present in self.wanted], dim=1)

    def _feature(self, whole: Encoded, images: Tensor, cameras: Tensor | None, present: Present) -> Tensor:
        missing = [index for index in range(self.model.modalities) if index not in present]
        if not missing:
            return self.model.feature(whole)
        if not self.model.encodes_modalities_apart:
            blank = images.index_fill(1, torch.tensor(missing, device=images.device), 0)
            whole = self.model.encode(blank, cameras)
        elif self.absent == "zeros":
            whole = self._with_zeros(whole, images, cameras, missing)
        if self.absent == "present":
            # No token of an absent modality is there to be attended to, as one that the selection drops.
            absent = torch.tensor(missing, device=images.device)
            whole = Encoded(*(part.index_fill(1, absent, 0) for part in whole))
        return self.model.feature(whole)

    def _with_zeros(self, whole: Encoded, images: Tensor, cameras: Tensor | None, missing: list[int]) -> Encoded:
        if self._zeros is None:
            self._zeros = self._encode_zeros(images, cameras)
        known = torch.tensor(self.cameras, device=images.device)
        alike = cameras is None or len(self._zeros.cls) == 1
        row = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        if not alike and cameras is not None:
            row = torch.searchsorted(known, cameras)
        parts = []
        for part, zeros in zip(whole, self._zeros, strict=True):
            part = part.clone()
            for index in missing:
                part[:, index] = zeros[row, index].to(part.dtype)
            parts.append(part)
        return Encoded(*parts)

    def _encode_zeros(self, images: Tensor, cameras: Tensor | None) -> Encoded:
        """The image of zeros as each camera's; as one camera's where the backbone does not know them."""
        embedded = cameras is not None and self.model.backbone.camera_embedding is not None
        every = torch.tensor(self.cameras if embedded else self.cameras[:1], device=images.device)
        blank = images.new_zeros(len(every), *images.shape[1:])
        step = max(1, len(images))
        pairs = zip(blank.split(step), every.split(step), strict=True)
        parts = [self.model.encode(some, of if cameras is not None else None) for some, of in pairs]
        return Encoded(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


class MissingEvaluator:
    """Evaluates models of a data set as if modalities were missing, in one run; see `SubsetFeatures`.

    The features of every subset that a setting names are kept on the device: S times those of an evaluation. The plain
    ranking is measured, never the re-ranked one.

    Args:
        config: `data` and `evaluation` are used.
        dataset: its query and gallery splits.
        settings: at least one, see `parse_settings`.
        device, progress, processes: as for `Evaluator`.

    Raises:
        ValueError, DataError, FileNotFoundError, LostProcessError: as `Evaluator`.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        settings: Sequence[Setting],
        device: torch.device,
        progress: ProgressCallback | None = None,
        processes: Processes = ALONE,
    ) -> None:
        plain = config.evaluation.model_copy(update={"reranking": False})
        self._config = config.model_copy(update={"evaluation": plain})
        check_measurable(self._config, dataset)
        samples, self._query, self._gallery = dataset.evaluation_samples()
        self._cameras = sorted({sample.camera for sample in samples})
        self._extractor = Extractor(self._config, samples, device, progress, processes)
        self._settings, self._modalities = list(settings), dataset.modalities
        self._complete = tuple(range(len(dataset.modalities)))
        self._device, self._processes = device, processes

    def run(self, model: Method, progress: ProgressCallback | None = None) -> MissingTable:
        """Extract the features of every subset and measure every setting.

        Raises:
            InputError: the method's feature has no parts to be compared alone, which `evaluation.absent=present` needs.
            ValueError, DataError, MachineError, LostProcessError: see `Extractor.run`.
        """
        absent = self._config.evaluation.absent
        columns = model.feature_columns()
        if absent == "present" and columns is None:
            raise no_parts(model)
        wanted = list(dict.fromkeys((self._complete, *(side for setting in self._settings for side in setting))))
        features = self._extractor.run(SubsetFeatures(model, wanted, absent, self._cameras), progress)
        features = as_items(features, self._config)
        size = features.features.shape[1] // len(wanted)
        blocks = {present: slice(i * size, (i + 1) * size) for i, present in enumerate(wanted)}
        sides = _Sides(features, blocks, None if absent == "zeros" else columns, self._complete)
        with explained(EVALUATION_MEMORY):
            complete = self._measure(sides, Setting(self._complete, self._complete))
            rows = [(setting, self._measure(sides, setting).metrics) for setting in self._settings]
        return MissingTable(self._modalities, absent, complete, rows)

    def _measure(self, sides: _Sides, setting: Setting) -> Evaluation:
        query = sides.of(setting.query, setting.gallery, self._query)
        one = setting.query == setting.gallery and self._query == self._gallery
        gallery = query if one else sides.of(setting.gallery, setting.query, self._gallery)
        return Evaluation(query, gallery, measure(query, gallery, self._config, self._processes))


@dataclass(frozen=True, eq=False)
class _Sides:
    """The features of all samples in every subset, and what of them is compared.

    Args:
        features: (n, S * D).
        blocks: the columns of each subset.
        columns: (M, P) of a feature, by modality; none: the whole feature is compared.
        complete: the subset that lacks nothing.
    """

    features: FeatureSet
    blocks: dict[Present, slice]
    columns: Tensor | None
    complete: Present

    def of(self, present: Present, other: Present, rows: list[int]) -> FeatureSet:
        """What one side has, to be compared with what the other has."""
        everything = rows == list(range(len(self.features)))
        found = self.features.features[:, self.blocks[present]]
        if not everything:
            found = found[torch.tensor(rows, device=found.device)]
        if self.columns is not None and not present == other == self.complete:
            found = self._parts(found, present, other, self.columns.to(found.device))
        labels = self.features if everything else self.features[torch.tensor(rows, device=found.device)]
        return changed(labels, features=found.contiguous())

    def _parts(self, found: Tensor, present: Present, other: Present, columns: Tensor) -> Tensor:
        """The parts of the modalities that both sides have; the mean of all present parts where they share none."""
        shared = [index for index in present if index in other]
        if shared:
            return found[:, columns[shared].flatten()]
        return torch.stack([found[:, columns[index]] for index in present]).mean(0)
