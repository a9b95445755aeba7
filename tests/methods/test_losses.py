"""Losses equal their formulas."""

import pytest
import torch
import torch.nn.functional as F

import signal_reid
from signal_reid.methods.losses import head_loss, head_losses, soft_margin_triplet
from signal_reid.training import total_loss


def triplet_by_loop(features, labels):
    total = 0.0
    for i in range(len(features)):
        distances = [(features[i] - features[j]).norm().clamp_min(1e-6) for j in range(len(features))]
        positive = max(d for d, label in zip(distances, labels, strict=True) if label == labels[i])
        negative = min(d for d, label in zip(distances, labels, strict=True) if label != labels[i])
        total += torch.log1p(torch.exp(positive - negative))
    return total / len(features)


def test_triplet_mines_the_hardest_of_each_anchor():
    features = torch.randn(12, 5, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    assert soft_margin_triplet(features, labels).item() == pytest.approx(triplet_by_loop(features, labels).item())


def test_triplet_gradient_is_finite_for_equal_features():
    features = torch.ones(4, 3, requires_grad=True)
    soft_margin_triplet(features, torch.tensor([0, 0, 1, 1])).backward()
    assert features.grad.isfinite().all()


def test_a_head_s_loss_is_the_weighted_sum_of_both():
    settings = signal_reid.load_config("rgbnt201", ["losses.identity=0.4", "losses.triplet=0.7"]).losses
    labels, logits, feature = torch.tensor([0, 0, 1, 1]), torch.randn(4, 6), torch.randn(4, 8)
    expected = 0.4 * F.cross_entropy(logits, labels, label_smoothing=0.1) + 0.7 * soft_margin_triplet(feature, labels)
    assert head_loss(logits, feature, labels, settings).item() == pytest.approx(expected.item())


def test_a_head_tells_its_parts_which_are_no_losses():
    config = signal_reid.load_config("rgbnt201")
    labels, feature = torch.tensor([0, 0, 1, 1]), torch.randn(4, 8)
    logits = F.one_hot(torch.tensor([0, 0, 1, 0]), 6).float().requires_grad_()
    losses = head_losses("head_1", logits, feature, labels, config.losses)
    assert losses.keys() == {"head_1", "head_1.identity", "head_1.triplet", "head_1.accuracy"}
    assert losses["head_1.accuracy"] == 0.75
    parts = 0.25 * losses["head_1.identity"] + 1.0 * losses["head_1.triplet"]
    assert losses["head_1"].item() == pytest.approx(parts.item())
    assert total_loss(losses, config) == losses["head_1"]
    assert [name for name, loss in losses.items() if loss.requires_grad] == ["head_1"]


def test_total_is_the_weighted_sum():
    config = signal_reid.load_config("rgbnt201", ["losses.global_alignment=0.3", "losses.local_alignment=0.7"])
    losses = {
        name: torch.tensor(value) for name, value in (("head_0", 1.0), ("head_1", 2.0), ("gam", 1.5), ("lam", 2.5))
    }
    assert total_loss(losses, config).item() == pytest.approx(1.0 + 2.0 + 0.3 * 1.5 + 0.7 * 2.5)
