"""Retrieval features with what the protocols need to know of each, from a model or from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from signal_reid.runtime import tensor_files
from signal_reid.runtime.device import DTYPES, Precision
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.files import is_stream, write_atomically
from signal_reid.runtime.text import read_json, shortened

if TYPE_CHECKING:
    from signal_reid.data import Batch


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # PyTorch does not add those of 8 bits


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Retrieval features of n samples, with the identity, camera and scene of each.

    Args:
        features: (n, d) floating point of 16 bits or more, finite.
        identities: (n,) int64.
        cameras: (n,) int64; -1 where the dataset knows no cameras.
        scenes: (n,) int64, or None where the dataset has no scenes.
        items: (n,) int64, equal where a query and a gallery item are the same sample, or None; for protocol `none`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a feature that is not finite.
    """

    features: Tensor  # (n, d)
    identities: Tensor  # (n,)
    cameras: Tensor  # (n,)
    scenes: Tensor | None = None  # (n,)
    items: Tensor | None = None  # (n,)

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not self.features.shape[1] or self.features.dtype not in _DTYPES:
            raise ValueError(
                "features must be a floating point tensor (16 bits or more) of shape (n, d), d at least 1, "
                f"got {self.features.dtype} of shape {tuple(self.features.shape)}"
            )
        for name, values in self._attributes().items():
            self._check_attribute(name, values)
        self._check_finite()

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> FeatureSet:
        """The chosen rows; a slice shares their memory."""
        return FeatureSet(self.features[rows], **{name: values[rows] for name, values in self._attributes().items()})

    def to(self, device: torch.device | str) -> FeatureSet:
        """The same set on another device."""
        moved = {name: values.to(device) for name, values in self._attributes().items()}
        return FeatureSet(self.features.to(device), **moved)

    def _attributes(self) -> dict[str, Tensor]:
        attributes = {"identities": self.identities, "cameras": self.cameras}
        optional = {"scenes": self.scenes, "items": self.items}
        return {**attributes, **{name: values for name, values in optional.items() if values is not None}}

    def _check_attribute(self, name: str, values: Tensor) -> None:
        if values.shape != self.features.shape[:1] or values.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 of shape ({len(self)},), one for each feature, "
                f"got {values.dtype} of shape {tuple(values.shape)}"
            )
        if values.device != self.features.device:
            raise ValueError(f"{name} must be on the features' device ({self.features.device}), got {values.device}")

    def _check_finite(self) -> None:
        # A sum is finite only where all of its terms are.
        if self.features.sum().isfinite():
            return
        # The extremes of each row carry its NaN and infinities without a temporary as large as the features.
        finite = self.features.amin(dim=1).isfinite() & self.features.amax(dim=1).isfinite()
        if not finite.all():  # a sum of finite terms may overflow
            bad = (~finite).nonzero().flatten()
            raise InputError(
                f"features must be finite, got NaN or infinity in {len(bad)} of {len(self)}, "
                f"the first at index {int(bad[0])}"
            )


