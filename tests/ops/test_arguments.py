"""What no operator can take is refused by a line that names the argument."""

import pytest
import torch

from signal_reid import ops
from signal_reid.methods.signal.selective_interaction import SelectiveInteraction

X = torch.ones(2, 2, 4, 8)
Q = torch.ones(2, 2, 8)


@pytest.mark.parametrize("value", [None, 3, "x", [1.0], torch.ones(2, 2, 4, 8).numpy()])
def test_what_is_no_tensor_is_named(value):
    for name, call in {
        "tokens": ops.mean_tokens,
        "x": ops.quick_gelu,
        "maps": ops.pairwise_mse_loss,
        "values": ops.sort_rows,
        "anchor": lambda given: ops.gramian_volume(given, Q[0]),
        "others[0]": lambda given: ops.gramian_volume(Q[0], given),
        "mask": lambda given: ops.attend_masked(Q, X, given),
        "weight": lambda given: ops.add_layer_norm(X, None, given, X[0, 0, 0]),
        "inter_query": lambda given: ops.select_tokens(X, Q, given, 1, 1),
    }.items():
        with pytest.raises(TypeError) as caught:
            call(value)
        assert str(caught.value) == f"{name} must be a tensor, got {type(value).__name__}"


def test_a_sparse_tensor_is_named():
    with pytest.raises(ValueError, match=r"^x must be a dense tensor, got torch.sparse_coo$"):
        ops.quick_gelu(X.to_sparse())


NUMBERS = {
    "k_intra": lambda given: ops.select_tokens(X, Q, Q, given, 1),
    "heads": lambda given: ops.cross_attend(Q, X, X[..., 0] > 0, torch.ones(24, 8), torch.ones(24), given),
    "offset_range": lambda given: ops.deformable_sample(X[0], X[0, :, :2, :2], (2, 2), given),
    "label_smoothing": lambda given: ops.gramian_contrastive_loss(Q, 0.07, given),
    "temperature": lambda given: ops.gramian_contrastive_loss(Q, given),
    "eps": lambda given: ops.add_layer_norm(X, None, X[0, 0, 0], X[0, 0, 0], given),
    "grid_size": lambda given: ops.deformable_sample(X[0], X[0, :, :2, :2], given),
}


@pytest.mark.parametrize("value", [None, "2", True, (1, 2, 3), [2.5, "x"], torch.ones(2), -1, float("nan")], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_such_number_is_named(name, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        NUMBERS[name](value)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_dtype_that_is_none_is_named():
    for dtype in (torch.int64, "half", X):
        with pytest.raises(ValueError, match=r"^out_dtype must be float32"):
            ops.add_layer_norm(X, None, X[0, 0, 0], X[0, 0, 0], out_dtype=dtype)


NARROW, WIDE = torch.bfloat16, torch.float32
MIXED = {
    "select_tokens": lambda x, q: ops.select_tokens(x, q, q.to(x.dtype), 2, 3),
    "deformable_sample": lambda x, q: ops.deformable_sample(x[0], q[:, :, :3], (2, 2)),
    "gramian_volume": lambda x, q: ops.gramian_volume(x[:, 0, 0], q[:, 0], x[:, 1, 0]),
    "convolve_windows": lambda x, q: ops.convolve_windows(x, q.reshape(8, 2, 2)),
    "predict_offsets": lambda x, q: ops.predict_offsets(
        x.repeat(1, 1, 4, 1), (4, 4), q[0], torch.ones(2, 8, 4, 4, dtype=x.dtype), q[0].to(x.dtype), q[1]
    ),
    "attend_masked": lambda x, q: ops.attend_masked(q, x, x[..., 0] > 0),
    "SIM": lambda x, q: SelectiveInteraction(8, 2, 2)(x, q),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize(("of_tokens", "of_others"), [(NARROW, WIDE), (WIDE, NARROW)])
def test_autocast_takes_tokens_and_class_tokens_of_different_precision(name, of_tokens, of_others):
    """The values are exact in bf16, so what the operators compute is too, but for results that are rounded to it."""
    torch.manual_seed(0)
    x, q = torch.randn(2, 2, 4, 8).to(NARROW).to(of_tokens), torch.randn(2, 2, 8).to(NARROW).to(of_others)
    with torch.autocast("cpu", NARROW):
        torch.manual_seed(1)
        mixed = MIXED[name](x, q)
        torch.manual_seed(1)
        alike = MIXED[name](x.to(WIDE), q.to(WIDE))
    rounding = 2**-7 if name in ("predict_offsets", "SIM") else 0
    torch.testing.assert_close(mixed.to(WIDE), alike.to(WIDE), rtol=rounding, atol=4 * rounding)


def test_without_autocast_another_precision_is_named():
    with pytest.raises(ValueError, match=r"^intra_query must have the dtype of tokens \(torch.float32\), got torch.bf"):
        ops.select_tokens(X, Q.bfloat16(), Q, 1, 1)
