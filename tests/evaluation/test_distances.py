import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signal_reid.evaluation.distances import LAST, SquaredDistances, full_precision, key_columns, order_keys


@pytest.mark.parametrize("normalize", [False, True])
def test_distances_are_the_squared_euclidean_ones(normalize):
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    scaled = [torch.nn.functional.normalize(x, dim=1) if normalize else x for x in (a, b)]
    expected = torch.cdist(*scaled).square().float()
    torch.testing.assert_close(SquaredDistances(b, normalize)(a), expected, rtol=1e-4, atol=1e-5)


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
        with pytest.raises(RuntimeError), full_precision():
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
