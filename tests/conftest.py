"""Fixtures that several directories of tests share."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import signal_reid
from signal_reid.checkpoints.naming import authors_to_ours, ours_to_authors
from signal_reid.data.synthetic import synthesize

# Test processes share the cores.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

GOLDEN = Path(__file__).parent / "golden"
SEEDS = {"rgbnt201": 201, "msvr310": 310}


def pytest_collection_modifyitems(items):
    """Tests of a GPU are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class GoldenCase:
    """A two-layer model with the weights, inputs and measured outputs of the golden recipe."""

    def __init__(self, name: str):
        self.config = signal_reid.load_config(name, ["model.backbone.layers=2"])
        self.seed = SEEDS[name]
        self.expected = np.load(GOLDEN / f"{name}.npz")
        height, width = self.config.data.image_size
        rs = np.random.RandomState(self.seed)
        images = [rs.standard_normal((8, 3, height, width)).astype(np.float32) for _ in range(3)]
        self.images = torch.from_numpy(np.stack(images, axis=1))
        self.cameras = torch.from_numpy(rs.randint(0, 4, size=8)).long()
        self.labels = torch.arange(8) // 2

    def model(self):
        model = signal_reid.build_model(self.config, num_identities=8, num_cameras=4)
        model.load_state_dict(authors_to_ours(self.authors_state(model)))
        return model

    def authors_state(self, model):
        shapes = {name: tuple(value.shape) for name, value in ours_to_authors(model.state_dict()).items()}
        return {name: torch.from_numpy(self.value(name, shape)) for name, shape in shapes.items()}

    def value(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        constants = {"running_mean": 0.0, "running_var": 1.0, "contra_temp": 0.07}
        last = name.rsplit(".", 1)[-1]
        if last == "num_batches_tracked":
            return np.array(0)
        if last in constants:
            return np.full(shape, constants[last], np.float32)
        state = np.random.RandomState((zlib.crc32(name.encode()) ^ self.seed) & 0x7FFFFFFF)
        r = state.standard_normal(shape or (1,)).astype(np.float32)
        if len(shape) >= 2 and "positional_embedding" not in name and "cv_embed" not in name:
            fan = shape[0] if name == "clip_vision_encoder.base.proj" else np.prod(shape[1:])
            return r * np.float32(fan**-0.5)
        return 1 + np.float32(0.05) * r if last == "weight" else np.float32(0.05) * r


@pytest.fixture(scope="session", params=sorted(SEEDS))
def golden(request):
    return GoldenCase(request.param)


@pytest.fixture(scope="session")
def golden_directory():
    return GOLDEN


@pytest.fixture
def tiny_config():
    """A model small enough to run in milliseconds, on a grid that the alignment modules accept."""

    def make(name: str = "rgbnt201", *overrides: str):
        small = [
            "model.backbone.layers=1",
            "model.backbone.width=48",
            "model.backbone.heads=3",
            "model.backbone.patch_size=8",
            "model.backbone.stride=8",
            "model.backbone.output_dim=32",
            "model.k_intra=20",
            "data.image_size=[64,64]",
            "data.batch_size=8",
            "data.instances=2",
            "data.workers=0",
        ]
        return signal_reid.load_config(name, [*small, *overrides])

    return make


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """Roots of small synthetic data sets by layout, made on first use; read only."""
    made: dict[str, Path] = {}

    def root(name: str = "rgbnt201") -> Path:
        if name not in made:
            made[name] = synthesize(
                name,
                tmp_path_factory.mktemp("synthetic") / name,
                train_identities=5,
                test_identities=3,
                images_per_identity=4,
                cameras=2,
                image_size=None if name == "rgbnt100" else (64, 64),
            )
        return made[name]

    return root
