"""Distances between feature vectors, and a total order of a query's gallery that no sort can upset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LAST = torch.iinfo(torch.int64).max
"""The key of an item that is not ranked: behind every distance."""


class SquaredDistances:
    """Squared Euclidean distances to a fixed set in fp32, as |a|^2 + |b|^2 - 2 a.b, not below zero.

    Args:
        features: (n, d); not copied when fp32, so they may be the larger part of the memory.
        normalize: compare the vectors scaled to unit length; a zero vector stays zero.
    """

    def __init__(self, features: Tensor, normalize: bool = False) -> None:
        self.features = features.float()
        self.normalize = normalize
        square = _squared_norms(self.features)  # (n,)
        self.scale = square.sqrt().clamp(min=1e-12).reciprocal() if normalize else torch.ones_like(square)
        self.square = square * self.scale.square()

    def __call__(self, rows: Tensor) -> Tensor:
        """Distances of `rows` (m, d) to the set: (m, n) fp32."""
        rows = rows.float()
        if self.normalize:
            rows = torch.nn.functional.normalize(rows, dim=1)
        with full_precision(), torch.autocast(rows.device.type, enabled=False):
            result = rows @ self.features.t()
        return result.mul_(self.scale * -2).add_(_squared_norms(rows)[:, None]).add_(self.square).clamp_(min=0)


def _squared_norms(features: Tensor) -> Tensor:
    """Exact for whole numbers, and without a temporary as large as the features: (n, d) -> (n,)."""
    return torch.cat([part.square().sum(dim=1) for part in features.split(4096)])


def order_keys(distances: Tensor) -> Tensor:
    """Integers that sort like (distance, column): no two of a row are equal, so every sort of them is stable.

    The bits of a non-negative fp32 number grow with it; they fill the upper half, the column index the lower.

    Args:
        distances: (m, n) fp32, not negative, not NaN.

    Returns:
        (m, n) int64, all below `LAST`.
    """
    bits = (distances + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0, whose bits sort first, into 0.0
    return bits.bitwise_left_shift_(32).bitwise_or_(torch.arange(distances.shape[1], device=distances.device))


def key_columns(keys: Tensor) -> Tensor:
    """The column index within each key of `order_keys`."""
    return keys & 0xFFFFFFFF


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever the caller allows for training: TF32 changes the order of neighbours."""
    settings = _matmul_settings()
    before = [setting.fp32_precision for setting in settings]
    legacy = None if settings else torch.get_float32_matmul_precision()
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)


def _matmul_settings() -> list[Any]:
    """PyTorch 2.9 gave each backend a setting of its own, and refuses to read the common one once they differ."""
    settings = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    return settings if all(hasattr(setting, "fp32_precision") for setting in settings) else []
