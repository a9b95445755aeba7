"""The volume is the root of the Gram determinant, keeps its digits where vectors align, and has a finite gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid import ops
from signal_reid.ops import gramian_contrastive_loss, gramian_volume
from signal_reid.ops.reference import gramian as oracle

OPERATOR = "gramian"
LENGTHS = st.sampled_from([0, 1, 2, 5, 33])
CHANNELS = st.sampled_from([0, 3, 5, 8, 127, 128, 129, 516])


def by_determinant(anchor, *others):
    P, Q = len(anchor), len(others[0])
    vectors = torch.stack([anchor[:, None].expand(P, Q, -1), *(o[None].expand(P, Q, -1) for o in others)], dim=2)
    return torch.linalg.det(vectors @ vectors.transpose(2, 3)).abs().sqrt()


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


def vectors(P, Q, C, k):
    """An anchor (P, C) and k others (Q, C)."""
    return [torch.randn(n, C) for n in (P, *[Q] * k)]


def gradients(vectors, grad):
    """Of the anchor and the others, from the gradient of the volume."""
    leaves = [v.detach().requires_grad_() for v in vectors]
    return torch.autograd.grad(gramian_volume(*leaves), leaves, grad)


def exact(vectors, grad):
    """Volume and gradients by the oracle in fp64."""
    anchor, *others = (v.double() for v in vectors)
    return oracle.forward(anchor, tuple(others)), oracle.backward(grad.double(), anchor, tuple(others))


def assert_close(got, expected, rtol=1e-4):
    """Errors are measured against the largest magnitude, as sums over signed terms demand."""
    assert got.shape == expected.shape
    if expected.numel():
        assert (got.double() - expected).abs().max() <= rtol * expected.abs().max()


def assert_equals_oracle(vectors, grad):
    volume, wanted = exact(vectors, grad)
    assert_close(gramian_volume(*vectors), volume)
    for got, of_oracle in zip(gradients(vectors, grad), wanted, strict=True):
        assert_close(got, of_oracle)


def test_equals_the_oracle_at_any_size(backend):
    def check(P, Q, C, k):
        assume(C == 0 or 2 * k < C)  # random vectors in few dimensions are too often nearly dependent
        assume(backend.name != "triton" or P * Q * C < 10_000)  # the interpreter is slow
        assert_equals_oracle(vectors(P, Q, C, k), torch.randn(P, Q))

    backend.for_all(check, P=LENGTHS, Q=LENGTHS, C=CHANNELS, k=st.integers(1, 4))


@pytest.fixture
def limits(backend, monkeypatch):
    """Beyond which a backend takes other ways; the interpreter's are lowered, so that small inputs exceed them."""
    if backend.name == "triton":
        from signal_reid.ops.triton import gramian as triton

        monkeypatch.setattr(triton, "MANY_BLOCKS", 1)
        monkeypatch.setattr(triton, "WIDEST_BASIS", 64)
        return {"pairs": (33, 17), "columns": (3, 35), "channels": 68}
    return {"pairs": (1003, 27), "columns": (33, 8185), "channels": 4096}


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_many_pairs_equal_the_oracle(limits, k):
    P, Q = limits["pairs"]
    assert_equals_oracle(vectors(P, Q, 12, k), torch.randn(P, Q))


def test_many_columns_equal_the_oracle(limits):
    P, Q = limits["columns"]
    assert_equals_oracle(vectors(P, Q, 4, 1), torch.randn(P, Q))


@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("k", [3, 4])
def test_many_channels_equal_the_oracle(limits, beyond, k):
    assert_equals_oracle(vectors(3, 2, limits["channels"] + beyond, k), torch.randn(3, 2))


def test_any_strides_of_vectors_and_gradients(backend):
    modalities = torch.randn(5, 3, 16).unbind(1)
    assert_equals_oracle(modalities, torch.randn(5, 5))
    assert_equals_oracle([v[:, ::2] for v in vectors(5, 7, 32, 2)], torch.randn(7, 5).T)
    assert_equals_oracle(vectors(5, 7, 16, 2), torch.ones(()).expand(5, 7))
    assert_equals_oracle([torch.randn(1, 8).expand(3, 8), *vectors(0, 4, 8, 2)[1:]], torch.randn(3, 4))


def test_rows_off_16_bytes(backend):
    assert_equals_oracle([torch.randn(6 * 8 + 1)[1:].view(6, 8) for _ in range(3)], torch.randn(6, 6))