def extract_features(
    model: nn.Module,
    loader: Iterable[Batch],
    device: torch.device | str,
    precision: str,
    prepare: Callable[[Tensor], Tensor],
    progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
    cameras_known: bool = True,
) -> FeatureSet:
    """Run the model in evaluation mode over a loader, and leave its modules in the modes they were in.

    Several processes call this with a share of the batches each, in the order of ranks, and all get the whole set. At
    most the set and one process's share of it are in memory.

    Args:
        model: `model(images, cameras)` gives features (B, d) in evaluation mode; already on `device`.
        loader: yields batches; a dataset without scenes gives -1 for each.
        device: where to compute, and where the result stays.
        precision: `fp32`, or `bf16` or `fp16` to autocast to.
        prepare: from uint8 images on the device to the model's input, the normalisation.
        progress: called after each batch with the number of samples in it.
        processes: that share the work, each with a loader of its own, which may be empty.
        cameras_known: whether the model is told the cameras, or None in their place.

    Returns:
        The features as the model gives them, Signal's in `precision`, not normalised, in the loaders' order.

    Raises:
        ValueError: an unknown precision, no batches, or a feature that is not finite.
        LostProcessError: a process ended.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
    device = torch.device(device)
    features: list[Tensor] = []
    identities: list[Tensor] = []
    cameras: list[Tensor] = []
    scenes: list[Tensor] = []
    with evaluation_mode(model), torch.inference_mode(), Precision(precision, device).autocast():
        for batch in loader:
            images = prepare(batch.images.to(device, non_blocking=True))  # (B, M, 3, H, W)
            camera = batch.cameras.to(device, non_blocking=True) if cameras_known else None
            features.append(model(images, camera))
            identities.append(batch.labels)
            cameras.append(batch.cameras)
            scenes.append(batch.scenes)
            if progress is not None:
                progress(len(batch.images))
    # Outside inference mode: ordinary tensors, which may enter autograd.
    gathered = [_gather(parts, device, processes) for parts in (features, identities, cameras, scenes)]
    if gathered[0] is None or gathered[1] is None or gathered[2] is None:
        raise ValueError("loader must yield at least one batch, got none")
    known = gathered[3] is not None and bool((gathered[3] >= 0).any())
    return FeatureSet(gathered[0], gathered[1], gathered[2], gathered[3] if known else None)


def _gather(parts: list[Tensor], device: torch.device, processes: Processes) -> Tensor | None:
    """The parts of all processes as one tensor, none where there are none; the list is emptied to free its memory."""
    rows = torch.cat(parts).to(device) if parts else None
    parts.clear()
    return processes.gather(rows, device)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, then for each module the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def save_features(
    path: str | Path, features: FeatureSet, names: Sequence[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a feature set and the name of each item to a safetensors file, in one piece or not at all.

    The file holds `features` in their dtype (NumPy has no bf16, PyTorch reads it), `identities`, `cameras`, `scenes`
    where known, and `names`: a JSON list as UTF-8 bytes (the header of a safetensors file is limited to 100 MB, too
    little for a million names). `metadata` are texts in the header on top.

    Raises:
        ValueError: a file name that does not end in .safetensors, or another number of names than features.
        FileNotFoundError: no such directory.
    """
    path = features_path(path)
    if len(names) != len(features):
        raise ValueError(f"names must be one for each feature ({len(features)}), got {len(names)}")
    encoded = bytearray(json.dumps(list(names)).encode())  # names that are not UTF-8 come back, too
    attributes = {name: values.clone() for name, values in features._attributes().items()}  # two may be one tensor
    tensors = {"features": features.features, **attributes}
    tensors = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    tensors["names"] = torch.frombuffer(encoded, dtype=torch.uint8)
    write_atomically(path, tensor_files.serialise(tensors, {"format": "pt", **(metadata or {})}))


def load_features(path: str | Path) -> tuple[FeatureSet, list[str]]:
    """Read what `save_features` wrote: the features, on the CPU, and the name of each.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file that `save_features` wrote.
    """
    path = features_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features: no file {path}")
    try:
        tensors, _ = tensor_files.read(path)
        names = read_json(tensors.pop("names").numpy().tobytes())
        features = FeatureSet(**tensors)
        if not isinstance(names, list) or len(names) != len(features) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"names must be a text for each of the {len(features)} features")
        return features, names
    except tensor_files.DamagedFileError as error:
        raise InputError(str(error)) from None
    except OSError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        problem = shortened(" ".join(str(error).split()))
        raise InputError(f"{path}: not a feature file written by `signal-reid extract` ({problem})") from None


def features_path(path: str | Path) -> Path:
    """A path that `save_features` can write to, checked before there is anything to write.

    Raises:
        InputError: the name does not end in .safetensors, and it is no pipe or other stream, which has no name to give.
    """
    path = Path(path)
    if path.suffix != ".safetensors" and not is_stream(path):
        raise InputError(f"features are kept in files named *.safetensors, got {path.name}")
    return path
