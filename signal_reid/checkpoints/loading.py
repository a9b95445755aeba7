"""Loads a checkpoint of any supported naming into a model: everything is checked before anything is copied."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from signal_reid.backbones.base import FileNaming
from signal_reid.checkpoints import formats, hub
from signal_reid.checkpoints.errors import CheckpointError
from signal_reid.checkpoints.exporting import VERSION
from signal_reid.checkpoints.reading import Contents, read, read_configuration
from signal_reid.checkpoints.wrapping import unwrap
from signal_reid.methods.base import Method, Part
from signal_reid.runtime.text import shortened
from signal_reid.runtime.troubles import explain

CAMERAS = "backbone.camera_embedding"
POSITIONS = "backbone.position_embedding"
CLASSIFIER = "heads.0.classifier.weight"
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class LoadReport:
    """What a loaded checkpoint gave the model and what it did not."""

    source: str
    """The file."""
    format: str
    """The naming: `signal-reid`, or one of the method or the backbone, such as `authors`, `clip`, `hugging-face`."""
    loaded: int
    """Entries of the model that were filled."""
    dropped: tuple[tuple[str, str], ...] = ()
    """Entries of the file that were not used, each with the reason."""
    initialised: tuple[str, ...] = ()
    """Modules and entries of the model that kept the values they had."""
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """The report in a few lines."""
        lines = [f"{self.source}: {self.loaded} entries loaded ({self.format} naming)"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped:
            reasons.setdefault(reason, []).append(name)
        lines += [f"dropped {_listed(names)}: {reason}" for reason, names in reasons.items()]
        if self.initialised:
            lines.append(f"left as initialised: {', '.join(self.initialised)}")
        return "\n".join([*lines, *self.notes])


class Description(NamedTuple):
    """What a checkpoint says about the model that it was made with."""

    format: str
    num_identities: int | None
    """None for the file of a backbone, which has no heads."""
    num_cameras: int
    """Rows of the camera embedding; 0 without one."""
    config: str | None
    """The configuration as YAML, where the file carries it."""
    elements: int
    """Numbers in all its tensors together."""


def load(model: nn.Module, source: str | Path | Mapping[str, Any]) -> LoadReport:
    """Load a checkpoint whose naming is recognised by itself.

    Files of a backbone, such as CLIP's, fill the backbone alone: CLIP's text tower is ignored, its position embedding
    is resized to the model's grid, and the rest of the model stays as it is. The blocks compute QuickGELU, as OpenAI's
    weights expect. Weights that were trained with plain GELU fit in shape but not in function: they are refused where
    `config.json` (Hugging Face) or `open_clip_config.json` beside them says so; else the notes say what is unknown.

    Two differences are dropped and reported. Another number of identities: the classifiers, which evaluation does not
    read. Another number of cameras: the camera embedding, which evaluation does read, so the features are those of the
    file only once it is trained again.

    Args:
        model: a method's model, perhaps wrapped by DistributedDataParallel or torch.compile; an error leaves it
            untouched.
        source: a file (safetensors, `torch.save`, OpenAI's TorchScript archive, the index of a sharded checkpoint), a
            directory with one, or a state dict.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is no checkpoint, or entries are missing, unexpected or of another shape.
    """
    return _load(unwrap(model), read(source), backbone_only=False)


def load_backbone(model: nn.Module, weights: str) -> LoadReport:
    """Load the backbone alone, from a CLIP file or from a Signal checkpoint.

    Args:
        model: as for `load`.
        weights: a file or directory, or `hub:OWNER/NAME[:FILE]` to fetch one with huggingface_hub.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: as for `load`, or the file cannot be fetched.
    """
    path = hub.fetch(weights) if hub.is_reference(weights) else Path(weights)
    return _load(unwrap(model), read(path), backbone_only=True)


def describe(source: str | Path | Mapping[str, Any]) -> Description:
    """Tell which model a checkpoint needs; see `load` for the argument and the errors.

    Files of ours say it themselves; in others it is counted.
    """
    contents = read(source)
    format = formats.recognise(contents, formats.all_namings())
    ours, said = _converted(contents, format), contents.metadata
    identities = _rows(ours, CLASSIFIER, contents.origin)
    if identities is None:
        identities = _count(said.get("num_identities"), ours.values(), contents.origin)
    cameras = _rows(ours, CAMERAS, contents.origin)
    elements = sum(value.numel() for value in ours.values())
    return Description(format.name, identities, cameras or 0, said.get("config"), elements)


def _rows(state: Mapping[str, Tensor], name: str, origin: str) -> int | None:
    """Rows of an entry, none where there is no such entry."""
    value = state.get(name)
    if value is not None and value.ndim != 2:
        raise CheckpointError(f"{origin}: {name} must have 2 dimensions, got {value.ndim}")
    return None if value is None else len(value)


def _count(said: str | None, state: Iterable[Tensor], origin: str) -> int | None:
    """Identities that a file says, of which a classifier of its method has a row each."""
    if said is None or not said.isdecimal():
        return None
    most = max((len(value) for value in state if value.ndim), default=0)
    if len(said) > 18 or int(said) > most:
        raise CheckpointError(f"{origin}: says num_identities {shortened(said)}, holds at most {most} rows of anything")
    return int(said)


@dataclass
class _Match:
    """The entries of a file held against those of a model."""

    accepted: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)


def _load(model: Method, contents: Contents, backbone_only: bool) -> LoadReport:
    format = formats.recognise(contents, formats.namings_of(model))
    target = model.state_dict()
    ours, notes = _converted(contents, format), list[str]()
    backbone_only = backbone_only or format.backbone_only
    if format.backbone_only:
        unsaid = _check_configuration(contents, format)
        ours, notes = _adapted(ours, model, contents.origin)
        notes += unsaid
    else:
        _check_metadata(contents, model)
        if backbone_only:
            ours = {name: value for name, value in ours.items() if name.startswith("backbone.")}
            notes.append("only the backbone of the checkpoint was used")
    match = _match(ours, target, type(model).parts, backbone_only, needs_cameras=not format.backbone_only)
    if match.missing or match.unexpected or match.mismatched:
        raise CheckpointError(
            _of_another_size(model, ours, format, contents.origin)
            or _complaint(match, ours, target, format, contents.origin, type(model))
        )
    with torch.no_grad():
        for name, value in match.accepted.items():
            target[name].copy_(value)
    dropped = tuple((_file_name(name, format, target), reason) for name, reason in match.dropped.items())
    kept = _groups([name for name in target if name not in match.accepted], target)
    return LoadReport(contents.origin, format.name, len(match.accepted), dropped, kept, tuple(notes))


def _converted(contents: Contents, format: FileNaming) -> dict[str, Tensor]:
    try:
        return format.to_ours(contents.state)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:  # a known name on a tensor of another shape
        if explain(error) is not None:
            raise
        problem = shortened(" ".join(str(error).split()))
        raise CheckpointError(f"{contents.origin}: read as {format.title}, it does not fit: {problem}") from None


def _match(
    ours: dict[str, Tensor],
    target: dict[str, Tensor],
    parts: Sequence[Part],
    backbone_only: bool,
    needs_cameras: bool,
) -> _Match:
    match = _Match()
    optional = {part.name: part for part in parts}
    in_file, in_model = {_module(name) for name in ours}, {_module(name) for name in target}
    for name, value in ours.items():
        if name in target:
            if _fits(value, target[name]):
                match.accepted[name] = value
            elif (reason := _acceptable_difference(name, value, target[name])) is not None:
                match.dropped[name] = reason
            else:
                match.mismatched.append(name)
        elif name == CAMERAS:
            match.dropped[name] = "the model has no camera embedding, so its features are those of no known camera"
        elif _module(name) in optional and _module(name) not in in_model:
            match.dropped[name] = optional[_module(name)].without
        else:
            match.unexpected.append(name)
    for name in target:
        part = optional.get(_module(name))
        needless = part is not None and part.training_only and part.name not in in_file
        wanted = name.startswith("backbone.") or not (backbone_only or needless)
        if name not in ours and wanted and (name != CAMERAS or needs_cameras):
            match.missing.append(name)
    return match


def _fits(value: Tensor, target: Tensor) -> bool:
    same_kind = value.is_floating_point() == target.is_floating_point() and not value.is_complex()
    return value.shape == target.shape and same_kind


def _acceptable_difference(name: str, value: Tensor, target: Tensor) -> str | None:
    """Why an entry of another shape may be left out, or None if it may not."""
    if value.ndim != 2 or value.shape[1:] != target.shape[1:]:
        return None
    if name.endswith(".classifier.weight"):
        return (
            f"{len(value)} identities in the file, {len(target)} in the model; "
            "classifiers are used in training only, evaluation does not read them"
        )
    if name == CAMERAS:
        return (
            f"{len(value)} cameras in the file, {len(target)} in the model, whose camera embedding keeps its initial "
            f"values; for the features of the file build the model with {len(value)} cameras"
        )
    return None


def _adapted(ours: dict[str, Tensor], model: Method, origin: str) -> tuple[dict[str, Tensor], list[str]]:
    """The entries of a backbone's file, fitted to the model's backbone, and what was done to them."""
    prefix = "backbone."
    inside = {name.removeprefix(prefix): value for name, value in ours.items() if name.startswith(prefix)}
    rest = {name: value for name, value in ours.items() if not name.startswith(prefix)}
    try:
        adapted, notes = model.backbone.adapt(inside)
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}") from None
    return {f"{prefix}{name}": value for name, value in adapted.items()} | rest, notes


def _check_configuration(contents: Contents, format: FileNaming) -> list[str]:
    """Hold the other program's configuration beside the weights against the network; what is not known without one.

    Raises:
        CheckpointError: the weights are those of another network.
    """
    described = None if format.configuration is None else read_configuration(contents, format.configuration)
    if described is None:
        unsaid = format.unsaid(contents.state)
        return [] if unsaid is None else [unsaid]
    misfit = format.misfit(described)
    if misfit is not None:
        raise CheckpointError(f"{contents.origin}: {format.configuration} beside it says: {misfit}")
    return []


def _check_metadata(contents: Contents, model: Method) -> None:
    """16 x 8 and 8 x 16 patches have position embeddings of one shape; our files say which it was."""
    version, trained = contents.metadata.get("signal_reid", VERSION), contents.metadata.get("grid_size")
    grid = _grid(model.backbone.grid_size)
    if version != VERSION:
        raise CheckpointError(f"{contents.origin}: of file version {version}, this signal-reid reads version {VERSION}")
    method = contents.metadata.get("method", model.method)
    if method != model.method:
        raise CheckpointError(f"{contents.origin}: weights of method {method}, the model's is {model.method}")
    if trained is not None and trained != grid:
        raise CheckpointError(
            f"{contents.origin}: trained at another image size: a grid of {trained} patches, the model has {grid}"
        )


def _grid(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _of_another_size(model: Method, ours: dict[str, Tensor], format: FileNaming, origin: str) -> str | None:
    """Why the file's backbone is another one than the model's, which explains more than the names of its entries."""
    prefix = "backbone."
    inside = {name.removeprefix(prefix): value for name, value in ours.items() if name.startswith(prefix)}
    misfit = model.backbone.other_size(inside) if inside else None
    return None if misfit is None else f"{origin}: read as {format.title}, its backbone is {misfit}"


def _complaint(
    match: _Match,
    ours: dict[str, Tensor],
    target: dict[str, Tensor],
    format: FileNaming,
    origin: str,
    method: type[Method],
) -> str:
    parts = []
    if match.missing:
        parts.append(f"{len(match.missing)} missing ({_listed(_file_name(n, format, target) for n in match.missing)})")
    if match.unexpected:
        names = [_file_name(name, format, ours) for name in match.unexpected]
        parts.append(f"{len(names)} unexpected ({_listed(names)})")
    if match.mismatched:
        shapes = [
            f"{_file_name(name, format, target)}: {_shape(ours[name])} in the file, {_shape(target[name])} in the model"
            for name in match.mismatched
        ]
        parts.append(f"{len(shapes)} of another shape or type ({_listed(shapes, '; ')})")
    hints = [*_backbone_hints(match), *method.mismatch_hints(ours, target)]
    told = "".join(f"; {hint}" for hint in hints)
    return f"{origin}: read as {format.title}, it does not fit the model: {', '.join(parts)}{told}"


def _backbone_hints(match: _Match) -> list[str]:
    hints = []
    if POSITIONS in match.mismatched:
        hints.append("it was trained at another image size")
    if CAMERAS in match.missing:
        hints.append("without a camera embedding set model.backbone.camera_embedding=false")
    return hints


def _shape(value: Tensor) -> str:
    kind = "" if value.is_floating_point() else " integers"
    return f"{tuple(value.shape)}{kind}"


def _file_name(name: str, format: FileNaming, entries: Collection[str]) -> str:
    return " + ".join(format.file_names(name, entries))


def _listed(names: Iterable[str], separator: str = ", ") -> str:
    names = [shortened(name) for name in names]
    rest = len(names) - _NAMES_SHOWN
    return separator.join(names[:_NAMES_SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _module(name: str) -> str:
    return name.split(".", 1)[0]


def _groups(names: list[str], target: dict[str, Tensor]) -> tuple[str, ...]:
    """Modules of which nothing was filled, and single entries of the others."""
    groups: dict[str, None] = {}
    for name in names:
        whole = {other for other in target if _module(other) == _module(name)} <= set(names)
        groups[_module(name) if whole else name] = None
    return tuple(groups)
