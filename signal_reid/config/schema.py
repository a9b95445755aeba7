"""The settings of a run: strict pydantic models, their defaults and what has to fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the settings: strict, frozen, without unknown keys; the text below a setting explains it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


class BackboneConfig(Section):
    """What every backbone is told; a backbone's own settings derive from it, see `signal_reid.backbones.base`."""

    name: str = "clip_vit"
    """Which backbone: a built-in one or an installed plug-in's."""
    weights: str | None = None
    """A checkpoint file, or `hub:OWNER/NAME` to fetch one with huggingface_hub; none: trained from scratch."""
    output_dim: int = Field(512, ge=1)
    """Channels of the tokens that the backbone gives."""
    camera_embedding: bool = True
    """Add a learned embedding of the camera."""

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of (height, width) pixels; below 1 where it is too small."""
        raise NotImplementedError(f"{type(self).__name__} must say its grid of tokens")


class ModelConfig(Section):
    """What every method is told; a method's own settings derive from it, see `signal_reid.methods.base`."""

    method: str = "signal"
    """Which method: a built-in one or an installed plug-in's."""
    backbone: BackboneConfig = BackboneConfig()
    modalities: int = Field(3, ge=1)
    """Images of a sample."""

    def problem(self, grid_size: tuple[int, int]) -> str | None:
        """What does not fit the grid of tokens, in one line that begins with the setting's name; none if all fits."""
        return None


class LossConfig(Section):
    """The weights of the losses; a method's own derive from it."""

    identity: float = Field(0.25, ge=0)
    """Weight of the identity loss within the loss of each head."""
    triplet: float = Field(1.0, ge=0)
    """Weight of the triplet loss within the loss of each head."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing of every cross-entropy."""

    def weight(self, name: str) -> float:
        """The weight in the total of the loss that a method calls `name`."""
        return 1.0


class AugmentationConfig(Section):
    flip: float = Field(0.5, ge=0, le=1)
    """Probability with which an image is mirrored."""
    pad: int = Field(10, ge=0)
    """Pixels of zero padding on each side before the random crop."""
    erase: float = Field(0.5, ge=0, le=1)
    """Probability with which a random rectangle of an image is blacked out."""
    shared: bool = False
    """Draw flip, crop and erasing once per triplet instead of once per image."""
    drop_modality: float = Field(0.0, ge=0, lt=1)
    """Probability with which an image is missing, zero after normalisation; a sample keeps at least one."""


class ImageConfig(Section):
    """How image files become 8-bit RGB where they are not that already."""

    ranges: dict[str, Annotated[tuple[float, float], Field(strict=False)]] | None = None
    """By modality: the values of images deeper than 8 bits that become 0 and 255, linearly between. Such an image of a
    modality without a range is refused, unless `percentiles` says how to measure one."""
    percentiles: tuple[float, float] | None = Field(None, strict=False)
    """Two percentiles of the values of a modality's training images deeper than 8 bits, which training measures and
    writes into `ranges` where they have no range of the modality."""
    background: tuple[int, int, int] = Field((0, 0, 0), strict=False)
    """RGB from 0 to 255 that transparent pixels are composited on."""
    orientation: Literal["apply", "refuse"] = "apply"
    """Images that EXIF says are rotated or mirrored are turned, or refused."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> ImageConfig:
        for name, (low, high) in (self.ranges or {}).items():
            if low >= high:
                raise ValueError(f"ranges must be lowest, highest value of a modality, got [{low}, {high}] for {name}")
        if self.percentiles is not None and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles must be two of 0 to 100, the lower first, got {list(self.percentiles)}")
        if not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background must be red, green, blue from 0 to 255, got {list(self.background)}")
        return self


class DataConfig(Section):
    dataset: str = "rgbnt201"
    """Which data set: a built-in one or an installed plug-in's; `manifest` for a file that lists any images."""
    root: str = "."
    """The data set's directory, or one that holds it; the file of a manifest."""
    modalities: tuple[str, ...] | None = Field(None, strict=False)
    """Which of the data set's modalities, in this order; none: all of them."""
    unpaired: Literal["error", "skip"] | None = None
    """What becomes of a sample that lacks a modality; none: as the data set's layout says, mostly an error."""
    queries: str | None = None
    """A text file with the name of a sample in each line, which alone are queries; none: all of the query split."""
    images: ImageConfig = ImageConfig()
    image_size: tuple[int, int] = Field((256, 128), strict=False)
    """Height, width in pixels."""
    batch_size: int = Field(64, ge=2)
    """Samples of a training step; a multiple of `instances`."""
    instances: int = Field(8, ge=2)
    """Images per identity in a batch."""
    workers: int = Field(4, ge=0)
    """Processes that decode images; 0: the training itself does."""
    cache: Literal["none", "ram", "packed"] = "none"
    """Decode every epoch; keep the decoded images in memory; or read the file that `data pack` wrote."""
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), strict=False)
    """Subtracted from the channels of images in [0, 1]."""
    std: tuple[float, float, float] = Field((0.5, 0.5, 0.5), strict=False)
    """What the channels are then divided by."""
    augmentation: AugmentationConfig = AugmentationConfig()

    @model_validator(mode="after")
    def _dataset_is_known(self) -> DataConfig:
        from signal_reid.data.layouts import LAYOUTS  # asked for its names alone, which imports none of them

        if self.dataset not in LAYOUTS.names():
            raise ValueError(f"dataset must be one of {', '.join(LAYOUTS.names())}, got {self.dataset!r}")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> DataConfig:
        if self.batch_size % self.instances:
            raise ValueError(
                f"batch_size must be a multiple of data.instances ({self.instances}), got {self.batch_size}"
            )
        if self.batch_size == self.instances:
            raise ValueError(
                f"batch_size must hold at least 2 identities of data.instances ({self.instances}) images, "
                f"got {self.batch_size}"
            )
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive (height, width), got {self.image_size}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        return self

    @model_validator(mode="after")
    def _modalities_differ(self) -> DataConfig:
        names = self.modalities
        if names is not None and (not names or len(set(names)) < len(names)):
            raise ValueError(f"modalities must be different names, got {list(names)}")
        return self