def leaning(height, k, C, n):
    """Unit vectors whose anchor stands `height` above the span of the others."""
    others = [F.normalize(torch.randn(n, C, dtype=torch.float64), dim=1) for _ in range(k)]
    away = F.normalize(torch.randn(n, C, dtype=torch.float64), dim=1)
    anchor = F.normalize(F.normalize(sum(others), dim=1) + height * away, dim=1)
    return [v.float() for v in (anchor, *others)]


def aligned(volume, k, C, n):
    """Unit vectors close to each other that span about `volume`."""
    anchor = torch.randn(n, C, dtype=torch.float64)
    spread = [volume ** (1 / k) * torch.randn(n, C, dtype=torch.float64) for _ in range(k)]
    return [F.normalize(v, dim=1).float() for v in (anchor, *(anchor + away for away in spread))]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("make", [leaning, aligned])
def test_small_volumes_keep_their_digits(backend, make, size, k):
    n, C = (3, 128) if backend.name == "triton" else (9, 512)  # the interpreter is slow
    given = make(size, k, C, n)
    volume, wanted = exact(given, torch.eye(n))
    assert volume.diagonal().max() < 2 * size
    assert torch.allclose(gramian_volume(*given).diagonal().double(), volume.diagonal(), rtol=1e-4)
    for got, of_oracle in zip(gradients(given, torch.eye(n)), wanted, strict=True):
        assert ((got - of_oracle).norm(dim=1) < 1e-3 * of_oracle.norm(dim=1)).all()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_volume_zero_has_bounded_gradients(backend, k):
    same = F.normalize(torch.randn(5, 128 if backend.name == "triton" else 512), dim=1)
    assert (gramian_volume(same, *[same] * k).diagonal() < 1e-6).all()
    for gradient in gradients([same] * (k + 1), torch.eye(5)):
        assert (gradient.norm(dim=1) < 2).all()  # 1 but for its direction, which is rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_widened_first(backend, dtype):
    given = [v.to(dtype) for v in vectors(4, 5, 64, 2)]
    assert torch.equal(gramian_volume(*given), gramian_volume(*(v.float() for v in given)))
    assert all(g.dtype == dtype for g in gradients(given, torch.ones(4, 5)))


def test_heights_below_the_rounding_of_the_anchor_have_bounded_gradients(backend):
    same = torch.randn(64, 8)
    same[:, 4:] *= 1e-6  # elements whose rounding is small enough to leave a residual of almost nothing
    for gradient in gradients([same, same], torch.eye(64)):
        assert (gradient.norm(dim=1) < 4 * same.norm(dim=1)).all()


@pytest.mark.parametrize(("C", "k"), [(1, 1), (1, 4), (2, 2), (3, 4), (4, 4)])
def test_more_vectors_than_dimensions_span_nothing(backend, C, k):
    Q = 1 if backend.name == "reference" else 6  # plain PyTorch measures only the closest column by its residual
    given = vectors(5, Q, C, k)
    assert (gramian_volume(*given) < 1e-5).all()
    assert all(gradient.isfinite().all() for gradient in gradients(given, torch.ones(5, Q)))


