"""Typed configurations: YAML in, strict pydantic models out, `key=value` overrides in our names or the authors'."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from signal_reid import upstream_config


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line naming the key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


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
    dataset: Literal["rgbnt201", "rgbnt100", "msvr310"] = "rgbnt201"
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


class EvaluationConfig(_Section):
    protocol: Literal["camera", "scene"] = "camera"
    """Gallery items of the query's identity and camera (or scene) are dropped."""
    every: int = Field(1, ge=1)
    """Epochs between evaluations in training; the last epoch is always evaluated."""
    batch_size: int = Field(128, ge=1)
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
        if self.model.local_alignment and (rows < 8 or columns < 8):
            raise ValueError(
                "model.local_alignment needs a grid of at least 8 x 8 patches (two 4 x 4 windows each way), "
                f"got {rows} x {columns}"
            )
        return self


PUBLISHED = ("rgbnt201", "rgbnt100", "msvr310", "demo")


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        source: a published name (`rgbnt201`, `rgbnt100`, `msvr310`, `demo`), a YAML file in our naming or in the
            authors' upper-case naming, or a mapping of either kind.
        overrides: `key=value` strings applied on top, in either naming (`schedule.epochs=2`, `SOLVER.MAX_EPOCHS=2`).

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), an ill-typed value, or values that do not fit
            together.
        FileNotFoundError: no such file, and no published configuration of that name.
    """
    values = dict(source) if isinstance(source, Mapping) else _read(source)
    if upstream_config.is_upstream(values):
        values = _from_upstream(lambda: upstream_config.convert(values))
    for override in overrides:
        values = _merge(values, _parse_override(override))
    return _validate(values)


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if str(source) in PUBLISHED:
        text = (resources.files("signal_reid") / "configs" / f"{source}.yml").read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        raise FileNotFoundError(
            f"config: no file {source!s} and no published configuration of that name "
            f"(published: {', '.join(PUBLISHED)})"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"{source}:{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: a configuration is a mapping of keys, got {type(values).__name__}")
    return values


def _validate(values: Mapping[str, Any]) -> Config:
    values = _numbers(values, Config)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from None


def _numbers(values: Any, section: type[BaseModel]) -> Any:
    """Read `5e-6`, which YAML 1.1 takes for a string, and whole numbers given for fractions, as floats."""
    if not isinstance(values, Mapping):
        return values
    result = {}
    for key, value in values.items():
        field = section.model_fields.get(key)
        annotation = field.annotation if field else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            value = _numbers(value, annotation)
        elif annotation is float or float in get_args(annotation):
            if isinstance(value, str):
                with contextlib.suppress(ValueError):
                    value = float(value)
            elif isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
        result[key] = value
    return result


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown_key(key)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}.{message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _unknown_key(key: str) -> str:
    upstream = upstream_config.is_upstream({key.split(".")[0]: None})
    known = upstream_config.KEYS if upstream else tuple(_leaf_keys(Config))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
    tail = key.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == tail]
    nearest = same_name[0] if same_name else near[0] if near else None
    return f"unknown key {key}" + (f"; the nearest valid key is {nearest}" if nearest else "")


def _leaf_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaf_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override must read key=value, got {override!r}")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    if upstream_config.is_upstream({key.split(".")[0]: None}):
        return _from_upstream(lambda: upstream_config.convert_key(key, value))
    if key not in _leaf_keys(Config):
        raise ConfigError(_unknown_key(key))
    return _nested(key, value)


def _from_upstream(convert: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Nest the authors' keys once converted, their errors in our form."""
    try:
        dotted = convert()
    except KeyError as error:
        raise ConfigError(_unknown_key(error.args[0])) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    values: dict[str, Any] = {}
    for key, value in dotted.items():
        values = _merge(values, _nested(key, value))
    return values


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
