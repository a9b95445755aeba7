"""Evaluates a model on a dataset: features of query and gallery, then the protocol's metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from signal_reid.config import Config
from signal_reid.data import Augmentation, Dataset, Sample, make_eval_loader, prefetch
from signal_reid.data.layouts import NO_SCENE
from signal_reid.data.progress import ProgressCallback
from signal_reid.evaluation.features import FeatureSet, extract_features
from signal_reid.evaluation.metrics import Metrics, retrieval_metrics
from signal_reid.evaluation.reranking import RerankingParameters


@dataclass(frozen=True)
class Evaluation:
    """The features of a query and a gallery split and what they measure."""

    query: FeatureSet
    gallery: FeatureSet
    metrics: Metrics


class Evaluator:
    """Evaluates models on one dataset; a sample that is both query and gallery is run once.

    Args:
        config: `data` and `evaluation` are used.
        dataset: its query and gallery splits.
        device: where the model is.
        progress: called while the RAM cache is filled.

    Raises:
        ValueError: the protocol or re-ranking does not fit the dataset, so that no run would find out later.
        DataError, FileNotFoundError: see `make_eval_loader`.
    """

    def __init__(
        self, config: Config, dataset: Dataset, device: torch.device, progress: ProgressCallback | None = None
    ) -> None:
        _check_measurable(config, dataset)
        samples, self._query, self._gallery = dataset.evaluation_samples()
        self._loader = make_eval_loader(config, samples, device, progress=progress)
        self._prepare = Augmentation(config.data).normalize
        self._samples = len(samples)
        self._config = config
        self._device = device

    def run(self, model: nn.Module, progress: ProgressCallback | None = None) -> Evaluation:
        """Extract features and measure them.

        Args:
            model: `model(images, cameras)` gives features (B, d) in evaluation mode.
            progress: called with the triplets done and their number.
        """
        done = 0

        def count(batch: int) -> None:
            nonlocal done
            done += batch
            if progress is not None:
                progress(done, self._samples)

        precision = self._config.evaluation.precision
        batches = prefetch(self._loader, self._device)
        features = extract_features(model, batches, self._device, precision, self._prepare, count)
        query, gallery = (self._rows_of(features, rows) for rows in (self._query, self._gallery))
        return Evaluation(query, gallery, measure(query, gallery, self._config))

    def _rows_of(self, features: FeatureSet, rows: list[int]) -> FeatureSet:
        """The chosen rows; all of them in their order are the set itself, so that query and gallery can be one."""
        return features if rows == list(range(len(features))) else features[torch.tensor(rows, device=self._device)]


def _check_measurable(config: Config, dataset: Dataset) -> None:
    """Measure features that mean nothing: what the labels do not allow raises as it would after training."""
    random = torch.Generator().manual_seed(0)

    def stand_in(samples: list[Sample]) -> FeatureSet:
        identities, cameras, scenes = (
            torch.tensor([getattr(sample, name) for sample in samples]) for name in ("identity", "camera", "scene")
        )
        features = torch.randn(len(samples), 2, generator=random)
        return FeatureSet(features, identities, cameras, None if (scenes == NO_SCENE).all() else scenes)

    measure(stand_in(dataset.query), stand_in(dataset.gallery), config)


def measure(query: FeatureSet, gallery: FeatureSet, config: Config) -> Metrics:
    """`retrieval_metrics` with the settings of `config.evaluation`."""
    settings = config.evaluation
    return retrieval_metrics(
        query, gallery, settings.protocol, settings.max_rank, settings.normalize, reranking_parameters(config)
    )


def reranking_parameters(config: Config) -> RerankingParameters | None:
    """Those of `config.evaluation`, None where it does not re-rank."""
    settings = config.evaluation
    return RerankingParameters(settings.k1, settings.k2, settings.lambda_value) if settings.reranking else None