class OptimizerConfig(Section):
    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Which optimizer."""
    base_rate: float = Field(3.5e-4, gt=0)
    """Learning rate of every parameter for which no other setting says anything else, before the schedule."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of every parameter: an L2 penalty, with adamw decoupled from the gradient."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum; Adam has none."""
    bias_factor: float = Field(2.0, gt=0)
    """Parameters named bias learn at this multiple of the base rate."""
    backbone_rate: float | None = Field(5e-6, gt=0)
    """The backbone's own parameters (not the camera embedding) learn at this rate; none: at the base rate."""
    classifier_factor: float = Field(1.0, gt=0)
    """Classifiers learn at this multiple of the base rate."""


class ScheduleConfig(Section):
    name: Literal["cosine", "multistep"] = "cosine"
    """How the learning rate goes from epoch to epoch."""
    epochs: int = Field(50, ge=1)
    """Times that the training goes through its samples."""
    warmup_epochs: int = Field(10, ge=0)
    """Epochs over which the learning rate comes to its height."""
    noise: bool = True
    """The seeded multiplicative noise of the authors' cosine schedule."""
    milestones: tuple[int, ...] = Field((20, 40), strict=False)
    """multistep's epochs from which on the learning rate is multiplied by `gamma`, once for each."""
    gamma: float = Field(0.1, gt=0)
    """multistep's factor of the learning rate at each milestone."""


class TrainingConfig(Section):
    seed: int = Field(1234, ge=0)
    """Seed of the initial weights, the batches and the augmentation."""
    device: str = "auto"
    """Such as cuda:1 or cpu. auto: a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the GPU has it, fp16 with a gradient scaler on older ones, fp32 on the CPU."""
    log_every: int = Field(10, ge=1)
    """Steps between the numbers that are shown; a number shown is the only host sync."""
    checkpoint_every: int = Field(1, ge=1)
    """Epochs between checkpoints for resuming."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of forward, losses and backward. auto: on GPUs that Triton serves."""
    cuda_graphs: bool = False
    """Replay compiled steps as CUDA graphs; pays where a step is so small that launching its kernels takes longer."""
    gradient_checkpointing: bool = False
    """Recompute each transformer block in the backward instead of keeping its activations."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of the training identities that are held out, so that the best epoch is chosen on them. 0: it is chosen on
    the test set, as the published numbers do."""
    validation_seed: int = Field(0, ge=0)
    """Seed of the choice of these identities; apart from `seed`, so that runs of several seeds hold out the same."""
    accumulation: int = Field(1, ge=1)
    """Parts that a batch goes through the backbone in, to save memory; every loss still sees the whole batch."""
    gather: Literal["global", "local"] = "global"
    """Whether every loss of several processes sees the whole batch, as in one process, or each process's own part."""
    checkpoint_minutes: float | None = Field(None, gt=0)
    """Minutes between checkpoints within an epoch, beside those of `checkpoint_every`; none: only at epochs' ends."""
    timeout_minutes: float = Field(30.0, gt=0)
    """Minutes for which one of several processes may keep the others waiting before all end."""


