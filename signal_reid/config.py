"""Typed configurations: YAML in, strict pydantic models out, `key=value` overrides in our names or the authors'."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from signal_reid import upstream_config


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line naming the key."""


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


PUBLISHED = ("rgbnt201", "rgbnt100", "msvr310", "demo")


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        source: a published name (`rgbnt201`, `rgbnt100`, `msvr310`, `demo`), a YAML file in our naming or in the
            authors' upper-case naming, or a mapping of either kind.
        overrides: `key=value` strings applied on top, in either naming (`schedule.epochs=2`, `SOLVER.MAX_EPOCHS=2`):
            first all of the authors', taken together, then ours in order.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), an ill-typed value, or values that do not fit
            together.
        FileNotFoundError: no such file, and no published configuration of that name.
    """
    values = _text_keys(source if isinstance(source, Mapping) else _read(source))
    given = [_parse_override(override) for override in overrides]
    theirs = {key: value for key, value in given if upstream_config.is_upstream(key)}
    if _is_upstream(values):
        values = _from_upstream(lambda: upstream_config.convert_file(values, theirs))
    else:
        values = _merge(values, _from_upstream(lambda: upstream_config.convert(theirs)))
    for key, value in given:
        if key not in theirs:
            values = _merge(values, _nested(key, value))
    return _validate(values)


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if str(source) in PUBLISHED:
        content = (resources.files("signal_reid") / "configs" / f"{source}.yml").read_bytes()
    elif path.is_file():
        content = path.read_bytes()
    else:
        raise FileNotFoundError(
            f"config: no file {source!s} and no published configuration of that name "
            f"(published: {', '.join(PUBLISHED)})"
        )
    try:
        values = yaml.safe_load(content.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: not a text file in UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where is not None else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{source}:{line} is not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: a configuration is a mapping of keys, got {type(values).__name__}")
    return values


def _text_keys(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Keys that YAML reads as numbers or dates become text, so that they are named as unknown."""
    return {str(key): _text_keys(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _is_upstream(values: Mapping[str, Any]) -> bool:
    theirs = [key for key in values if upstream_config.is_upstream(key)]
    ours = [key for key in values if key in Config.model_fields]
    if theirs and ours:
        raise ConfigError(f"{ours[0]} and {theirs[0]}: a file uses either our keys or the authors', not both")
    return bool(theirs)


def _validate(values: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(_numbers(values, Config))
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
            value = _numbers({} if value is None else value, annotation)
        elif annotation is float or float in get_args(annotation):
            value = [_float(item) for item in value] if isinstance(value, (list, tuple)) else _float(value)
        result[key] = value
    return result


def _float(value: Any) -> Any:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return value


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
    known = upstream_config.KEYS if upstream_config.is_upstream(key) else tuple(_leaf_keys(Config))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
    tail = key.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == tail]
    nearest = same_name[0] if same_name else near[0] if near else None
    return f"unknown key {key}" + (f"; the nearest valid key is {nearest}" if nearest else "")


def _leaf_keys(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting's dotted key and annotation."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= _leaf_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = field.annotation
    return keys


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override must read key=value, got {override!r}")
    if upstream_config.is_upstream(key):
        return key, text if key in upstream_config.TEXT_KEYS else _yaml_value(text)
    annotations = _leaf_keys(Config)
    if key not in annotations:
        raise ConfigError(_unknown_key(key))
    kinds = get_args(annotations[key])
    if type(None) in kinds and text in upstream_config.NONE:
        return key, None
    takes_text = any(kind is str or isinstance(kind, str) for kind in (annotations[key], *kinds))
    return key, text if takes_text else _yaml_value(text)


def _yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError):
        return text


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
