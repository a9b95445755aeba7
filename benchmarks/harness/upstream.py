"""Imports the authors' code from a checkout, from outside and without a change to it, so that it can be run.

The authors' files import packages that nothing here needs, hard-code the device "cuda" and read CLIP's weights from an
absolute path. Missing packages get stand-ins for the time of the import, and CLIP is built without its weights.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.abc
import importlib.machinery
import io
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from . import torchvision_transforms

PACKAGES = ("einops", "ftfy", "fvcore", "regex", "timm", "torchvision", "tqdm", "yacs")
PLOTTING = ("matplotlib", "scipy", "seaborn", "sklearn")
"""Replaced even where they are installed: their evaluation asks for names that newer versions have not."""
MODULES = {
    "config": "config",
    "model": "modeling.make_model",
    "backbone": "modeling.meta_arch",
    "vit": "modeling.clip.model",
    "interaction": "modeling.AddModule.useA",
    "alignment": "modeling.AddModule.useB",
    "loss": "layers.make_loss",
    "optimizer": "solver.make_optimizer",
}
EVALUATION_MODULES = {"metrics": "utils.metrics"}
LOADING_MODULES = {"config": "config", "data": "data"}
CONFIGS = {"rgbnt201": "RGBNT201", "rgbnt100": "RGBNT100", "msvr310": "MSVR310"}
STAGE = "together_CLS_Patch"


class Upstream:
    """The authors' model, loss and optimizer as a checkout has them.

    Args:
        path: the checkout's root.

    Raises:
        FileNotFoundError: the directory is not such a checkout.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.modules = load_modules(self.path, MODULES)

    def config(self, name: str) -> Any:
        """Their configuration of a data set: `rgbnt201`, `rgbnt100` or `msvr310`."""
        config = self.modules["config"].cfg.clone()
        config.merge_from_file(str(self.path / "configs" / CONFIGS[name] / "Signal.yml"))
        return config

    def build_model(self, config: Any, num_identities: int, num_cameras: int, layers: int = 12) -> nn.Module:
        """Their `Signal` around their ViT-B/16 with random weights."""
        vit = self.modules["vit"].VisionTransformer

        def build_clip(config: Any, name: str, rows: int, columns: int, stride: Any) -> _Clip:
            return _Clip(vit(rows, columns, 16, tuple(stride), 768, layers, 12, 512, config))

        backbone = self.modules["backbone"]
        original, backbone.load_clip_to_cpu = backbone.load_clip_to_cpu, build_clip
        try:
            with redirect_stdout(io.StringIO()):
                return self.modules["model"].make_frame(config, num_identities, num_cameras)
        finally:
            backbone.load_clip_to_cpu = original

    def loss_function(self, config: Any, num_identities: int) -> Callable[[Sequence[Any], Tensor, Tensor], Tensor]:
        """(the model's outputs, labels, cameras) -> their total loss, weighted as their training loop does."""
        with redirect_stdout(io.StringIO()):
            head_loss, _ = self.modules["loss"].make_loss(config, num_identities)

        def total(outputs: Sequence[Any], labels: Tensor, cameras: Tensor) -> Tensor:
            _, *heads, gam, lam = outputs
            losses = [
                head_loss(score=score, feat=feature, target=labels, target_cam=cameras)
                for score, feature in zip(heads[::2], heads[1::2], strict=True)
            ]
            return sum(losses) + config.MODEL.Gram_Loss_weight * gam + config.MODEL.PAT_Loss_weight * lam

        return total

    def make_optimizer(self, config: Any, model: nn.Module, num_identities: int) -> torch.optim.Optimizer:
        """Their optimizer, one group per parameter."""
        with redirect_stdout(io.StringIO()):
            _, center = self.modules["loss"].make_loss(config, num_identities)
            return self.modules["optimizer"].make_optimizer(config, model, center)[0]

    def selective_interaction(self, k: int) -> nn.Module:
        """Their SIM for 512 channels."""
        return self.modules["interaction"].Select_Interactive_Module(512, k)

    def alignment(self, grid_size: tuple[int, int]) -> nn.Module:
        """Their GAM (`Cls_Align`) and LAM (`patch_Align`) for 512 channels."""
        return self.modules["alignment"].AlignmentM(512, *grid_size)


