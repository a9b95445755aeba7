import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signal_reid.evaluation.distances import (
    LAST,
    SquaredDistances,
    distances_within,
    exact_products,
    key_columns,
    order_keys,
)


@pytest.mark.parametrize("normalize", [False, True])
def test_distances_are_the_squared_euclidean_ones(normalize):
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    scaled = [torch.nn.functional.normalize(x, dim=1) if normalize else x for x in (a, b)]
    expected = torch.cdist(*scaled).square().float()
    torch.testing.assert_close(SquaredDistances(b, normalize)(a), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 64, 90])
def test_distances_within_a_set_are_those_to_itself(n, normalize):
    features = torch.randn(n, 7) + 1
    expected = SquaredDistances(features, normalize)(features)
    torch.testing.assert_close(distances_within(features, normalize), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_equal_features_of_a_set_are_equally_far(normalize):
    features = torch.randint(-9, 10, (10, 300)).float()[torch.arange(40) % 10]  # whole: their products are exact
    within = distances_within(features, normalize)
    assert torch.equal(within[:, :10].repeat(1, 4), within)


def test_distances_within_a_set_of_a_zero_vector_are_finite():
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(distances_within(torch.tensor([[0.0, 0], [3, 4]]), normalize=True), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_low_precision_features_are_compared_without_loss_block_by_block(normalize, dtype, monkeypatch):
    monkeypatch.setattr("signal_reid.evaluation.distances._BLOCK", 40)
    a, b = torch.randn(50, 700).to(dtype), torch.randn(90, 700).to(dtype)  # large enough for a CPU's matrix unit
    expected = SquaredDistances(b.float(), normalize)(a.float())
    torch.testing.assert_close(SquaredDistances(b, normalize)(a), expected, rtol=1e-5, atol=1e-6)
    assert SquaredDistances(b).features is b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_distances_within_a_low_precision_set_lose_nothing(normalize, dtype):
    features = torch.randn(90, 700).to(dtype)
    expected = distances_within(features.float(), normalize)
    torch.testing.assert_close(distances_within(features, normalize), expected, rtol=1e-5, atol=1e-5)


def test_low_precision_rows_meet_a_set_in_full_precision_without_loss():
    a, b = torch.randn(50, 700).bfloat16(), torch.randn(90, 700)
    expected = SquaredDistances(b)(a.float())
    torch.testing.assert_close(SquaredDistances(b)(a), expected, rtol=1e-5, atol=1e-6)


def test_distances_go_where_they_are_told():
    out = torch.full((2, 3), torch.nan)
    assert SquaredDistances(torch.eye(3))(torch.eye(3)[:2], out=out).data_ptr() == out.data_ptr()
    assert out.tolist() == [[0, 2, 2], [2, 0, 2]]


def test_distances_of_a_set_to_itself_are_not_negative():
    features = torch.randn(50, 64) * 1e3
    assert (SquaredDistances(features)(features) >= 0).all()


def test_a_zero_vector_stays_zero_when_normalised():
    distances = SquaredDistances(torch.zeros(1, 4), normalize=True)(torch.tensor([[0.0] * 4, [3.0, 0, 0, 4]]))
    torch.testing.assert_close(distances, torch.tensor([[0.0], [1.0]]))


@given(st.lists(st.floats(0, width=32), min_size=1, max_size=30))
def test_keys_sort_by_distance_then_column(values):
    distances = torch.tensor([values])
    keys = order_keys(distances)
    assert key_columns(keys).tolist() == [list(range(len(values)))]
    assert (keys < LAST).all()
    assert key_columns(keys.sort().values).tolist() == [sorted(range(len(values)), key=lambda j: (values[j], j))]


def test_negative_zero_ties_with_zero():
    assert order_keys(torch.tensor([[0.0, -0.0]])).diff().item() == 1


def test_distances_ignore_reduced_precision_and_autocast_and_leave_them_as_they_were():
    a, b = torch.randn(8, 512), torch.randn(8, 512)
    expected = SquaredDistances(b)(a)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(SquaredDistances(b)(a), expected)
        with pytest.raises(RuntimeError), exact_products(torch.bfloat16):
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
