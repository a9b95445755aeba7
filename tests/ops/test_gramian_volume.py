"""The volume is the root of the Gram determinant, keeps its digits where vectors align, and has a finite gradient."""

import pytest
import torch
from torch.autograd import gradcheck

from signal_reid.ops import gramian_contrastive_loss, gramian_volume


def by_determinant(anchor, *others):
    P, Q = len(anchor), len(others[0])
    vectors = torch.stack([anchor[:, None].expand(P, Q, -1), *(o[None].expand(P, Q, -1) for o in others)], dim=2)
    return torch.linalg.det(vectors @ vectors.transpose(2, 3)).abs().sqrt()


def aligned(volume_scale, C=512, n=6, dtype=torch.float64):
    """Unit vectors a, b, c that span a volume of about `volume_scale`."""
    a = torch.randn(n, C, dtype=torch.float64)
    spread = volume_scale**0.5
    vectors = [a, *(a + spread * torch.randn_like(a) for _ in range(2))]
    return [torch.nn.functional.normalize(v, dim=1).to(dtype) for v in vectors]


@pytest.mark.parametrize("others", [1, 2, 3, 4])
@pytest.mark.parametrize(("P", "Q"), [(1, 1), (3, 5), (0, 4), (4, 0)])
def test_is_the_root_of_the_gram_determinant(others, P, Q):
    anchor = torch.randn(P, 7, dtype=torch.float64)
    rest = [torch.randn(Q, 7, dtype=torch.float64) for _ in range(others)]
    assert torch.allclose(gramian_volume(anchor, *rest), by_determinant(anchor, *rest), rtol=1e-9)


@pytest.mark.parametrize("others", [1, 2, 3, 4])
def test_gradient_of_every_input(others):
    anchor = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    rest = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(others)]
    assert gradcheck(gramian_volume, (anchor, *rest))


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3])
def test_fp32_keeps_value_and_gradient_where_the_vectors_align(scale):
    torch.manual_seed(0)
    single = [v.requires_grad_() for v in aligned(scale, dtype=torch.float32)]
    exact = [v.detach().double().requires_grad_() for v in single]
    expected, got = gramian_volume(*exact), gramian_volume(*single)
    diagonal = torch.eye(len(expected), dtype=torch.bool)
    assert expected[diagonal].max() < 3 * scale
    assert torch.allclose(got.double(), expected, rtol=1e-3)
    expected[diagonal].sum().backward()
    got[diagonal].sum().backward()
    for wide, narrow in zip(exact, single, strict=True):
        assert (narrow.grad - wide.grad).norm() < 1e-3 * wide.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_volume_zero_has_finite_gradients(dtype):
    same = torch.nn.functional.normalize(torch.randn(4, 512), dim=1).to(dtype)
    inputs = [same.clone().requires_grad_() for _ in range(3)]
    volume = gramian_volume(*inputs)
    assert volume.dtype == torch.float32
    volume.sum().backward()
    assert all(v.grad.isfinite().all() for v in inputs)
    zeros = [torch.zeros(3, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    gramian_volume(*zeros).sum().backward()
    assert all((v.grad == 0).all() for v in zeros)


def test_nan_stays_visible():
    anchor, other = torch.randn(3, 4), torch.randn(3, 4)
    anchor[1, 2] = float("nan")
    volume = gramian_volume(anchor, other, torch.randn(3, 4))
    assert volume[1].isnan().all()
    assert volume[[0, 2]].isfinite().all()


def test_second_derivative_is_refused():
    anchor = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    volume = gramian_volume(anchor, *torch.randn(2, 2, 5, dtype=torch.float64).unbind(0))
    with pytest.raises(RuntimeError, match="gramian_volume is not differentiable twice"):
        torch.autograd.grad(volume.sum(), anchor, create_graph=True)


def test_runs_in_fp32_under_autocast():
    anchor, *rest = torch.randn(3, 4, 64).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gramian_volume(anchor, *rest)
    assert torch.equal(inside, gramian_volume(anchor, *rest))


def test_loss_is_the_mean_of_both_cross_entropies():
    features, temperature = torch.randn(5, 3, 16, dtype=torch.float64), torch.tensor(0.07, dtype=torch.float64)
    a, b, c = torch.nn.functional.normalize(features, dim=-1).unbind(1)
    logits, targets = -by_determinant(a, b, c) / temperature, torch.arange(5)
    rows = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    columns = torch.nn.functional.cross_entropy(logits.T, targets, label_smoothing=0.1)
    assert gramian_contrastive_loss(features, temperature).item() == pytest.approx(((rows + columns) / 2).item())


def test_loss_gradients():
    features = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    assert gradcheck(gramian_contrastive_loss, (features, temperature))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 3),), "others must be 1 to 4 tensors"),
        ((torch.randn(2, 3), *[torch.randn(2, 3)] * 5), "others must be 1 to 4 tensors"),
        ((torch.randn(2, 3, 1), torch.randn(2, 3)), r"anchor must be \(P, C\)"),
        ((torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)), r"others\[0\] must have shape \(2, 3\)"),
        ((torch.randn(2, 3), torch.randn(2, 3), torch.randn(3, 3)), r"others\[1\] must have shape \(2, 3\)"),
        ((torch.randn(2, 3), torch.randn(2, 3).half()), r"others\[0\] must have the dtype of anchor"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        gramian_volume(*arguments)


def test_bad_loss_input_is_named():
    with pytest.raises(ValueError, match="2 to 5 modalities"):
        gramian_contrastive_loss(torch.randn(2, 6, 4), 0.07)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        gramian_contrastive_loss(torch.randn(2, 3, 4), 0.07, 1.0)