class UpstreamEvaluation:
    """The authors' evaluation of features, and their re-ranking.

    Args:
        path: the checkout's root.

    Raises:
        FileNotFoundError: the directory is not such a checkout.
    """

    def __init__(self, path: str | Path):
        self._metrics = load_modules(Path(path), EVALUATION_MODULES)["metrics"]

    def camera(self, batches: Sequence[Sequence[Any]], num_query: int, reranking: bool) -> tuple[float, Any]:
        """mAP and CMC of the protocol of RGBNT201, from batches (features, identities, cameras, scenes, names)."""
        evaluator = self._metrics.R1_mAP_eval(num_query, max_rank=50, feat_norm=True, reranking=reranking)
        return self._compute(evaluator, [(*batch[:3], batch[4]) for batch in batches])

    def scene(self, batches: Sequence[Sequence[Any]], num_query: int) -> tuple[float, Any]:
        """mAP and CMC of the protocol of MSVR310; it writes a file `re.txt` into the working directory."""
        evaluator = self._metrics.R1_mAP(num_query, max_rank=50, feat_norm="yes")
        return self._compute(evaluator, batches)

    def _compute(self, evaluator: Any, batches: Sequence[Sequence[Any]]) -> tuple[float, Any]:
        evaluator.reset()
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in batches:
                evaluator.update(batch)
            cmc, mean_precision, *_ = evaluator.compute()
        return float(mean_precision), cmc


class UpstreamLoading:
    """The authors' data set, transforms and loaders of RGBNT201.

    torchvision's transforms are those of `torchvision_transforms` where it is not installed.

    Args:
        path: the checkout's root.

    Raises:
        FileNotFoundError: the directory is not such a checkout.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._modules = load_modules(self._path, LOADING_MODULES)

    def loaders(
        self, root: str | Path, batch: int, instances: int, size: Sequence[int], workers: int = 0, augment: bool = True
    ) -> tuple[Any, Any]:
        """Their loader of the training split, and theirs of the queries followed by the gallery.

        Args:
            root: holds the data set at `512/data/RGBNT201`, where their class looks for it.
            batch: triplets.
            instances: triplets of each identity in a training batch.
            size: height, width of the images.
            workers: processes.
            augment: flip, pad, crop and erase the training images as they do.
        """
        config = self._modules["config"].cfg.clone()
        config.merge_from_file(str(self._path / "configs" / CONFIGS["rgbnt201"] / "Signal.yml"))
        config.DATASETS.ROOT_DIR, config.DATALOADER.NUM_WORKERS = str(root), workers
        config.SOLVER.IMS_PER_BATCH = config.TEST.IMS_PER_BATCH = batch
        config.DATALOADER.NUM_INSTANCE = instances
        config.INPUT.SIZE_TRAIN = config.INPUT.SIZE_TEST = list(size)
        if not augment:
            config.INPUT.PROB = config.INPUT.RE_PROB = config.INPUT.PADDING = 0
        with redirect_stdout(io.StringIO()):
            train, _, evaluation, *_ = self._modules["data"].make_dataloader(config)
        return train, evaluation


@contextmanager
def temporary_working_directory() -> Iterator[None]:
    """Work in a temporary directory: the authors' metrics write into the one they run in."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        try:
            yield
        finally:
            os.chdir(before)


def build_upstream_model(
    path: str | Path, config_name: str, num_identities: int, num_cameras: int, layers: int = 12
) -> nn.Module:
    """The authors' Signal model of a published configuration, with random weights; see `Upstream`."""
    upstream = Upstream(path)
    return upstream.build_model(upstream.config(config_name), num_identities, num_cameras, layers)


