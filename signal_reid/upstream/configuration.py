"""Reads the configuration keys of the authors' code, so that their YAML files and overrides work as they are."""

from __future__ import annotations

import ast
import posixpath
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Values = dict[str, Any]

DEFAULTS: Values = {
    "MODEL.TRANSFORMER_TYPE": "vit_base_patch16_224",
    "MODEL.STRIDE_SIZE": [16, 16],
    "MODEL.SIE_CAMERA": True,
    "MODEL.SIE_COE": 3.0,
    "MODEL.DIRECT": 1,
    "MODEL.TOPK": 64,
    "MODEL.stageName": "CLS ",
    "MODEL.USE_B": False,
    "MODEL.USE_A": False,
    "MODEL.ID_LOSS_WEIGHT": 1.0,
    "MODEL.TRIPLET_LOSS_WEIGHT": 1.0,
    "MODEL.Gram_Loss_weight": 0.15,
    "MODEL.PAT_Loss_weight": 0.1,
    "MODEL.IF_LABELSMOOTH": "on",
    "INPUT.SIZE_TRAIN": [256, 128],
    "INPUT.SIZE_TEST": [256, 128],
    "INPUT.PROB": 0.5,
    "INPUT.RE_PROB": 0.5,
    "INPUT.PIXEL_MEAN": [0.5, 0.5, 0.5],
    "INPUT.PIXEL_STD": [0.5, 0.5, 0.5],
    "INPUT.PADDING": 10,
    "DATASETS.NAMES": "RGBNT201",
    "DATASETS.ROOT_DIR": "./data",
    "DATALOADER.NUM_WORKERS": 6,
    "DATALOADER.NUM_INSTANCE": 8,
    "SOLVER.OPTIMIZER_NAME": "SGD",
    "SOLVER.MAX_EPOCHS": 120,
    "SOLVER.BASE_LR": 0.009,
    "SOLVER.BIAS_LR_FACTOR": 2,
    "SOLVER.LARGE_FC_LR": False,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0001,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.STEPS": [40, 70],
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.SEED": 1234,
    "SOLVER.LOG_PERIOD": 10,
    "SOLVER.EVAL_PERIOD": 5,
    "SOLVER.IMS_PER_BATCH": 128,
    "TEST.IMS_PER_BATCH": 256,
    "TEST.RE_RANKING": "no",
    "TEST.FEAT_NORM": "yes",
    "OUTPUT_DIR": "./test",
    "ckpt_save_path": "baseline",
}
"""What their code assumes where a YAML file is silent."""


TEXT_KEYS = ("MODEL.PRETRAIN_PATH_T", "DATASETS.ROOT_DIR", "OUTPUT_DIR", "ckpt_save_path")
"""Paths, which are never read as numbers or dates."""
NONE = ("null", "None", "~")
"""What stands for no value where one is optional."""


def _to(key: str) -> Callable[[Any], Values]:
    return lambda value: {key: value}


def _stride(value: Any) -> Values:
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    if not sides or any(side != sides[0] for side in sides):
        raise ValueError(f"must be the same for both axes, got {value}")
    return {"model.backbone.stride": sides[0]}


def _dataset(value: Any) -> Values:
    name = str(value).lower()
    vehicles_by_scene = name == "msvr310"
    return {
        "data.dataset": name,
        "schedule.name": "multistep" if vehicles_by_scene else "cosine",
        "optimizer.classifier_factor": 100.0 if vehicles_by_scene else 1.0,
        "evaluation.protocol": "scene" if vehicles_by_scene else "camera",
    }


def _switch(value: Any) -> bool:
    """YAML 1.1 reads a bare `on` or `no` as a boolean and a quoted one as text."""
    if value in ("on", "yes", True):
        return True
    if value in ("off", "no", False):
        return False
    raise ValueError(f"must be on, yes, True, off, no or False, got {value!r}")


def _use_b(value: Any) -> Values:
    aligned = _switch(value)
    return {"model.global_alignment": aligned} | ({} if aligned else {"model.local_alignment": False})


def _use_a(value: Any) -> Values:
    """Without SIM their code computes neither alignment loss."""
    interaction = _switch(value)
    return {"model.selective_interaction": interaction} | ({} if interaction else _use_b(False))


