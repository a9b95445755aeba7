"""The contract of a method: a model with its losses, its feature and its part of the configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor, nn

from signal_reid.backbones.base import Backbone, FileNaming
from signal_reid.backbones.registry import BACKBONES
from signal_reid.config.schema import Config, LossConfig, ModelConfig

if TYPE_CHECKING:
    from signal_reid.methods.pictures import MethodPicture


class Encoded(NamedTuple):
    """What the backbone makes of a batch."""

    tokens: Tensor
    """(B, M, N, C) patch tokens."""
    cls: Tensor
    """(B, M, C) class tokens."""


class Part(NamedTuple):
    """A module that a model may be built without."""

    name: str
    """The module's name in the model."""
    without: str
    """Why the module in a file may be left out where the model has none; a phrase for the user."""
    training_only: bool
    """Whether evaluation never runs it, so that a file may lack it."""


class Ablation(NamedTuple):
    """One line of an ablation table."""

    name: str
    """For readers, such as `baseline` or `+ SIM`."""
    overrides: tuple[str, ...]
    """`key=value` settings on top of a configuration of the method."""


class Method(nn.Module, ABC):
    """A model for re-identification that the program can train, evaluate, store and report.

    A method is a folder in `signal_reid/methods/` (or an installed plug-in of the entry-point group
    `signal_reid.methods`) that offers its class as `METHOD`. Images of all modalities share one backbone. Heads are
    `methods.heads.Head`s, so that their classifiers, which evaluation does not read, are found by name.

    Args:
        config: sections of the classes that `settings` and `loss_settings` name.
        num_identities: classes of the training identities, at least 2.
        num_cameras: rows of the camera embedding.

    Raises:
        ValueError: fewer than two identities.
    """

    title: ClassVar[str]
    """The method's name for readers."""
    settings: ClassVar[type[ModelConfig]] = ModelConfig
    """The class of the section `model` of the configuration."""
    loss_settings: ClassVar[type[LossConfig]] = LossConfig
    """The class of the section `losses`; its `weight` tells each loss's weight in the total."""
    loss_titles: ClassVar[Mapping[str, str]] = {}
    """Names of the losses for readers, where the name in `losses` is not that already."""
    encodes_modalities_apart: ClassVar[bool] = True
    """Whether `encode` gives the tokens of a modality from its image and camera alone; then evaluation with modalities
    missing runs the backbone once for all settings."""
    parts: ClassVar[tuple[Part, ...]] = ()
    """The modules that a model may be built without."""
    ablations: ClassVar[tuple[Ablation, ...]] = ()
    """What `signal-reid ablate` trains where nothing else is asked, the baseline first and the whole method last."""
    namings: ClassVar[tuple[FileNaming, ...]] = ()
    """Namings of whole models, such as another program's, that files may be in besides ours."""

    def __init__(self, config: Config, num_identities: int, num_cameras: int):
        super().__init__()
        if num_identities < 2:
            raise ValueError(f"num_identities must be at least 2, got {num_identities}")
        self.method = config.model.method
        """The name that it is registered by."""
        self.modalities = config.model.modalities
        self.image_size = config.data.image_size
        self.num_identities = num_identities
        backbone: type[Backbone] = BACKBONES.get(config.model.backbone.name)
        self.backbone = backbone(config.model.backbone, config.data.image_size, num_cameras)

    def encode(self, images: Tensor, cameras: Tensor | None = None) -> Encoded:
        """Run the backbone on all modalities as one batch; here a batch is cut into parts for accumulation.

        Args:
            images: (B, M, 3, H, W) floating, normalised.
            cameras: (B,) int64 camera indices, or None to add no camera embedding.

        Raises:
            ValueError: images of another shape.
        """
        expected = (self.modalities, 3, *self.image_size)
        if images.ndim != 5 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must have shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        B, M = images.shape[:2]
        repeated = cameras.repeat_interleave(M) if cameras is not None else None
        encoded = self.backbone(images.flatten(0, 1), repeated).unflatten(0, (B, M))  # (B, M, 1 + N, C)
        return Encoded(encoded[:, :, 1:], encoded[:, :, 0])

    @abstractmethod
    def losses(self, encoded: Encoded, labels: Tensor) -> dict[str, Tensor]:
        """The losses of a whole batch by name, unweighted: () tensors in fp32; nothing waits for the device.

        A name with a dot, such as `head_0.accuracy`, is no loss: it tells of the one before the dot, is logged beside
        it, and has no part in the total.

        Args:
            encoded: of the whole batch, however many parts the backbone saw it in.
            labels: (B,) int64 class indices.
        """

    def per_sample(self, encoded: Encoded) -> tuple[Tensor, ...]:
        """What `batch_losses` needs to know of each sample: all that several processes exchange of a batch.

        Here everything that the backbone gives. A method that needs less of it overrides both: what stands here is
        computed for each process's own samples only, and the less it gives the fewer bytes travel.

        Args:
            encoded: of some of a batch's samples.

        Returns:
            Tensors (B, ...), in any dtype; the same number of them, with the same shapes behind B, for any samples.
        """
        return tuple(encoded)

    def batch_losses(self, samples: tuple[Tensor, ...], labels: Tensor) -> dict[str, Tensor]:
        """The losses of a whole batch from what `per_sample` gave of all its samples; see `losses`."""
        return self.losses(Encoded(*samples), labels)

    @abstractmethod
    def feature(self, encoded: Encoded) -> Tensor:
        """What is ranked: (B, D), not normalised."""

    def feature_columns(self) -> Tensor | None:
        """Which columns of the feature each modality has to itself: (M, P) int64; None where it has no such parts.

        All columns belong to one modality each. Evaluation compares some of them alone where modalities are missing and
        `evaluation.absent=present`.
        """
        return None

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """The retrieval feature of images, (B, D), not normalised; see `encode` for the arguments."""
        return self.feature(self.encode(images, cameras))

    def flops(self) -> float:
        """Floating-point operations of the matrix products of one sample's forward in training."""
        return self.modalities * self.backbone.flops()

    def cost_notes(self) -> list[str]:
        """Sentences on how its operations are counted, where a formula could be read in more than one way."""
        return []

    @classmethod
    def pictures(cls) -> Mapping[str, MethodPicture]:
        """The pictures that can be drawn of the method's models, by the name that `signal-reid show` takes."""
        return {}

    @classmethod
    def mismatch_hints(cls, given: Collection[str], wanted: Collection[str]) -> list[str]:
        """What may explain that a file does not fit, from the names of its entries and of the model's."""
        return []
