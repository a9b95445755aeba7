"""A method of one's own: the mean of all modalities' class tokens, one head, and the losses that methods share.

Here it is built and trained for a step by hand. docs/adding.md says how the program finds it by name.
"""

import torch
from torch import Tensor

import signal_reid
from signal_reid.config import Config
from signal_reid.evaluation import FeatureSet, retrieval_metrics
from signal_reid.methods.base import Encoded, Method
from signal_reid.methods.heads import Head
from signal_reid.methods.losses import head_losses
from signal_reid.training import make_optimizer, total_loss


class MeanClass(Method):
    """The mean of the class tokens, (B, C), is what is ranked."""

    title = "Mean class token"

    def __init__(self, config: Config, num_identities: int, num_cameras: int):
        super().__init__(config, num_identities, num_cameras)
        self.head = Head(config.model.backbone.output_dim, num_identities)
        self.settings_of_losses = config.losses

    def losses(self, encoded: Encoded, labels: Tensor) -> dict[str, Tensor]:
        """One loss, `head`, and what tells of it."""
        feature = self.feature(encoded)
        return head_losses("head", self.head(feature), feature, labels, self.settings_of_losses)

    def feature(self, encoded: Encoded) -> Tensor:
        """(B, C)."""
        return encoded.cls.mean(1)


config = signal_reid.load_config("demo", ["model.backbone.layers=1"])
torch.manual_seed(0)
model = MeanClass(config, num_identities=4, num_cameras=2)
optimizer = make_optimizer(model, config.optimizer)
images, labels, cameras = torch.randn(8, 3, 3, 64, 64), torch.arange(8) // 2, torch.arange(8) % 2

losses = model.train().losses(model.encode(images, cameras), labels)
total_loss(losses, config).backward()
optimizer.step()
print(", ".join(f"{name} {value.item():.3f}" for name, value in losses.items()))

with torch.no_grad():
    features = FeatureSet(model.eval()(images, cameras), labels, cameras)
print(retrieval_metrics(features, features, protocol="camera"))
