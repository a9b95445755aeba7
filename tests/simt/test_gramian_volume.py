"""The CUDA kernels of the volume equal the oracle, and keep their digits where the oracle in fp32 loses them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from signal_reid.ops.cuda import gramian_volume as cuda
from signal_reid.ops.reference import gramian_volume as reference

LENGTHS = st.sampled_from([0, 1, 2, 5, 33])
CHANNELS = st.sampled_from([0, 3, 5, 8, 127, 128, 129, 516])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def vectors(P, Q, C, k, seed=0):
    """An anchor (P, C) and k others (Q, C)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, C, generator=generator) for n in (P, *[Q] * k)]


def wide(tensors):
    return [tensor.double() for tensor in tensors]


def assert_close(got, expected, rtol=1e-4):
    """Errors are measured against the largest magnitude, as sums over signed terms demand."""
    assert got.shape == expected.shape
    if expected.numel():
        assert (got.double() - expected).abs().max() <= rtol * expected.abs().max()


def assert_equals_oracle(anchor, others, grad):
    anchor64, *others64 = wide([anchor, *others])
    assert_close(cuda.forward(anchor, others), reference.forward(anchor64, tuple(others64)))
    expected = reference.backward(grad.double(), anchor64, tuple(others64))
    for got, wanted in zip(cuda.backward(grad, anchor, others), expected, strict=True):
        assert_close(got, wanted)


