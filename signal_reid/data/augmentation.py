"""Augmentation of whole batches on the device they are on: flip, pad and crop, normalise, erase."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from signal_reid.config import DataConfig

ERASE_TRIES = 10
ERASE_AREA = (0.02, 1 / 3)
ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_STREAM = 1  # keeps these draws apart from the sampler's under the same seed


def augmentation_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """The CPU generator of one training step's augmentation, the same whenever that step is run again."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_STREAM, epoch, step))
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)


class Augmentation:
    """Random augmentation and normalisation of image triplets.

    Every image is augmented on its own, or every triplet as one with `augmentation.shared`. What is random is drawn
    on the CPU, so one seed flips, crops and erases alike on every device; only the noise that fills an erased
    rectangle is drawn where the images are. Nothing waits for the device.

    Args:
        config: `mean`, `std` and `augmentation` are used.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config.augmentation
        self._scale = torch.tensor([1 / (255 * std) for std in config.std]).view(3, 1, 1)
        self._shift = torch.tensor([m / s for m, s in zip(config.mean, config.std, strict=True)]).view(3, 1, 1)
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def normalize(self, images: Tensor) -> Tensor:
        """Scale pixels to [0, 1], subtract the mean and divide by the deviation.

        Args:
            images: uint8 (..., 3, H, W).

        Returns:
            float32 (..., 3, H, W).
        """
        if images.device not in self._constants:
            self._constants[images.device] = self._scale.to(images.device), self._shift.to(images.device)
        scale, shift = self._constants[images.device]
        return images.float().mul_(scale).sub_(shift)

    def augment(self, images: Tensor, generator: torch.Generator, rows: range | None = None, batch: int = 0) -> Tensor:
        """Flip, zero-pad and crop, normalise, erase a rectangle with N(0, 1) noise, then drop modalities.

        Several processes that hold parts of a batch draw for all of it, so that a sample is augmented alike, bit for
        bit, however many there are.

        Args:
            images: uint8 (B, M, 3, H, W).
            generator: of the CPU; see `augmentation_generator`.
            rows: the samples of the batch that these are, consecutive; none: they are the whole batch.
            batch: samples of the whole batch, where these are a part of it.

        Returns:
            float32 (B, M, 3, H, W).
        """
        B, M, _, H, W = images.shape
        rows, batch = (range(B), B) if rows is None else (rows, batch)
        own = slice(rows.start * M, rows.stop * M)
        draws, repeats = (batch, M) if self.config.shared else (batch * M, 1)
        flip, top, left = (x.repeat_interleave(repeats)[own] for x in self._draw_crop(draws, generator))
        rectangles = draw_rectangles(draws, self.config.erase, H, W, generator).repeat_interleave(repeats, dim=0)
        noise = torch.Generator(images.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        flat = images.reshape(B * M, 3, H, W)
        if self.config.flip or self.config.pad:
            flat = _flip_and_crop(flat, flip, top, left, self.config.pad)
        result = self.normalize(flat)
        if self.config.erase:
            _erase(result, rectangles, own, noise)
        result = result.view(B, M, 3, H, W)
        if self.config.drop_modality:  # drawn last, and only if asked for, so that the other draws stay what they are
            dropped = draw_missing(batch, M, self.config.drop_modality, generator)[rows.start : rows.stop]
            sample, modality = (_to_device(index, images.device) for index in dropped.nonzero(as_tuple=True))
            result[sample, modality] = 0
        return result

    def _draw_crop(self, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        flip = torch.rand(draws, generator=generator) < self.config.flip
        top, left = torch.randint(2 * self.config.pad + 1, (2, draws), generator=generator)
        return flip, top, left


def draw_rectangles(draws: int, probability: float, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Rectangles to erase: the first of ten tries that is smaller than the image on both sides.

    Args:
        draws: how many.
        probability: of erasing at all.
        height: of the image, in pixels.
        width: of the image, in pixels.
        generator: of the CPU.

    Returns:
        int64 (draws, 4): top, left, height, width; height and width 0 where nothing is erased.
    """
    area_low, area_high = ERASE_AREA
    aspect_low, aspect_high = ERASE_LOG_ASPECT
    uniform = torch.rand(4, draws, ERASE_TRIES, generator=generator, dtype=torch.float64)
    area = (area_low + (area_high - area_low) * uniform[0]) * height * width
    aspect = (aspect_low + (aspect_high - aspect_low) * uniform[1]).exp()
    h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    top = (uniform[2] * (height - h + 1)).floor().long()
    left = (uniform[3] * (width - w + 1)).floor().long()
    accepted = (h < height) & (w < width)
    first = accepted.int().argmax(dim=1, keepdim=True)
    rectangles = torch.stack((top, left, h, w), dim=2).take_along_dim(first[:, :, None], dim=1)[:, 0]
    erased = accepted.any(dim=1) & (torch.rand(draws, generator=generator) < probability)
    return rectangles * erased[:, None]


