"""Features of items that lack labels, and may lack modalities, with the mark of the weights that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from signal_reid.config import Config
from signal_reid.data import Augmentation, Sample, decode
from signal_reid.data.decoding import EVALUATION, threaded
from signal_reid.data.images import developed
from signal_reid.data.layouts.options import Reading
from signal_reid.data.progress import ProgressCallback
from signal_reid.evaluation.features import evaluation_mode
from signal_reid.evaluation.missing import no_parts
from signal_reid.evaluation.trained import load_model
from signal_reid.methods.base import Encoded, Method
from signal_reid.runtime.device import Precision, choose_device
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError
from signal_reid.runtime.troubles import EVALUATION_MEMORY, explained
from signal_reid.search.segments import Entry
from signal_reid.search.sources import check_modalities, modality_names, read_as, readings


@dataclass(frozen=True)
class FeatureMaker:
    """A model that makes features of single items.

    An absent modality is an image of zeros after normalisation, the mean grey. With `evaluation.absent=present` nothing
    stands for it: its part of the feature is zero, so that a score counts what both sides have. No camera embedding is
    added, since nobody knows the camera of an image of one's own, and features with and without one do not compare.
    """

    config: Config
    model: Method
    device: torch.device
    modalities: tuple[str, ...]
    fingerprint: str

    @staticmethod
    def load(
        weights: str | Path,
        config: str | Path | None = None,
        overrides: Sequence[str] = (),
        processes: Processes = ALONE,
    ) -> FeatureMaker:
        """The model of some weights; no data set is needed. See `load_model` for arguments and errors."""
        loaded, model, _ = load_model(Path(weights), config, overrides)
        device = choose_device(loaded.training.device, processes)
        mark = fingerprint(loaded, model)
        return FeatureMaker(loaded, model.to(device), device, modality_names(loaded), mark)

    @cached_property
    def _readings(self) -> list[Reading]:
        return readings(self.config, self.modalities)

    @cached_property
    def dimension(self) -> int:
        """Numbers of a feature."""
        blank = torch.zeros(1, len(self.modalities), 3, *self.config.data.image_size, dtype=torch.uint8)
        return self.of_images(blank, torch.ones(1, len(self.modalities), dtype=torch.bool)).shape[1]

    def of_entries(self, entries: Sequence[Entry], progress: ProgressCallback | None = None) -> Iterator[Tensor]:
        """Features (b, d) of unit length, on the CPU, of `evaluation.batch_size` items after another.

        Args:
            entries: each with an image of at least one modality.
            progress: called with the items done and their number.

        Raises:
            DataError: an unreadable image.
            MachineError: too little memory.
        """
        step = self.config.evaluation.batch_size
        for start in range(0, len(entries), step):
            some = entries[start : start + step]
            images = torch.zeros(len(some), len(self.modalities), 3, *self.config.data.image_size, dtype=torch.uint8)
            for image, decoded in zip(images, threaded(self._decode, some), strict=True):
                image.copy_(decoded)
            present = torch.tensor([[source is not None for source in entry.sources] for entry in some])
            yield self.of_images(images, present)
            if progress is not None:
                progress(start + len(some), len(entries))

    def of_arrays(self, items: Sequence[Mapping[str, Any]]) -> Tensor:
        """Features (n, d) of images that are in memory, by modality: arrays, or Pillow's images.

        Args:
            items: arrays are uint8 of shape (H, W, 3) or (H, W); or uint16, int32 or float32 of shape (H, W), which
                need a range of the modality in `data.images.ranges`, as files deeper than 8 bits do.

        Raises:
            InputError: another kind of image, or of a modality that the model does not have.
            DataError: an image that the settings refuse.
        """
        images = torch.zeros(len(items), len(self.modalities), 3, *self.config.data.image_size, dtype=torch.uint8)
        present = torch.zeros(len(items), len(self.modalities), dtype=torch.bool)
        for row, item in enumerate(items):
            check_modalities(item, self.modalities)
            for name, image in item.items():
                place = self.modalities.index(name)
                images[row, place], present[row, place] = self._resized(name, image), True
        step = self.config.evaluation.batch_size
        parts = zip(images.split(step), present.split(step), strict=True)
        return torch.cat([self.of_images(*part) for part in parts])

    def of_images(self, images: Tensor, present: Tensor) -> Tensor:
        """Features (b, d) of unit length, on the CPU, of uint8 images (b, M, 3, H, W), those present marked (b, M)."""
        precision = Precision(self.config.evaluation.precision, self.device)
        with explained(EVALUATION_MEMORY), evaluation_mode(self.model), torch.inference_mode(), precision.autocast():
            prepared = Augmentation(self.config.data).normalize(images.to(self.device))
            present = present.to(self.device)
            features = self._features(prepared * present[:, :, None, None, None], present)
        return F.normalize(features.float(), dim=1).cpu().clone()

    def _features(self, images: Tensor, present: Tensor) -> Tensor:
        """Features (b, D) of images that are zero where they are absent."""
        if self.config.evaluation.absent == "zeros" or bool(present.all()):
            return self.model(images, None)
        columns = self.model.feature_columns()
        if columns is None:
            raise no_parts(self.model)
        encoded = self.model.encode(images, None)
        there = (part * present.view(*present.shape, *[1] * (part.ndim - 2)) for part in encoded)
        features = self.model.feature(Encoded(*there))
        counted = torch.zeros_like(features)
        for place, own in enumerate(columns.to(self.device)):
            counted[:, own] = present[:, place, None].to(features.dtype)
        return features * counted

    def _decode(self, entry: Entry) -> Tensor:
        """The images (M, 3, H, W) of an item, zeros for those that it lacks."""
        there = [index for index, source in enumerate(entry.sources) if source is not None]
        if not there:
            raise InputError(f"{entry.name}: an item needs an image of at least one modality")
        sources = tuple(source for source in read_as(entry, self._readings).sources if source is not None)
        sample = Sample(entry.identity, entry.camera, -1, sources, entry.name)
        size = self.config.data.image_size
        images = torch.zeros(len(entry.sources), 3, *size, dtype=torch.uint8)
        images[there] = decode(sample, size, EVALUATION)
        return images

    def _resized(self, name: str, image: Any) -> Tensor:
        height, width = self.config.data.image_size
        if not isinstance(image, Image.Image):
            image = _picture(name, np.asarray(image))
        reading = self._readings[self.modalities.index(name)]
        plain = developed(image, Path(getattr(image, "filename", "") or name), reading).image
        resized = plain.resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _picture(name: str, array: np.ndarray) -> Image.Image:
    """An array as Pillow's image of the same values."""
    colour = array.ndim == 3 and array.shape[2] == 3
    if array.dtype == np.uint8 and array.size and (array.ndim == 2 or colour):
        return Image.fromarray(array)
    if array.dtype in (np.uint16, np.int32, np.float32) and array.size and array.ndim == 2:
        return Image.fromarray(array)
    allowed = "a Pillow image, uint8 of shape (H, W, 3) or (H, W), or uint16, int32 or float32 of shape (H, W)"
    raise InputError(f"{name} must be {allowed}, got {array.dtype} of shape {array.shape}")


