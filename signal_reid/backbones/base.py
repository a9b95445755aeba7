"""The contract of a backbone, and of the files that its weights come in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from signal_reid.config.schema import BackboneConfig


@dataclass(frozen=True)
class FileNaming:
    """How another program names the parameters in its files, and what these are here.

    Args:
        name: for reports, such as `clip`.
        title: for sentences, such as "OpenAI CLIP or open_clip".
        recognises: whether a state dict is in this naming.
        to_ours: its entries by our names. An unknown name stays as it is, so that the loader reports it.
        file_names: the file's names of one of our entries, given the names of all of ours; itself where it has none.
        from_ours: the inverse of `to_ours`, for export; none where we do not write such files. It raises ValueError
            for a model that the other program cannot hold.
        backbone_only: the files hold a backbone alone, which `Backbone.adapt` fits to the model.
        refusal: why a recognised file cannot be used all the same, in one line; none for one that can.
        configuration: the JSON file beside the weights in which the other program describes their network; none: it
            writes none.
        misfit: from what that file holds to why these weights cannot be used, in one line; none if they can.
        unsaid: what nobody can tell of weights without that file, as a sentence for the user; none if all is known.
    """

    name: str
    title: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    to_ours: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    file_names: Callable[[str, Collection[str]], tuple[str, ...]]
    from_ours: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    backbone_only: bool = False
    refusal: Callable[[Mapping[str, Tensor]], str | None] = lambda state: None
    configuration: str | None = None
    misfit: Callable[[Mapping[str, Any]], str | None] = lambda described: None
    unsaid: Callable[[Mapping[str, Tensor]], str | None] = lambda state: None


class Backbone(nn.Module, ABC):
    """Encodes images into a class token and a grid of patch tokens.

    A backbone is a file in `signal_reid/backbones/` (or an installed plug-in of the entry-point group
    `signal_reid.backbones`) that offers its class as `BACKBONE`. Its constructor takes what this one takes, and the
    parameter of a camera embedding, if there is one, is `camera_embedding` with a row for each camera.

    Args:
        settings: of this backbone, an instance of the class attribute `settings`.
        image_size: (height, width) in pixels.
        num_cameras: rows of the camera embedding; none is made for 0 or where the settings ask for none.
    """

    settings: ClassVar[type[BackboneConfig]]
    """The class of its section `model.backbone` of the configuration."""
    namings: ClassVar[tuple[FileNaming, ...]] = ()
    """Namings of weight files that it understands besides ours."""
    camera_embedding: nn.Parameter | None

    def __init__(self, settings: BackboneConfig, image_size: tuple[int, int], num_cameras: int = 0):
        super().__init__()
        self.image_size = image_size
        self.grid_size = settings.grid_size(image_size)
        """Rows and columns of the patch tokens."""
        self.output_dim = settings.output_dim
        self.camera_embedding = None
        self.checkpointing = False
        """Whether the backward recomputes activations instead of finding them kept."""

    @abstractmethod
    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            images: (B, 3, H, W), normalised.
            cameras: (B,) int64 camera indices, or None to add no camera embedding.

        Returns:
            (B, 1 + N, output_dim): the class token, then the patch tokens row by row.
        """

    def class_attention(self, images: Tensor, cameras: Tensor | None = None, last: int = 3) -> Tensor | None:
        """How much the class token attends to each patch in the last blocks, for pictures; none where it does not.

        Args:
            images, cameras: see `forward`.
            last: how many blocks, fewer where there are not so many.

        Returns:
            (blocks, B, heads, N) fp32; what is missing to 1 is its attention to itself.
        """
        return None

    @property
    def token_area(self) -> tuple[float, float, float, float]:
        """The part of an image that the grid of tokens divides evenly, in pixels: top, left, bottom, right.

        Here all of it; a backbone whose patches overlap or leave a border out says otherwise.
        """
        return 0.0, 0.0, float(self.image_size[0]), float(self.image_size[1])

    @abstractmethod
    def flops(self) -> float:
        """Floating-point operations of the matrix products of one image's forward."""

    def other_size(self, state: Mapping[str, Tensor]) -> str | None:
        """What makes the network of some weights, in our names, one of another size than this, as a phrase for users.

        A file that does not fit is then refused with it, instead of with the names of all that it lacks. None where the
        sizes agree, and where the backbone cannot tell.
        """
        return None

    def adapt(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Fit the weights of a `backbone_only` file, in our names, to this network, such as to its grid of patches.

        Returns:
            The weights, and what was done to them as sentences for the user.

        Raises:
            ValueError: they are of a network of another size; the message says in what.
        """
        return state, []