def load_modules(path: Path, names: Mapping[str, str]) -> dict[str, ModuleType]:
    """Import modules of a checkout by their dotted names, leaving `sys.path` and `sys.modules` as they were.

    Args:
        path: the checkout's root.
        names: key of the result -> dotted name.

    Raises:
        FileNotFoundError: a module is not there.
    """
    for name in names.values():
        file = Path(*name.split("."))
        if not (path / file).is_dir() and not (path / file.with_suffix(".py")).is_file():
            raise FileNotFoundError(f"--upstream must name a checkout of the authors' Signal, got {path} (no {file})")
    with _importing_from(path.resolve()):
        return {key: importlib.import_module(name) for key, name in names.items()}


@contextmanager
def _importing_from(path: Path) -> Iterator[None]:
    """Put the checkout first on the import path and stand-ins last; undo both, and forget what came from either."""
    own = {entry.stem for entry in path.iterdir() if entry.is_dir() or entry.suffix == ".py"} | {*PLOTTING}
    shadowed = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in own}
    first, last = _StandInFinder(PLOTTING), _StandInFinder(PACKAGES)
    sys.path.insert(0, str(path))
    sys.meta_path[:] = [first, *sys.meta_path, last]
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in (first, last)]
        sys.path.remove(str(path))
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in own or isinstance(module, _StandIn):
                del sys.modules[name]
        sys.modules.update(shadowed)
        importlib.invalidate_caches()


class _Clip:
    """As much of CLIP as their backbone takes: the image encoder, and a `.to("cuda")` that leaves it where it is."""

    def __init__(self, visual: nn.Module):
        self.visual = visual

    def to(self, device: str) -> _Clip:
        return self


class _Placeholder:
    """Takes the place of a class, function, constant or decorator that is imported and never used."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self

    def __getattr__(self, name: str) -> _Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _StandIn(ModuleType):
    """A module every name of which can be imported."""

    def __getattr__(self, name: str) -> _Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder()


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves packages that nothing before it on `sys.meta_path` found, but nothing inside an installed one."""

    def __init__(self, packages: Sequence[str]):
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, inside = name.partition(".")
        if package in self._packages and (not inside or isinstance(sys.modules.get(package), _StandIn)):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(_USED.get(module.__name__, {}))


class CfgNode(dict):
    """Configuration keys as attributes; values that read as Python literals become them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def clone(self) -> CfgNode:
        return copy.deepcopy(self)

    def merge_from_file(self, path: str) -> None:
        self._merge(yaml.safe_load(Path(path).read_text()))

    def _merge(self, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                self[key]._merge(value)
            else:
                self[key] = _literal(value)


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`einops.rearrange` for named axes, grouped or not: split on the left, permute, join on the right."""
    left, right = (_axis_groups(side) for side in pattern.split("->"))
    known = dict(sizes)
    for group, size in zip(left, x.shape, strict=True):
        unknown = [axis for axis in group if axis not in sizes]
        known |= {axis: size // math.prod(sizes[other] for other in group if other != axis) for axis in unknown}
    order = [axis for group in left for axis in group]
    x = x.reshape([known[axis] for axis in order]).permute([order.index(axis) for group in right for axis in group])
    return x.reshape([math.prod(known[axis] for axis in group) for group in right])


@cache
def _axis_groups(side: str) -> tuple[tuple[str, ...], ...]:
    """`b (g c) h` -> (("b",), ("g", "c"), ("h",))."""
    return tuple(tuple(group.split()) for pair in re.findall(r"\(([^)]*)\)|(\S+)", side) for group in pair if group)


_USED: dict[str, dict[str, Any]] = {
    "einops": {"rearrange": rearrange},
    "torchvision.transforms": vars(torchvision_transforms),
    "timm.models.layers": {"trunc_normal_": nn.init.trunc_normal_},
    "yacs.config": {"CfgNode": CfgNode},
}
"""What the code that is run does use of the packages."""
