"""Evaluates a model on a dataset: features of query and gallery, then the protocol's metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from signal_reid.config import Config
from signal_reid.data import Augmentation, Batch, Dataset, Sample, make_eval_loader, prefetch
from signal_reid.data.layouts import NO_CAMERA, NO_SCENE
from signal_reid.data.progress import ProgressCallback
from signal_reid.evaluation.expansion import expanded_queries
from signal_reid.evaluation.features import FeatureSet, extract_features
from signal_reid.evaluation.metrics import Metrics, retrieval_metrics
from signal_reid.evaluation.protocols import lacks, no_match
from signal_reid.evaluation.reranking import RerankingParameters
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.troubles import EVALUATION_MEMORY, explained


@dataclass(frozen=True)
class Evaluation:
    """The features of a query and a gallery split, as they are ranked, and what they measure."""

    query: FeatureSet
    gallery: FeatureSet
    metrics: Metrics
    plain: Metrics | None = None
    """Without flip, expansion and re-ranking; None where none of these is set, so that `metrics` are plain."""


class Mirrored(nn.Module):
    """The feature of images, and its mean with that of their mirror images, side by side: (B, 2 d).

    Args:
        model: `model(images, cameras)` gives features (B, d).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        plain = self.model(images, cameras)
        return torch.cat([plain, (plain + self.model(images.flip(-1), cameras)) / 2], dim=1)


class Extractor:
    """Extracts the features of samples with models; several processes share the batches.

    Each process decodes, keeps in memory and runs only the samples of its share: consecutive batches, the same that
    one process has, so that the features are one process's too (on a CPU: of one with as many threads).

    Args:
        config: `data` and `evaluation` are used.
        samples: at least one.
        device: where the model is.
        progress: called while the RAM cache is filled.
        processes: that share the work; each gives the same samples.

    Raises:
        DataError, FileNotFoundError: see `make_eval_loader`.
        LostProcessError: a process ended.
    """

    def __init__(
        self,
        config: Config,
        samples: Sequence[Sample],
        device: torch.device,
        progress: ProgressCallback | None = None,
        processes: Processes = ALONE,
    ) -> None:
        share = processes.share(samples, config.evaluation.batch_size)
        # The first to open a packed file may have to pack it again.
        packed = config.data.cache == "packed"
        with processes.first_before_others() if packed else nullcontext():
            idle = len(samples) > 0 and not share
            self._batches: Iterable[Batch] = () if idle else make_eval_loader(config, share, device, progress=progress)
        self._prepare = Augmentation(config.data).normalize
        self._share = len(share)
        self._cameras_known = all(sample.camera != NO_CAMERA for sample in samples)
        self._precision = config.evaluation.precision
        self._device = device
        self._processes = processes

    def run(self, model: nn.Module, progress: ProgressCallback | None = None) -> FeatureSet:
        """The features of all samples in their order, in every process.

        Args:
            model: `model(images, cameras)` gives features (B, d) in evaluation mode.
            progress: called with the samples done and their number, of this process's share.

        Raises:
            ValueError: a feature that is not finite.
            DataError: an unreadable image.
            MachineError: too little memory, too few file descriptors, a data-loading worker that died.
            LostProcessError: a process ended.
        """
        done = 0

        def count(batch: int) -> None:
            nonlocal done
            done += batch
            if progress is not None:
                progress(done, self._share)

        batches = prefetch(self._batches, self._device)
        settings = (self._device, self._precision, self._prepare)
        with explained(EVALUATION_MEMORY):
            return extract_features(model, batches, *settings, count, self._processes, self._cameras_known)


