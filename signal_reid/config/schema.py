"""The settings of a run: strict pydantic models, their defaults and what has to fit together."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


class BackboneConfig(_Section):
    """The CLIP vision transformer; the defaults are ViT-B/16."""

    weights: str | None = None
    """A checkpoint file, or `hub:OWNER/NAME` to fetch one with huggingface_hub; none: trained from scratch."""
    layers: int = Field(12, ge=1)
    width: int = Field(768, ge=8)
    heads: int = Field(12, ge=1)
    patch_size: int = Field(16, ge=1)
    stride: int = Field(16, ge=1)
    output_dim: int = Field(512, ge=8)
    camera_embedding: bool = True
    sie_coe: float = 1.0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> BackboneConfig:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width ({self.width}), got {self.heads}")
        return self


class ModelConfig(_Section):
    backbone: BackboneConfig = BackboneConfig()
    modalities: int = Field(3, ge=2)
    heads: Literal["joint", "per_modality"] = "joint"
    """One head on the concatenated class tokens, or one per modality."""
    selective_interaction: bool = True
    global_alignment: bool = True
    local_alignment: bool = True
    k_intra: int = Field(80, ge=1)
    """Tokens kept by each modality's own class token; the other modalities keep twice as many between them."""
    interaction_heads: int = Field(8, ge=1)
    offset_range: float = Field(2.0, gt=0)

    @model_validator(mode="after")
    def _gram_matrix_fits(self) -> ModelConfig:
        if self.global_alignment and self.modalities > 5:
            raise ValueError(f"global_alignment needs 2 to 5 modalities, got {self.modalities}")
        return self

    @model_validator(mode="after")
    def _heads_divide_output(self) -> ModelConfig:
        if self.backbone.output_dim % self.interaction_heads:
            raise ValueError(
                f"interaction_heads must divide backbone.output_dim ({self.backbone.output_dim}), "
                f"got {self.interaction_heads}"
            )
        return self


class AugmentationConfig(_Section):
    flip: float = Field(0.5, ge=0, le=1)
    pad: int = Field(10, ge=0)
    """Pixels of zero padding on each side before the random crop."""
    erase: float = Field(0.5, ge=0, le=1)
    shared: bool = False
    """Draw flip, crop and erasing once per triplet instead of once per image."""


class DataConfig(_Section):
    dataset: str = "rgbnt201"
    """Which data set: a built-in one or an installed plug-in's."""
    root: str = "."
    image_size: tuple[int, int] = Field((256, 128), strict=False)
    """Height, width in pixels."""
    batch_size: int = Field(64, ge=2)
    instances: int = Field(8, ge=2)
    """Images per identity in a batch."""
    workers: int = Field(4, ge=0)
    cache: Literal["none", "ram", "packed"] = "none"
    """Decode every epoch; keep the decoded images in memory; or read the file that `data pack` wrote."""
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), strict=False)
    std: tuple[float, float, float] = Field((0.5, 0.5, 0.5), strict=False)
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


class LossConfig(_Section):
    identity: float = Field(0.25, ge=0)
    triplet: float = Field(1.0, ge=0)
    global_alignment: float = Field(0.2, ge=0)
    local_alignment: float = Field(0.2, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class OptimizerConfig(_Section):
    name: Literal["adam", "adamw", "sgd"] = "adam"
    base_rate: float = Field(3.5e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD alone."""
    bias_factor: float = Field(2.0, gt=0)
    """Parameters named bias learn at this multiple of the base rate."""
    backbone_rate: float | None = Field(5e-6, gt=0)
    """The backbone's own parameters (not the camera embedding) learn at this rate; none: at the base rate."""
    classifier_factor: float = Field(1.0, gt=0)
    """Classifiers learn at this multiple of the base rate."""


class ScheduleConfig(_Section):
    name: Literal["cosine", "multistep"] = "cosine"
    epochs: int = Field(50, ge=1)
    warmup_epochs: int = Field(10, ge=0)
    noise: bool = True
    """The seeded multiplicative noise of the authors' cosine schedule."""
    milestones: tuple[int, ...] = Field((20, 40), strict=False)
    gamma: float = Field(0.1, gt=0)


class TrainingConfig(_Section):
    seed: int = Field(1234, ge=0)
    device: str = "auto"
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
    accumulation: int = Field(1, ge=1)
    """Parts that a batch goes through the backbone in, to save memory; every loss still sees the whole batch."""


class EvaluationConfig(_Section):
    protocol: Literal["camera", "scene"] = "camera"
    """Gallery items of the query's identity and camera (or scene) are dropped."""
    every: int = Field(1, ge=1)
    """Epochs between evaluations in training; the last epoch is always evaluated."""
    batch_size: int = Field(128, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dtype of matrix products when features are extracted; the authors evaluate in fp32."""
    max_rank: int = Field(50, ge=1)
    normalize: bool = True
    """L2-normalise features before ranking."""
    reranking: bool = False
    k1: int = Field(50, ge=1)
    k2: int = Field(15, ge=1)
    lambda_value: float = Field(0.3, ge=0, le=1)


class Config(_Section):
    """Everything that a run depends on."""

    output: str = "runs/signal"
    """The run directory."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    losses: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch tokens of an image: rows, columns."""
        backbone, (height, width) = self.model.backbone, self.data.image_size
        return (
            (height - backbone.patch_size) // backbone.stride + 1,
            (width - backbone.patch_size) // backbone.stride + 1,
        )

    @model_validator(mode="after")
    def _grid_fits(self) -> Config:
        rows, columns = self.grid_size
        if rows < 1 or columns < 1:
            raise ValueError(
                f"data.image_size must be at least model.backbone.patch_size ({self.model.backbone.patch_size}) "
                f"on each side, got {self.data.image_size}"
            )
        if self.model.selective_interaction and self.model.k_intra > rows * columns:
            raise ValueError(f"model.k_intra must be in 1..{rows * columns} (N), got {self.model.k_intra}")
        if self.data.batch_size % self.training.accumulation:
            raise ValueError(
                f"training.accumulation must divide data.batch_size ({self.data.batch_size}), "
                f"got {self.training.accumulation}"
            )
        if self.model.local_alignment and (rows < 8 or columns < 8):
            raise ValueError(
                "model.local_alignment needs a grid of at least 8 x 8 patches (two 4 x 4 windows each way), "
                f"got {rows} x {columns}"
            )
        return self
