"""Every picture by name: a method's own, and those that any method's features can be drawn in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from signal_reid.checkpoints import LoadReport
from signal_reid.evaluation.features import evaluation_mode
from signal_reid.evaluation.trained import Trained
from signal_reid.figures import Picture
from signal_reid.figures.style import Width
from signal_reid.methods.base import Method
from signal_reid.methods.pictures import MethodPicture, Subjects
from signal_reid.runtime.device import Precision
from signal_reid.runtime.errors import InputError


@dataclass(frozen=True)
class Request:
    """What was asked for besides the picture's name; a picture takes what concerns it.

    Args:
        queries: names of samples.
        count: how many samples to draw where none are named.
        limit: how many test samples a distribution is taken over at most.
        width: of a paper's column or page; none: what suits the picture.
        order, camera, identity, top: which queries `ranking` shows (see `ranking.Wanted`), and how many items of each.
        against: weights of another run, for `ranking`.
        map: how `embedding` places features on a plane.
    """

    queries: tuple[str, ...] = ()
    count: int | None = None
    limit: int | None = None
    width: Width | None = None
    order: Literal["spread", "worst", "best", "disagreement"] | None = None
    camera: str | None = None
    identity: int | None = None
    top: int | None = None
    against: Path | None = None
    map: Literal["pca", "tsne", "umap"] = "pca"


class GeneralPicture(ABC):
    """One kind of picture that needs nothing of a method but its retrieval features."""

    name: ClassVar[str]
    """What it is asked for by."""
    title: ClassVar[str]
    """For readers."""
    about: ClassVar[str]
    """What is to be seen, in one line, for help texts."""

    @abstractmethod
    def draw(self, trained: Trained, request: Request) -> Picture:
        """Draw the picture of a model with its weights on a data set."""


def known_pictures(method: type[Method]) -> dict[str, MethodPicture | GeneralPicture]:
    """Every picture that can be asked for of a method's models, its own first."""
    from signal_reid.report.general import GENERAL  # which are made of this module's classes

    return {**method.pictures(), **GENERAL}


def find_picture(method: type[Method], name: str) -> MethodPicture | GeneralPicture:
    """The picture of that name.

    Raises:
        InputError: the method has none of that name.
    """
    known = known_pictures(method)
    if name not in known:
        raise InputError(f"a picture of {method.title} must be one of {', '.join(known) or '(none)'}, got {name!r}")
    return known[name]


def reason_against(picture: MethodPicture, model: Method) -> str | None:
    """Why a picture of a model cannot be, in one line; none if it can."""
    for part in type(model).parts:
        if part.name in picture.parts and getattr(model, part.name, None) is None:
            return part.without
    return picture.problem(model)


def untaught(picture: MethodPicture, model: Method, report: LoadReport) -> str | None:
    """Why trained weights show nothing of a picture, a phrase that follows their name; none if they do.

    Weights of a backbone alone leave everything else as it is initialised, and are asked for as just that.
    """
    initialised = set(report.initialised)
    others = {name for name, _ in model.named_children()} - {"backbone"}
    lacking = [part for part in picture.parts if part in initialised]
    return f"hold no {lacking[0]}, which it shows" if lacking and not others <= initialised else None


def draw_models(
    picture: MethodPicture,
    models: Mapping[str, Method],
    subjects: Subjects,
    device: torch.device,
    precision: str = "fp32",
    width: Width | None = None,
) -> Picture:
    """Draw a method's picture of its models.

    Args:
        picture: one of `Method.pictures`.
        models: on the device, by what to call them.
        subjects: the samples.
        device, precision: that the models run on and in.
        width: see `MethodPicture.draw`.

    Raises:
        InputError: there is no such picture of a model; the message says why.
    """
    for title, model in models.items():
        reason = reason_against(picture, model)
        if reason is not None:
            raise InputError(f"no picture of {picture.name}{f' {title}' if len(models) > 1 else ''}: {reason}")
    with torch.inference_mode(), Precision(precision, device).autocast():
        return _in_evaluation_mode(picture, models, subjects, width)


def _in_evaluation_mode(
    picture: MethodPicture, models: Mapping[str, Method], subjects: Subjects, width: Width | None
) -> Picture:
    together = torch.nn.ModuleList(models.values())
    with evaluation_mode(together):
        return picture.draw(models, subjects, width)