class Evaluator:
    """Evaluates models on one dataset; a sample that is both query and gallery is run once.

    Several processes share the features and the measuring (see `Extractor` and `retrieval_metrics`); each gets the
    whole evaluation, equal to one process's. In a script that torchrun starts:

        with join_processes() as processes:
            device = choose_device("auto", processes)
            evaluation = Evaluator(config, dataset, device, processes=processes).run(model.to(device))

    Args:
        config: `data` and `evaluation` are used.
        dataset: its query and gallery splits.
        device: where the model is.
        progress: called while the RAM cache is filled.
        processes: that share the work.

    Raises:
        ValueError: the protocol or re-ranking does not fit the dataset, so that no run would find out later.
        DataError, FileNotFoundError: see `make_eval_loader`.
        LostProcessError: a process ended.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        device: torch.device,
        progress: ProgressCallback | None = None,
        processes: Processes = ALONE,
    ) -> None:
        check_measurable(config, dataset)
        samples, self._query, self._gallery = dataset.evaluation_samples()
        self._extractor = Extractor(config, samples, device, progress, processes)
        self._config = config
        self._device = device
        self._processes = processes

    def run(self, model: nn.Module, progress: ProgressCallback | None = None) -> Evaluation:
        """Extract features and measure them.

        Args:
            model: `model(images, cameras)` gives features (B, d) in evaluation mode.
            progress: called with the samples done and their number, of this process's share.

        Raises:
            ValueError, DataError, MachineError, LostProcessError: see `Extractor.run`.
        """
        settings = self._config.evaluation
        features = self._extractor.run(Mirrored(model) if settings.flip else model, progress)
        features = as_items(features, self._config)
        unflipped = features
        if settings.flip:
            halves = features.features.chunk(2, dim=1)
            unflipped, features = (replace(features, features=half.contiguous()) for half in halves)
        query, gallery = self._sets(features)
        with explained(EVALUATION_MEMORY if not settings.reranking else "set evaluation.reranking=false"):
            plain: Metrics | None = None
            if settings.flip or settings.expansion or settings.reranking:
                unranked = settings.model_copy(update={"reranking": False})
                as_is = self._config.model_copy(update={"evaluation": unranked})
                plain = measure(*self._sets(unflipped), as_is, self._processes)
            if settings.expansion:
                query = expanded_queries(query, gallery, settings.expansion, settings.expansion_power)
            return Evaluation(query, gallery, measure(query, gallery, self._config, self._processes), plain)

    def _sets(self, features: FeatureSet) -> tuple[FeatureSet, FeatureSet]:
        return self._rows_of(features, self._query), self._rows_of(features, self._gallery)

    def _rows_of(self, features: FeatureSet, rows: list[int]) -> FeatureSet:
        """The chosen rows; all of them in their order are the set itself, so that query and gallery are one object."""
        return features if rows == list(range(len(features))) else features[torch.tensor(rows, device=self._device)]


def as_items(features: FeatureSet, config: Config) -> FeatureSet:
    """The features of all samples, numbered where the protocol has to know which of them are one sample."""
    if config.evaluation.protocol != "none":
        return features
    return replace(features, items=torch.arange(len(features), device=features.features.device))


def check_measurable(config: Config, dataset: Dataset) -> None:
    """Refuse what the labels do not allow, as measuring would do only after a model has run."""
    protocol, splits = config.evaluation.protocol, {"query": dataset.query, "gallery": dataset.gallery}
    reranking = reranking_parameters(config)
    if reranking is not None:
        reranking.check(len(dataset.query), len(dataset.gallery))
    if config.evaluation.expansion > len(dataset.gallery):
        raise InputError(
            f"evaluation.expansion must be at most {len(dataset.gallery)} (gallery items), "
            f"got {config.evaluation.expansion}"
        )
    for name, samples in splits.items():
        if not samples:
            raise InputError(f"{name} must hold at least one item, got none")
        if protocol == "scene" and all(sample.scene == NO_SCENE for sample in samples):
            raise lacks(protocol, "scenes", name)
        if protocol == "camera" and any(sample.camera == NO_CAMERA for sample in samples):
            raise lacks(protocol, "cameras", name)
    if len(dataset.queries_without_match(protocol)) == len(dataset.query):
        raise no_match(protocol, len(dataset.query), len(dataset.gallery))


def measure(query: FeatureSet, gallery: FeatureSet, config: Config, processes: Processes = ALONE) -> Metrics:
    """`retrieval_metrics` with the settings of `config.evaluation`."""
    settings = config.evaluation
    return retrieval_metrics(
        query,
        gallery,
        settings.protocol,
        settings.max_rank,
        settings.normalize,
        reranking_parameters(config),
        processes=processes,
    )


def reranking_parameters(config: Config) -> RerankingParameters | None:
    """The parameters of `config.evaluation`, None where it does not re-rank."""
    settings = config.evaluation
    return RerankingParameters(settings.k1, settings.k2, settings.lambda_value) if settings.reranking else None
