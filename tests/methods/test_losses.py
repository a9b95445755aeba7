"""Losses equal their formulas."""

import pytest
import torch
import torch.nn.functional as F

import signal_reid
from signal_reid.methods.signal.model import SignalOutput
from signal_reid.training import loss_parts, soft_margin_triplet, total_loss


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


def test_total_is_the_weighted_sum():
    config = signal_reid.load_config("rgbnt201", ["losses.global_alignment=0.3", "losses.local_alignment=0.7"])
    labels = torch.tensor([0, 0, 1, 1])
    logits, feature = torch.randn(4, 6), torch.randn(4, 8)
    output = SignalOutput([(logits, feature)] * 2, torch.tensor(1.5), torch.tensor(2.5))
    head = 0.25 * F.cross_entropy(logits, labels, label_smoothing=0.1) + soft_margin_triplet(feature, labels)
    expected = (2 * head + 0.3 * 1.5 + 0.7 * 2.5).item()
    assert total_loss(output, labels, config).item() == pytest.approx(expected)
    parts = loss_parts(output, labels, config)
    assert parts["head_0"].item() == pytest.approx(head.item())
    assert (parts["gam"].item(), parts["lam"].item()) == (1.5, 2.5)


def test_modules_that_are_switched_off_cost_nothing():
    config = signal_reid.load_config("rgbnt201")
    output = SignalOutput([(torch.randn(4, 6), torch.randn(4, 8))], None, None)
    assert loss_parts(output, torch.tensor([0, 0, 1, 1]), config).keys() == {"total", "head_0"}
