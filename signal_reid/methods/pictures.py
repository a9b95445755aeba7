"""The contract of a method's pictures: what it can draw of its models, by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from signal_reid.figures import Picture
from signal_reid.figures.style import Width

if TYPE_CHECKING:
    from signal_reid.methods.base import Method


@dataclass(frozen=True, eq=False)
class Shown:
    """Samples that a picture is drawn of.

    Args:
        images: (B, M, 3, H, W) uint8, on the CPU.
        inputs: (B, M, 3, H, W) fp32, the same as the model takes them, on its device.
        cameras: (B,) int64, on the model's device.
        identities: (B,) int64, on the CPU.
        names: of the samples.
    """

    images: Tensor
    inputs: Tensor
    cameras: Tensor
    identities: Tensor
    names: Sequence[str]


class Subjects(Protocol):
    """The samples that pictures can be drawn of; a picture takes what it needs."""

    @property
    def modalities(self) -> Sequence[str]:
        """Names of a sample's images, in order."""

    def chosen(self, default: int) -> Shown:
        """The samples that were asked for; where none were, `default` of the query's, of identities far apart."""

    def batch(self) -> Shown:
        """Test samples in a batch such as training has: identities one after another, each with several samples."""

    def all(self) -> Iterator[Shown]:
        """Every test sample, in batches; where a number was asked for, as many of them, spread evenly."""


class MethodPicture(ABC):
    """One kind of picture of a method's models.

    What it draws is in two halves: finding, which gives plain tensors and is tested against an independent
    computation, and drawing, which takes them.
    """

    name: ClassVar[str]
    """What it is asked for by."""
    title: ClassVar[str]
    """For readers."""
    about: ClassVar[str]
    """What is to be seen, in one line, for help texts."""
    parts: ClassVar[tuple[str, ...]] = ()
    """The model's modules that it is drawn of: weights that lack one of them show nothing of it."""

    def problem(self, model: Method) -> str | None:
        """Why there is no such picture of a model, in one line; none if there is."""
        return None

    @abstractmethod
    def draw(self, models: Mapping[str, Method], subjects: Subjects, width: Width | None = None) -> Picture:
        """Draw the picture; the caller has put the models in evaluation mode, and turned gradients off.

        Args:
            models: by what to call them, such as `before training` and `after training`, side by side in this order;
                at least one, of one configuration, none of which has a `problem`.
            subjects: the samples.
            width: of a paper's column or page; none: what suits the picture.
        """


def by_name(*pictures: MethodPicture) -> dict[str, MethodPicture]:
    """The pictures by their names, as `Method.pictures` gives them."""
    return {picture.name: picture for picture in pictures}


def joined(parts: Sequence[Shown]) -> Shown:
    """Several batches as one."""
    images, inputs, cameras, identities = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "inputs", "cameras", "identities")
    )
    return Shown(images, inputs, cameras, identities, [name for part in parts for name in part.names])