def test_equals_the_oracle_at_any_size(on_emulator, examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(P=LENGTHS, Q=LENGTHS, C=CHANNELS, k=st.integers(1, 4), seed=st.integers(0, 99))
    def check(P, Q, C, k, seed):
        assume(C == 0 or 2 * k < C)  # random vectors in few dimensions are too often nearly dependent
        on_emulator(seed + 1)
        anchor, *others = vectors(P, Q, C, k, seed)
        (grad,) = vectors(P, 0, Q, 0, seed + 100)
        assert_equals_oracle(anchor, others, grad)

    check()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_wide_tiles_equal_the_oracle(on_emulator, k):
    anchor, *others = vectors(1003, 27, 8, k)
    assert_equals_oracle(anchor, others, torch.randn(1003, 27))


def test_blocks_that_walk_over_several_tiles_equal_the_oracle(on_emulator):
    anchor, *others = vectors(33, 8185, 4, 1)
    assert_equals_oracle(anchor, others, torch.randn(33, 8185))


@pytest.mark.parametrize("C", [4096, 4099])
def test_channels_beyond_shared_memory_go_in_chunks(on_emulator, C):
    anchor, *others = vectors(3, 2, C, 4)
    assert_equals_oracle(anchor, others, torch.randn(3, 2))


def test_strided_vectors_and_gradients(on_emulator):
    anchor, *others = (v[:, ::2] for v in vectors(5, 7, 32, 2))
    grad = torch.randn(7, 5).T
    assert_equals_oracle(anchor, others, grad)
    assert_equals_oracle(anchor, others, torch.ones(()).expand(5, 7))


def test_rows_off_16_bytes(on_emulator):
    anchor, *others = (torch.randn(6 * 8 + 1)[1:].view(6, 8) for _ in range(3))
    assert_equals_oracle(anchor, others, torch.randn(6, 6))


def leaning(height, k, C=512, n=9):
    """Unit vectors whose anchor stands `height` above the span of the others."""
    generator = torch.Generator().manual_seed(0)
    others = [F.normalize(torch.randn(n, C, dtype=torch.float64, generator=generator), dim=1) for _ in range(k)]
    away = F.normalize(torch.randn(n, C, dtype=torch.float64, generator=generator), dim=1)
    anchor = F.normalize(F.normalize(sum(others), dim=1) + height * away, dim=1)
    return [v.float() for v in (anchor, *others)]


def aligned(volume, k, C=512, n=9):
    """Unit vectors close to each other that span about `volume`."""
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(n, C, dtype=torch.float64, generator=generator)
    spread = [volume ** (1 / k) * torch.randn(n, C, dtype=torch.float64, generator=generator) for _ in range(k)]
    return [F.normalize(v, dim=1).float() for v in (anchor, *(anchor + s for s in spread))]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("make", [leaning, aligned])
@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3])
def test_small_volumes_keep_their_digits(on_emulator, make, scale, k):
    anchor, *others = make(scale, k)
    anchor64, *others64 = wide([anchor, *others])
    expected = reference.forward(anchor64, tuple(others64)).diagonal()
    assert expected.max() < 2 * scale
    assert torch.allclose(cuda.forward(anchor, others).diagonal().double(), expected, rtol=1e-4)
    grad = torch.eye(len(anchor))
    gradients = reference.backward(grad.double(), anchor64, tuple(others64))
    for got, wanted in zip(cuda.backward(grad, anchor, others), gradients, strict=True):
        assert ((got - wanted).norm(dim=1) < 1e-3 * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_volume_zero_has_bounded_gradients(on_emulator, k):
    same = F.normalize(torch.randn(5, 512), dim=1)
    assert (cuda.forward(same, [same] * k).diagonal() < 1e-6).all()
    for gradient in cuda.backward(torch.eye(5), same, [same] * k):
        assert (gradient.norm(dim=1) < 2).all()  # 1 but for its direction, which is rounding


def test_heights_below_the_rounding_of_the_anchor_have_bounded_gradients(on_emulator):
    (same,) = vectors(64, 0, 8, 0)
    same[:, 4:] *= 1e-6  # elements whose rounding is small enough to leave a residual of almost nothing
    lengths = same.norm(dim=1)
    for gradient in cuda.backward(torch.eye(64), same, [same]):
        assert (gradient.norm(dim=1) < 4 * lengths).all()


@pytest.mark.parametrize(("C", "k"), [(1, 1), (1, 4), (2, 2), (3, 4), (4, 4)])
def test_more_vectors_than_dimensions_span_nothing(on_emulator, C, k):
    anchor, *others = vectors(5, 6, C, k)
    assert (cuda.forward(anchor, others) < 1e-5).all()
    for gradient in cuda.backward(torch.ones(5, 6), anchor, others):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("zeros", [(0,), (1,), (2,), (0, 1, 2)])
def test_zero_vectors_span_nothing(on_emulator, zeros):
    given = vectors(4, 4, 12, 2)
    for index in zeros:
        given[index] = torch.zeros(4, 12)
    anchor, *others = given
    assert (cuda.forward(anchor, others) == 0).all()
    gradients = cuda.backward(torch.ones(4, 4), anchor, others)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if 0 in zeros:
        assert (gradients[0] == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_visible_in_its_row_and_column_only(on_emulator, poison):
    anchor, *others = vectors(40, 12, 16, 2)
    anchor[33, 3] = poison
    assert cuda.forward(anchor, others)[33].isnan().all()
    assert cuda.forward(anchor, others)[[*range(33), *range(34, 40)]].isfinite().all()
    anchor[33, 3] = 0
    others[1][9, 0] = poison
    volume = cuda.forward(anchor, others)
    assert volume[:, 9].isnan().all()
    assert volume[:, [*range(9), 10, 11]].isfinite().all()
    gradients = cuda.backward(torch.ones(40, 12), anchor, others)
    assert gradients[1][9].isnan().all()
    assert gradients[1][[*range(9), 10, 11]].isfinite().all()


def test_is_the_same_to_the_bit_whatever_the_schedule(on_emulator):
    anchor, *others = vectors(37, 13, 132, 2)
    grad = torch.randn(37, 13)
    runs = []
    for seed in (1, 2, 3):
        on_emulator(seed)
        runs.append([cuda.forward(anchor, others), *cuda.backward(grad, anchor, others)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
