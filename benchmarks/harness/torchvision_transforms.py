"""The transforms of torchvision that the authors' loader composes, for machines without torchvision.

Each does what torchvision does for a PIL image, with the same calls of Pillow and PyTorch and less of its checking of
arguments: the authors' loader is no slower with these than with torchvision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class Compose:
    """Calls transforms one after another."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]):
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """To (height, width), antialiased as Pillow does; `interpolation` is Pillow's number, 3 for bicubic."""

    def __init__(self, size: Sequence[int], interpolation: int = Image.Resampling.BILINEAR):
        self.size, self.interpolation = tuple(size), interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize(self.size[::-1], self.interpolation)


class RandomHorizontalFlip:
    """Mirrors with probability `p`."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < self.p else image


class Pad:
    """Adds zeros on every side."""

    def __init__(self, padding: int):
        self.padding = padding

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.expand(image, self.padding, 0)


class RandomCrop:
    """Cuts out (height, width) anywhere; an image of that size stays as it is."""

    def __init__(self, size: Sequence[int]):
        self.size = tuple(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        (width, height), (out_height, out_width) = image.size, self.size
        if (height, width) == self.size:
            top = left = 0
        else:
            top = int(torch.randint(0, height - out_height + 1, (1,)))
            left = int(torch.randint(0, width - out_width + 1, (1,)))
        return image.crop((left, top, left + out_width, top + out_height))


class ToTensor:
    """uint8 image -> float32 (C, H, W) in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    """(x - mean) / std of each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = mean, std

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return image.clone().sub_(mean).div_(std)