def _output(value: Any) -> Values:
    if not isinstance(value, str):
        raise ValueError(f"must be a path, got {value!r}")
    return {"output": value}


def _only(*allowed: Any) -> Callable[[Any], Values]:
    def check(value: Any) -> Values:
        if value not in allowed:
            raise ValueError(f"must be {' or '.join(map(repr, allowed))}, got {value!r}")
        return {}

    return check


def _ignored(value: Any) -> Values:
    return {}


_IGNORED = (
    "MODEL.DEVICE",
    "MODEL.DEVICE_ID",
    "MODEL.NAME",
    "MODEL.NECK",
    "MODEL.ID_LOSS_TYPE",
    "MODEL.MoE_Loss_weight",
    "MODEL.DROP_PATH",
    "MODEL.DROP_OUT",
    "MODEL.ATT_DROP_RATE",
    "SOLVER.MARGIN",
    "SOLVER.CLUSTER_MARGIN",
    "SOLVER.CENTER_LR",
    "SOLVER.CENTER_LOSS_WEIGHT",
    "SOLVER.RANGE_K",
    "SOLVER.RANGE_MARGIN",
    "SOLVER.RANGE_ALPHA",
    "SOLVER.RANGE_BETA",
    "SOLVER.RANGE_LOSS_WEIGHT",
    "SOLVER.COSINE_MARGIN",
    "SOLVER.COSINE_SCALE",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL",
    "TEST.WEIGHT",
    "TEST.MISS",
    "TEST.FEAT",
    "ckpt_test_path",
)
"""Keys without effect on results in their code for this model."""

_KEYS: dict[str, Callable[[Any], Values]] = {
    "MODEL.TRANSFORMER_TYPE": _only("ViT-B-16"),
    "MODEL.PRETRAIN_PATH_T": lambda value: {"model.backbone.weights": None if value in NONE else value},
    "MODEL.STRIDE_SIZE": _stride,
    "MODEL.SIE_CAMERA": _to("model.backbone.camera_embedding"),
    "MODEL.SIE_VIEW": _only(False),
    "MODEL.SIE_COE": _to("model.backbone.sie_coe"),
    "MODEL.DIRECT": lambda value: {"model.heads": "joint" if _switch(value) else "per_modality"},
    "MODEL.TOPK": _to("model.k_intra"),
    "MODEL.stageName": lambda value: {"model.local_alignment": value != "CLS"},
    "MODEL.USE_B": _use_b,
    "MODEL.USE_A": _use_a,
    "MODEL.ID_LOSS_WEIGHT": _to("losses.identity"),
    "MODEL.TRIPLET_LOSS_WEIGHT": _to("losses.triplet"),
    "MODEL.Gram_Loss_weight": _to("losses.global_alignment"),
    "MODEL.PAT_Loss_weight": _to("losses.local_alignment"),
    "MODEL.IF_LABELSMOOTH": lambda value: {"losses.label_smoothing": 0.1 if _switch(value) else 0.0},
    "MODEL.METRIC_LOSS_TYPE": _only("triplet"),
    "MODEL.NO_MARGIN": _only(True),
    "MODEL.IF_WITH_CENTER": _only("no", False),
    "MODEL.DIST_TRAIN": _only(False),
    "MODEL.PROMPT": _only(False),
    "MODEL.ADAPTER": _only(False),
    "MODEL.FROZEN": _only(False),
    "INPUT.SIZE_TRAIN": _to("data.image_size"),
    "INPUT.SIZE_TEST": _to("data.image_size"),
    "INPUT.PROB": _to("data.augmentation.flip"),
    "INPUT.RE_PROB": _to("data.augmentation.erase"),
    "INPUT.PIXEL_MEAN": _to("data.mean"),
    "INPUT.PIXEL_STD": _to("data.std"),
    "INPUT.PADDING": _to("data.augmentation.pad"),
    "DATASETS.NAMES": _dataset,
    "DATASETS.ROOT_DIR": _to("data.root"),
    "DATALOADER.NUM_WORKERS": _to("data.workers"),
    "DATALOADER.SAMPLER": _only("softmax_triplet"),
    "DATALOADER.NUM_INSTANCE": _to("data.instances"),
    "SOLVER.OPTIMIZER_NAME": lambda value: {"optimizer.name": str(value).lower()},
    "SOLVER.MAX_EPOCHS": _to("schedule.epochs"),
    "SOLVER.BASE_LR": _to("optimizer.base_rate"),
    "SOLVER.BIAS_LR_FACTOR": _to("optimizer.bias_factor"),
    "SOLVER.LARGE_FC_LR": lambda value: {"optimizer.classifier_factor": 2.0} if _switch(value) else {},
    "SOLVER.MOMENTUM": _to("optimizer.momentum"),
    "SOLVER.WEIGHT_DECAY": _to("optimizer.weight_decay"),
    "SOLVER.WEIGHT_DECAY_BIAS": _to("optimizer.weight_decay"),
    "SOLVER.GAMMA": _to("schedule.gamma"),
    "SOLVER.STEPS": _to("schedule.milestones"),
    "SOLVER.WARMUP_ITERS": _to("schedule.warmup_epochs"),
    "SOLVER.WARMUP_FACTOR": _only(0.01),
    "SOLVER.WARMUP_METHOD": _only("linear"),
    "SOLVER.SEED": _to("training.seed"),
    "SOLVER.LOG_PERIOD": _to("training.log_every"),
    "SOLVER.EVAL_PERIOD": _to("evaluation.every"),
    "SOLVER.IMS_PER_BATCH": _to("data.batch_size"),
    "TEST.IMS_PER_BATCH": _to("evaluation.batch_size"),
    "TEST.RE_RANKING": lambda value: {"evaluation.reranking": _switch(value)},
    "TEST.NECK_FEAT": _only("before"),
    "TEST.FEAT_NORM": lambda value: {"evaluation.normalize": _switch(value)},
    "OUTPUT_DIR": _output,
    "ckpt_save_path": _output,
    **dict.fromkeys(_IGNORED, _ignored),
}

