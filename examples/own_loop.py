"""Trains Signal for some steps in a loop of one's own, on random images, and evaluates it."""

import torch

import signal_reid
from signal_reid.evaluation import FeatureSet, retrieval_metrics
from signal_reid.training import make_optimizer, total_loss

SMALL = [
    "data.image_size=[128,64]",
    "model.backbone.patch_size=8",
    "model.backbone.stride=8",
    "model.backbone.layers=1",
    "model.backbone.width=48",
    "model.backbone.heads=3",
    "model.backbone.output_dim=32",
]
config = signal_reid.load_config("rgbnt201", [*SMALL, "optimizer.base_rate=1e-3"])
model = signal_reid.build_model(config, num_identities=4, num_cameras=2)
optimizer = make_optimizer(model, config.optimizer)

torch.manual_seed(0)
images, labels, cameras = torch.randn(8, 3, 3, 128, 64), torch.arange(8) // 2, torch.arange(8) % 2
for step in range(5):
    optimizer.zero_grad()
    losses = model.train().losses(model.encode(images, cameras), labels)
    total = total_loss(losses, config)
    total.backward()
    optimizer.step()
    print(
        f"step {step + 1}: {total.item():.3f} =",
        ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items() if "." not in name),
    )  # what has a dot in its name, such as head_0.accuracy, tells of a loss and is none

with torch.no_grad():
    features = FeatureSet(model.eval()(images, cameras), labels, cameras)
print(retrieval_metrics(features, features, protocol="camera"))
