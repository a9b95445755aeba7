"""What a page shows of a model: the method's pictures, before training beside after it, and its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from signal_reid.checkpoints import LoadReport, hub
from signal_reid.config import Config
from signal_reid.data import Dataset
from signal_reid.evaluation.evaluator import Evaluation
from signal_reid.evaluation.trained import load_beside
from signal_reid.methods.base import Method
from signal_reid.methods.pictures import MethodPicture
from signal_reid.report.contents import PagePicture
from signal_reid.report.embedding import (
    EmbeddingPicture,
    embedding_map,
    map_picture,
    similarities,
    similarities_picture,
)
from signal_reid.report.page_pictures import page_picture, sample_pictures
from signal_reid.report.picture_samples import TestSamples
from signal_reid.report.pictures import draw_models, untaught
from signal_reid.report.request import PRETRAINED
from signal_reid.runtime.errors import InputError, UserError


@dataclass(frozen=True, eq=False)
class DrawnModels:
    """The models that a page draws beside each other.

    Args:
        models: by what to call them, the one that the page is of last.
        note: what the first one is, or how to have it.
    """

    models: Mapping[str, Method]
    note: str

    @property
    def model(self) -> Method:
        """The one that the page is of."""
        return list(self.models.values())[-1]


def models_to_draw(config: Config, model: Method, dataset: Dataset, before: str | None, command: str) -> DrawnModels:
    """A model after its training, and the one before it, where that can be had.

    Args:
        config, model, dataset: see `load_beside`.
        before: a file of weights, or `pretrained`; none: the model as training began, if that takes no fetching.
        command: that wrote the page, without the program's name; a note says it.

    Raises:
        FileNotFoundError, CheckpointError: see `load_beside`, where `before` asks for weights.
    """
    source = config.model.backbone.weights
    if before is None and source is not None and not hub.is_at_hand(source):
        return without_before(model, command, f"model.backbone.weights={source} is not on this machine")
    try:
        file = None if before in (None, PRETRAINED) else Path(str(before))
        other, told = load_beside(config, model, dataset, file)
    except (UserError, OSError) as error:
        if before is not None:
            raise
        return without_before(model, command, str(error))
    models = {"before training": other, "after training": model}
    return DrawnModels(models, f"Before training: {'; '.join(told.splitlines())}.")


def without_before(model: Method, command: str, reason: str = "") -> DrawnModels:
    """A model alone, with a note that says how to have another one beside it."""
    why = f", as {reason}" if reason else ""
    return DrawnModels(
        {"": model},
        f"The model before training is not shown{why}: signal-reid {command} --before FILE draws it from FILE, and "
        "--before pretrained as its training began.",
    )


def feature_pictures(evaluation: Evaluation, config: Config, dataset: Dataset) -> list[PagePicture]:
    """The map of the gallery's features, and the similarities of pairs; a reason where there is no map."""
    try:
        found = embedding_map(evaluation.gallery)
    except InputError as error:
        return [PagePicture(EmbeddingPicture.title, str(error), notes=[f"There is no such picture: {error}."])]
    pairs = similarities(evaluation.query, evaluation.gallery, config.evaluation.protocol)
    return [
        page_picture(map_picture(found, dataset.camera_name), "map"),
        page_picture(similarities_picture(pairs), "similarities"),
    ]


def pictures_of(
    drawn: DrawnModels,
    config: Config,
    dataset: Dataset,
    queries: Sequence[str],
    limit: int,
    loaded: LoadReport | None = None,
) -> tuple[list[PagePicture], dict[str, list[PagePicture]]]:
    """What the method has to show of a model: of the whole data set, and of each of some queries by its name.

    A picture with layers is shown of each query, with switches, and of each model; another one once, of the first and
    the last query. A picture that cannot be says why.

    Args:
        drawn: the models.
        config, dataset: of the model.
        queries: names.
        limit: test samples that a distribution is taken over.
        loaded: what weights gave the model, where they were loaded.
    """
    general: list[PagePicture] = []
    by_query: dict[str, list[PagePicture]] = {}
    model = drawn.model
    device, precision = next(model.parameters()).device, config.evaluation.precision
    ends = queries[:: max(1, len(queries) - 1)]
    few, every = (TestSamples(config, dataset, device, names, limit=limit) for names in (ends, queries))
    for name, picture in model.pictures().items():
        try:
            _check_taught(picture, model, loaded)
            found = draw_models(picture, {"": model}, few, device, precision)
            if found.layers:
                found = draw_models(picture, drawn.models, every, device, precision)
        except InputError as error:
            general.append(PagePicture(picture.title, str(error), notes=[f"{str(error)[0].upper()}{str(error)[1:]}."]))
            continue
        if not found.layers:
            general.append(page_picture(found, name))
        for query, shown in sample_pictures(found).items():
            by_query.setdefault(query, []).extend(shown)
    return general, by_query


def _check_taught(picture: MethodPicture, model: Method, loaded: LoadReport | None) -> None:
    reason = untaught(picture, model, loaded) if loaded is not None else None
    if reason is not None:
        raise InputError(f"no picture of {picture.name}: the weights {reason}")