KEYS = tuple(_KEYS)
_TOP_LEVEL = {key.split(".")[0] for key in KEYS}
_SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
_LONGEST_LITERAL = 1000
_AGREEING = (("INPUT.SIZE_TRAIN", "INPUT.SIZE_TEST"), ("SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_BIAS"))


def is_upstream(key: str) -> bool:
    """Whether a key, dotted or not, is in the authors' naming."""
    top = key.split(".")[0]
    return top in _TOP_LEVEL or top.isupper()


def convert_file(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Values:
    """A whole file of the authors', dotted overrides on top and their defaults below, as dotted keys of ours.

    Raises:
        KeyError: an unknown key; its only argument is the key.
        ValueError: a setting that this package does not have, or two of theirs that must agree and do not.
    """
    return convert(DEFAULTS | dict(_flat(values)) | dict(overrides))


def convert(given: Mapping[str, Any]) -> Values:
    """Some dotted keys of the authors' as dotted keys of ours; raises as `convert_file` does."""
    for key in given:
        if key not in _KEYS:
            raise KeyError(key)
    given = {key: _literal(key, value) for key, value in given.items()}
    for first, second in _AGREEING:
        if first in given and second in given and _sequence(given[first]) != _sequence(given[second]):
            raise ValueError(f"{second} must equal {first} ({given[first]}), got {given[second]}")
    ours: Values = {}
    for key, read in _KEYS.items():  # in this order: USE_B and USE_A have the last word on what stageName asks for
        if key in given:
            try:
                ours |= read(given[key])
            except ValueError as error:
                raise ValueError(f"{key} {error}") from None
    if "OUTPUT_DIR" in given and "ckpt_save_path" in given:
        ours["output"] = posixpath.normpath(posixpath.join(given["OUTPUT_DIR"], given["ckpt_save_path"]))
    return ours


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None or f"{prefix}{key}" not in _SECTIONS:  # a section without a value is empty
            yield f"{prefix}{key}", value


def _literal(key: str, value: Any) -> Any:
    """Their loader reads a string that is a Python literal, such as `('RGBNT201')` or `5e-6`, as what it denotes."""
    if not isinstance(value, str) or len(value) > _LONGEST_LITERAL:  # thousands of signs would exhaust the parser
        return value
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return value
    return value if key in TEXT_KEYS and not isinstance(literal, str) else literal


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
