"""The features that a run's weights gave, kept in the run directory so that no model has to run for a comparison."""

from __future__ import annotations

import hashlib
import json

import torch
from safetensors import SafetensorError

from signal_reid.config import Config
from signal_reid.data import Dataset
from signal_reid.evaluation import FeatureSet, load_features, save_features
from signal_reid.evaluation.evaluator import Evaluation, measure
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.tensor_files import read_metadata
from signal_reid.training.run_directory import RunDirectory

ORIGIN = "origin"
"""The metadata that says what the features are of."""


def keep_features(run: RunDirectory, config: Config, dataset: Dataset, evaluation: Evaluation) -> None:
    """Write the features of an evaluation of the run's weights; a sample that is both query and gallery once.

    Of a run without weights there is nothing that they could be tied to, and nothing is written.
    """
    if not run.weights.is_file():
        return
    samples, query, gallery = dataset.evaluation_samples()
    places = {place: row for row, place in reversed(list(enumerate(query)))}
    others = {place: row for row, place in reversed(list(enumerate(gallery))) if place not in places}
    sets, rows = [evaluation.query], [places[place] for place in sorted(places)]
    if others:
        sets.append(evaluation.gallery)
        rows += [len(query) + others[place] for place in sorted(others)]
    order = [*sorted(places), *sorted(others)]
    assert order == list(range(len(samples)))  # the query's come first in `evaluation_samples`
    features = _joined([features.to("cpu") for features in sets])[torch.tensor(rows)]
    names = [sample.name for sample in samples]
    save_features(run.evaluated, features, names, {ORIGIN: _origin(run, config)})


def recall_features(run: RunDirectory, config: Config, dataset: Dataset) -> Evaluation | None:
    """What `keep_features` kept, measured; none where there is nothing, or it is not of these weights and images."""
    if not run.evaluated.is_file():
        return None
    try:
        if read_metadata(run.evaluated).get(ORIGIN) != _origin(run, config):
            return None
        features, names = load_features(run.evaluated)
    except (FileNotFoundError, SafetensorError, InputError):
        return None  # a damaged file is no loss: the features are computed anew
    samples, query_rows, gallery_rows = dataset.evaluation_samples()
    if names != [sample.name for sample in samples]:
        return None
    query, gallery = (
        features if rows == list(range(len(features))) else features[torch.tensor(rows)]
        for rows in (query_rows, gallery_rows)
    )
    return Evaluation(query, gallery, measure(query, gallery, config))


def _joined(sets: list[FeatureSet]) -> FeatureSet:
    if len(sets) == 1:
        return sets[0]
    scenes = [features.scenes for features in sets if features.scenes is not None]
    return FeatureSet(
        torch.cat([features.features for features in sets]),
        torch.cat([features.identities for features in sets]),
        torch.cat([features.cameras for features in sets]),
        torch.cat(scenes) if len(scenes) == len(sets) else None,
    )


def _origin(run: RunDirectory, config: Config) -> str:
    """What the features depend on: the weights, byte by byte, and the settings of the model and of its input."""
    digest = hashlib.sha256()
    with run.weights.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    model = config.model.model_dump(mode="json")
    settings = [model, list(config.data.image_size), config.evaluation.precision]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()