def fingerprint(config: Config, model: Method) -> str:
    """A mark of everything that decides a feature: tensors, the model's settings, image size, normalisation, reading.

    Equal weights have one mark, whatever file and naming they come from. Classifiers and modules that only training
    runs are left out. The precision is not part of it: features of bf16 and fp32 differ by rounding.
    """
    digest = hashlib.sha256()
    unused = tuple(f"{part.name}." for part in model.parts if part.training_only)
    for name, value in sorted(model.state_dict().items()):
        if name.startswith((*unused, "heads.")):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    settings = config.model.model_dump(mode="json", exclude={part.name for part in model.parts if part.training_only})
    settings["backbone"].pop("weights", None)  # where they came from
    data = [list(values) for values in (config.data.image_size, config.data.mean, config.data.std)]
    unusual = _unusual(config)
    digest.update(json.dumps([settings, *data, *unusual], sort_keys=True).encode())
    return digest.hexdigest()


def _unusual(config: Config) -> list[dict[str, Any]]:
    """How images are read and what stands for absent ones, where it is not the default: older marks stay valid."""
    images = config.data.images
    unusual: list[dict[str, Any]] = []
    if images.ranges:
        unusual.append({"ranges": {name: list(values) for name, values in images.ranges.items()}})
    if images.background != (0, 0, 0):
        unusual.append({"background": list(images.background)})
    if config.evaluation.absent != "zeros":
        unusual.append({"absent": config.evaluation.absent})
    return unusual
