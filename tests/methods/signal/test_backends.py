"""The whole model, backbone included, computes the same with the kernels of every backend."""

import torch

import signal_reid
from signal_reid import ops
from signal_reid.training import total_loss


def test_loss_and_gradients_are_those_of_the_reference(tiny_config, backend):
    config = tiny_config()
    model = signal_reid.build_model(config, num_identities=4, num_cameras=2).train()
    images, labels = torch.randn(4, 3, 3, 64, 64), torch.arange(4) // 2
    found = []
    for name in ("reference", backend.name):
        model.zero_grad()
        with ops.use_backend(name):
            loss = total_loss(model.losses(model.encode(images), labels), config)
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
    expected, got = found
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (got[name] - wanted).abs().max() <= 1e-3 * wanted.abs().max().clamp_min(1e-3), name
