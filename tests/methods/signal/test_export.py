"""torch.export takes the model, and what it exports runs with gradients on."""

import pytest
import torch


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_model_gives_the_feature_and_its_gradient(make_model, training):
    model = make_model().train(training)
    images, cameras = torch.randn(2, 3, 3, 128, 64), torch.tensor([0, 3])
    exported = torch.export.export(model, (images, cameras)).module()
    feature, gradient = results(exported, images, cameras)
    wanted, its_gradient = results(model, images, cameras)
    torch.testing.assert_close(feature, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, its_gradient, rtol=1e-3, atol=1e-3 * its_gradient.abs().max().item())


def results(model, images, cameras):
    """The feature, and the gradient of its sum."""
    leaf = images.clone().requires_grad_()
    feature = model(leaf, cameras)
    return feature.detach(), torch.autograd.grad(feature.sum(), leaf)[0]


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch 2.4 exports no batch norm that counts its batches")
def test_exported_losses_train_as_those_of_the_model(make_model):
    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model().train()

        def forward(self, images, cameras, labels):
            return sum(self.model.losses(self.model.encode(images, cameras), labels).values())

    batch = torch.randn(4, 3, 3, 128, 64), torch.tensor([0, 3, 1, 1]), torch.tensor([0, 0, 1, 1])
    losses = Losses()
    exported = torch.export.export(losses, batch).module()
    found = []
    for module in (losses, exported):
        module.zero_grad()  # both may have the same parameters
        loss = module(*batch)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (wanted, its_gradients), (loss, gradients) = found
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)
    assert gradients.keys() == its_gradients.keys()
    for name, gradient in its_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-7, name