@pytest.mark.parametrize("zeros", [(0,), (1,), (2,), (0, 1, 2)])
def test_zero_vectors_span_nothing(backend, zeros):
    given = [torch.zeros(4, 12) if n in zeros else v for n, v in enumerate(vectors(4, 4, 12, 2))]
    assert (gramian_volume(*given) == 0).all()
    of_anchor, *of_others = gradients(given, torch.ones(4, 4))
    assert all(gradient.isfinite().all() for gradient in (of_anchor, *of_others))
    if 0 in zeros:
        assert (of_anchor == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_visible_in_its_row_and_column_only(backend, poison):
    anchor, *others = vectors(40, 12, 16, 2)
    others_rows, others_columns = [*range(33), *range(34, 40)], [*range(9), 10, 11]
    anchor[33, 3] = poison
    volume = gramian_volume(anchor, *others)
    assert volume[33].isnan().all()
    assert volume[others_rows].isfinite().all()
    anchor[33, 3] = 0
    others[1][9, 0] = poison
    volume = gramian_volume(anchor, *others)
    assert volume[:, 9].isnan().all()
    assert volume[:, others_columns].isfinite().all()
    of_second = gradients([anchor, *others], torch.ones(40, 12))[2]
    assert of_second[9].isnan().all()
    assert of_second[others_columns].isfinite().all()


def test_is_the_same_to_the_bit_whatever_the_schedule(backend):
    given, grad = vectors(37, 13, 68, 2), torch.randn(37, 13)
    first, *again = [
        (backend.reseed(seed), gramian_volume(*given), *gradients(given, grad))[1:]
        for seed in range(2 + backend.emulated)
    ]
    for run in again:
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU both are compared with the oracle")
def test_both_kinds_of_kernels_agree(emulated_core, rounding_interpreter):
    given, grad = vectors(9, 7, 130, 2), torch.randn(9, 7)
    with ops.use_backend("triton"):
        by_triton = gramian_volume(*given), *gradients(given, grad)
    with ops.cuda.core.use(emulated_core), ops.use_backend("cuda"):
        by_cuda = gramian_volume(*given), *gradients(given, grad)
    for a, b in zip(by_triton, by_cuda, strict=True):
        assert_close(a, b.double())


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
    a, b, c = F.normalize(features, dim=-1).unbind(1)
    logits, targets = -by_determinant(a, b, c) / temperature, torch.arange(5)
    rows = F.cross_entropy(logits, targets, label_smoothing=0.1)
    columns = F.cross_entropy(logits.T, targets, label_smoothing=0.1)
    assert gramian_contrastive_loss(features, temperature).item() == pytest.approx(((rows + columns) / 2).item())


def test_loss_gradients():
    features = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    assert gradcheck(gramian_contrastive_loss, (features, temperature))


@pytest.mark.parametrize("batch", [64, 256])
def test_gradient_of_the_temperature_keeps_its_digits_in_fp32(backend, batch):
    if backend.emulated or backend.interpreted:
        pytest.skip("a minute; what is added to the volumes does not depend on the backend")

    def gradient(features):
        temperature = torch.tensor(0.07, dtype=features.dtype, requires_grad=True)
        return torch.autograd.grad(gramian_contrastive_loss(features, temperature), temperature)[0].double()

    errors = []
    for seed in range(20):
        torch.manual_seed(seed)
        features = torch.randn(batch, 3, 512)
        with ops.use_backend("reference"):  # no kernel takes fp64
            wanted = gradient(features.double())
        errors.append((gradient(features) - wanted).abs() / wanted.abs())
    assert torch.stack(errors).median() <= 1e-3


@pytest.mark.parametrize("norm", [1e-10, 1e15, 1e19, 1e20, 1e38])
def test_loss_of_features_of_any_norm_is_that_of_their_directions(norm):
    directions = F.normalize(torch.randn(5, 3, 512), dim=-1)
    features = (directions * norm).requires_grad_()
    exact = features.detach().double().requires_grad_()
    loss, wanted = (gramian_contrastive_loss(x, 0.07) for x in (features, exact))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    got, of_exact = (torch.autograd.grad(y, x)[0].double() for y, x in ((loss, features), (wanted, exact)))
    assert torch.allclose(got * norm, of_exact * norm, atol=1e-4 * (of_exact * norm).abs().max())


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
    for shape in ((0, 3, 4), (2, 3, 0)):
        with pytest.raises(ValueError, match=r"B and C at least 1, got shape"):
            gramian_contrastive_loss(torch.randn(shape), 0.07)


@pytest.mark.parametrize("make", [float, torch.tensor, lambda value: torch.nn.Parameter(torch.tensor(value))])
@pytest.mark.parametrize("value", [0.0, -0.07, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_named(make, value):
    with torch.no_grad(), pytest.raises(ValueError, match=f"temperature must be positive and finite, got {value}"):
        gramian_contrastive_loss(torch.randn(2, 3, 4), make(value))


def test_a_temperature_that_is_learned_is_left_to_whoever_watches_the_loss():
    temperature = torch.nn.Parameter(torch.tensor(float("nan")))
    assert gramian_contrastive_loss(torch.randn(2, 3, 4), temperature).isnan()


def test_a_temperature_for_each_sample_is_refused():
    with pytest.raises(ValueError, match=r"temperature must be a number or a scalar tensor, got shape \(2,\)"):
        gramian_contrastive_loss(torch.randn(2, 3, 4), torch.ones(2))


@pytest.mark.gpu
def test_a_temperature_on_the_gpu_is_not_read():
    features, temperature = torch.randn(2, 3, 4, device="cuda"), torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        gramian_contrastive_loss(features, temperature)
    finally:
        torch.cuda.set_sync_debug_mode("default")
