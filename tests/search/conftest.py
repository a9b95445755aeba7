"""Fixtures of search: a tiny model with its weights, images of its own, and features without a model."""

import shutil

import pytest
import torch

from signal_reid import checkpoints
from signal_reid.methods.registry import build_model
from signal_reid.search import Description, Entry, Index


@pytest.fixture(scope="session")
def weights(tiny_config, synthetic, tmp_path_factory):
    """Weights of a tiny three-modality model, which carry their configuration."""
    config = tiny_config("rgbnt201", f"data.root={synthetic()}", "evaluation.batch_size=4")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("search") / "tiny.safetensors"
    checkpoints.export(build_model(config, 5, 2), path, "ours", config)
    return path


@pytest.fixture
def photos(synthetic, tmp_path):
    """Images in a directory for each modality, two of the three."""
    for name, folder in (("RGB", "rgb"), ("TI", "TI")):
        shutil.copytree(synthetic() / "test" / name, tmp_path / "photos" / folder)
    return tmp_path / "photos"


@pytest.fixture
def make_index(tmp_path):
    """An index of random features, of which two are equal, in segments of the given sizes."""

    def make(*sizes, dimension=24, kind="exact", storage="fp16", name="index"):
        generator = torch.Generator().manual_seed(1)
        index = Index.create(tmp_path / name, Description("made", ("RGB",), dimension, storage, kind))
        features = torch.randn(sum(sizes), dimension, generator=generator)
        features[-1] = features[1]
        start = 0
        for size in sizes:
            rows = range(start, start + size)
            entries = [Entry(f"item {row}", (None,), row // 4, row % 3) for row in rows]
            index.add(entries, features[start : start + size].split(7))
            start += size
        return index, features

    return make
