"""A backbone from one file outside the package serves Signal, and what its documentation shows is what runs."""

import pytest
import torch

import signal_reid
from signal_reid.backbones.registry import BACKBONES
from signal_reid.training import total_loss

SMALL = {
    "model": {"backbone": {"name": "shown", "patch_size": 8, "output_dim": 16}, "k_intra": 8, "interaction_heads": 2},
    "data": {"image_size": [64, 64], "batch_size": 4, "instances": 2},
}


@pytest.fixture
def installed(documented):
    documented(BACKBONES, "BACKBONE")


def test_signal_trains_on_it(installed):
    config = signal_reid.load_config(SMALL)
    model = signal_reid.build_model(config, 4, 2)
    assert type(model.backbone).__name__ == "Patches"
    encoded = model.encode(torch.randn(4, 3, 3, 64, 64), torch.zeros(4, dtype=torch.long))
    assert encoded.tokens.shape == (4, 3, 64, 16)
    total_loss(model.losses(encoded, torch.tensor([0, 0, 1, 1])), config).backward()
    assert model.backbone.embedding.weight.grad.abs().sum() > 0


def test_its_weights_come_back(installed, tmp_path):
    config = signal_reid.load_config(SMALL)
    first, second = (signal_reid.build_model(config, 4, 2) for _ in range(2))
    signal_reid.checkpoints.export(first, tmp_path / "model.safetensors", config=config)
    signal_reid.checkpoints.load(second, tmp_path / "model.safetensors")
    assert torch.equal(second.backbone.embedding.weight, first.backbone.embedding.weight)


def test_a_name_that_nobody_offers_is_an_error_that_lists_what_there_is():
    with pytest.raises(signal_reid.ConfigError, match=r"backbone must be one of .*clip_vit.*, got 'pathces'"):
        signal_reid.load_config({"model": {"backbone": {"name": "pathces"}}})
