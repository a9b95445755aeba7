"""Rows are sorted in place, whatever their dtype and strides, NaN last."""

import pytest
import torch
from hypothesis import strategies as st

from signal_reid import ops
from signal_reid.ops.cpu import sorting as by_numpy

OPERATOR = "sorting"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8]


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """The cores that PyTorch counts on, all of which are worth it."""
    monkeypatch.setattr(by_numpy, "WORTH_THREADS", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: request.param)


def test_sorts_each_row_in_place(backend, threads):
    def check(rows, columns, dtype):
        values = (100 * torch.randn(rows, columns)).to(dtype)
        expected = values.sort(dim=1).values
        assert ops.sort_rows(values) is values
        assert torch.equal(values, expected)

    backend.for_all(
        check, rows=st.integers(0, 5), columns=st.sampled_from([0, 1, 5, 127, 129]), dtype=st.sampled_from(DTYPES)
    )


def test_all_64_bits_of_a_key_count(backend, threads):
    values = torch.randint(-(2**60), 2**60, (5, 40))
    expected = values.sort(dim=1).values
    assert torch.equal(ops.sort_rows(values), expected)


def test_nan_comes_last(backend, threads):
    values = torch.tensor([[torch.nan, torch.inf, 0.0, -torch.inf]])
    assert ops.sort_rows(values)[0, :3].tolist() == [-torch.inf, 0.0, torch.inf]
    assert values[0, 3].isnan()


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x[:, ::2], lambda x: x[1:]])
def test_only_what_a_view_shows_is_moved(backend, threads, view):
    whole = torch.randn(6, 8)
    expected = whole.clone()
    view(expected).copy_(view(expected).sort(dim=1).values)
    ops.sort_rows(view(whole))
    assert torch.equal(whole, expected)


def test_bfloat16_which_numpy_lacks_is_sorted_by_pytorch_unless_numpy_was_chosen():
    values = torch.randn(3, 9).bfloat16()
    with ops.use_backend("cpu"), pytest.raises(ops.BackendError, match="backend cpu cannot sort bfloat16"):
        ops.sort_rows(values)
    assert (ops.sort_rows(values).diff() >= 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(3), r"values must be \(m, n\), got shape \(3,\)"),
        (
            torch.ones(2, 2, dtype=torch.complex64),
            "real and without gradient or tangent, got torch.complex64",
        ),
        (torch.ones(2, 2, requires_grad=True), "values.requires_grad=True"),
    ],
)
def test_bad_input_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        ops.sort_rows(values)