def draw_missing(samples: int, modalities: int, probability: float, generator: torch.Generator) -> Tensor:
    """Which images are missing: each by itself, but where all of a sample's are, one at random stays.

    Args:
        samples: how many.
        modalities: images of each.
        probability: of an image.
        generator: of the CPU.

    Returns:
        bool (samples, modalities), on the CPU.
    """
    missing = torch.rand(samples, modalities, generator=generator) < probability
    kept = torch.randint(modalities, (samples, 1), generator=generator)
    stays = missing.all(dim=1, keepdim=True) & (torch.arange(modalities) == kept)
    return missing & ~stays


def _flip_and_crop(images: Tensor, flip: Tensor, top: Tensor, left: Tensor, pad: int) -> Tensor:
    """Crop (n, 3, H, W) at `top`, `left` of the flipped, padded images; the parameters are on the CPU."""
    n, C, H, W = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    padded_height, padded_width = H + 2 * pad, W + 2 * pad
    left = torch.where(flip, 2 * pad - left, left)  # flipping after the crop touches fewer pixels than before it
    row = torch.arange(n * C).view(n, C, 1) * padded_height + top.view(n, 1, 1) + torch.arange(H)  # (n, C, H)
    start = _to_device((row * padded_width + left.view(n, 1, 1)).flatten(), images.device)
    # Every run of W consecutive pixels is a row of this view, so a crop is a copy of whole rows.
    runs = padded.view(-1).as_strided((padded.numel() - W + 1, W), (1, 1))
    cropped = runs.index_select(0, start).view(n, C, H, W)
    flipped = _to_device(flip.nonzero().flatten(), images.device)
    return cropped.index_copy_(0, flipped, cropped.index_select(0, flipped).flip(-1))


def _erase(images: Tensor, rectangles: Tensor, own: slice, generator: torch.Generator) -> None:
    """Fill one rectangle (top, left, height, width; on the CPU) of each of (n, 3, H, W) with noise, in place.

    The rectangles are those of the whole batch, of which the images are the rows `own`: the noise is drawn for all.
    """
    n, C, H, W = images.shape
    pixels = rectangles[:, 2] * rectangles[:, 3]
    everything, before = int(pixels.sum()), int(pixels[: own.start].sum())
    pixels, rectangles = pixels[own], rectangles[own]
    total = int(pixels.sum())
    if total == 0:
        return
    first = pixels.cumsum(0) - pixels
    top, left, _, width = rectangles.unbind(1)
    table = _to_device(torch.stack((pixels, first, top * W + left, width)), images.device)
    image = torch.repeat_interleave(table[0], output_size=total)
    first, corner, width = (values.take(image) for values in table[1:])
    inside = torch.arange(total, device=images.device) - first
    row = inside // width
    pixel = corner + row * W + (inside - row * width)
    noise = torch.randn(everything, C, generator=generator, device=images.device)[before : before + total]
    images.view(n, C, H * W)[image, :, pixel] = noise


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it."""
    if device.type != "cuda" or not len(values):
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