class EvaluationConfig(Section):
    protocol: Literal["camera", "scene", "none"] = "camera"
    """Gallery items of the query's identity and camera (or scene) are dropped; none: the query itself alone."""
    every: int = Field(1, ge=1)
    """Epochs between evaluations in training; the last epoch is always evaluated."""
    batch_size: int = Field(128, ge=1)
    """Samples at a time when features are extracted."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dtype of matrix products when features are extracted; the authors evaluate in fp32."""
    max_rank: int = Field(50, ge=1)
    """Ranks of the cumulative matching characteristic that are kept."""
    normalize: bool = True
    """L2-normalise features before ranking."""
    flip: bool = False
    """Average the feature of each image with that of its mirror image; the backbone runs twice."""
    expansion: int = Field(0, ge=0)
    """Nearest gallery items that each query is averaged with before ranking, without a look at labels; 0: none."""
    expansion_power: float = Field(3.0, ge=0)
    """Power of the cosine similarity that these are weighted by."""
    reranking: bool = False
    """Rank by k-reciprocal re-ranking; the plain numbers stand beside."""
    absent: Literal["zeros", "present"] = "zeros"
    """What stands for an image that is missing in `eval --missing`: the tokens of an image that is zero after
    normalisation, or nothing, so that only the present parts of the feature are compared."""
    k1: int = Field(50, ge=1)
    """Re-ranking's nearest neighbours that must be so mutually."""
    k2: int = Field(15, ge=1)
    """Re-ranking's nearest neighbours whose encodings are averaged."""
    lambda_value: float = Field(0.3, ge=0, le=1)
    """Re-ranking's weight of the original distance; 1 leaves the ranking as it was."""

    @model_validator(mode="after")
    def _expansion_normalizes(self) -> EvaluationConfig:
        if self.expansion and not self.normalize:
            raise ValueError("expansion averages features of unit length, so it needs evaluation.normalize=true")
        return self


class Config(Section):
    """Everything that a run depends on.

    `config_type` narrows the sections `model`, `model.backbone` and `losses` to those of a method and a backbone.
    """

    output: str = "runs/signal"
    """The run directory."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    losses: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __reduce__(self) -> Any:
        """The narrowed class has no name that another process could import, so it is narrowed again there."""
        from signal_reid.config.types import restored

        return restored, (self.model.method, self.model.backbone.name, self.model_dump())

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch tokens of an image: rows, columns."""
        return self.model.backbone.grid_size(self.data.image_size)

    @model_validator(mode="before")
    @classmethod
    def _modalities_are_counted(cls, values: Any) -> Any:
        """`data.modalities` says how many the model has, unless `model.modalities` does."""
        data, model = (values.get(key) for key in ("data", "model")) if isinstance(values, Mapping) else (None, None)
        names = data.get("modalities") if isinstance(data, Mapping) else None
        if isinstance(names, (list, tuple)) and names and (model is None or isinstance(model, Mapping)):
            return {**values, "model": {"modalities": len(names), **(model or {})}}
        return values

    @model_validator(mode="after")
    def _modalities_agree(self) -> Config:
        names = self.data.modalities
        if names is not None and len(names) != self.model.modalities:
            raise ValueError(
                f"model.modalities must be {len(names)} for data.modalities={list(names)}, got {self.model.modalities}"
            )
        return self

    @model_validator(mode="after")
    def _grid_fits(self) -> Config:
        grid_size = self.grid_size
        if min(grid_size) < 1:
            raise ValueError(f"data.image_size is too small for one token of the backbone, got {self.data.image_size}")
        problem = self.model.problem(grid_size)
        if problem is not None:
            raise ValueError(f"model.{problem}")
        return self

    @model_validator(mode="after")
    def _parts_divide_batch(self) -> Config:
        if self.data.batch_size % self.training.accumulation:
            raise ValueError(
                f"training.accumulation must divide data.batch_size ({self.data.batch_size}), "
                f"got {self.training.accumulation}"
            )
        return self
