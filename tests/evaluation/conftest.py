from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from signal_reid.evaluation import FeatureSet


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Features and the numbers that the authors' implementation gives for them."""
    with np.load(Path(__file__).parents[1] / "golden" / "retrieval.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_sets(golden: dict[str, np.ndarray]) -> tuple[FeatureSet, FeatureSet]:
    query, gallery = (
        FeatureSet(*(torch.from_numpy(golden[f"{side}{name}"]) for name in ("f", "_pid", "_cam", "_scene")))
        for side in ("q", "g")
    )
    return query, gallery


@pytest.fixture(scope="session")
def make_set() -> Callable[..., FeatureSet]:
    """A feature set from lists."""

    def build(features: list, identities: list, cameras: list, scenes: list | None = None) -> FeatureSet:
        return FeatureSet(
            torch.tensor(features, dtype=torch.float32),
            torch.tensor(identities, dtype=torch.int64),
            torch.tensor(cameras, dtype=torch.int64),
            None if scenes is None else torch.tensor(scenes, dtype=torch.int64),
        )

    return build
