"""torch.func and forward mode see through the operators: derivatives are right or refused, never zero."""

import pytest
import torch
from torch.autograd import forward_ad

from signal_reid import ops


def offsets_of(x):
    """Of a batch whose values are the parameters as well."""
    window = x[:, 0, 1, :, None, None].expand(-1, -1, 4, 4)
    return ops.predict_offsets(x.repeat(1, 1, 4, 1), (4, 6), x[:, 0, 0], window, x[:, 1, 0], x[:, 1, 1])


FORMULAS = {
    "quick_gelu": ops.quick_gelu,
    "attend": lambda x: ops.attend(x[:, None]),
    "attend_masked": lambda x: ops.attend_masked(x[:, 0, :5], x, x[..., 0] < 0.5),
    "convolve_windows": lambda x: ops.convolve_windows(x, x[0, 0, 0, :, None, None].expand(-1, 2, 2)),
    "mean_tokens": ops.mean_tokens,
    "predict_offsets": offsets_of,
    "pairwise_mse_loss": ops.pairwise_mse_loss,
    "deformable_sample": lambda x: ops.deformable_sample(x.flatten(1, 2), x[:, :, :2, 0], (3, 4)),
    "layer_norm": lambda x: ops.add_layer_norm(x, None, x[0, 0, 0], x[0, 0, 1])[1],
    "add_layer_norm": lambda x: torch.cat(ops.add_layer_norm(x, x.sin(), x[0, 0, 0], x[0, 0, 1])),
}
VOLUMES = {
    "gramian_volume": lambda x: ops.gramian_volume(*x.mean(2).unbind(1)),
    "gramian_contrastive_loss": lambda x: ops.gramian_contrastive_loss(x.mean(2), 0.1),
}
DIFFERENTIABLE = {**FORMULAS, **VOLUMES}


@pytest.fixture(params=["auto", "reference"])
def chosen(request):
    with ops.use_backend(request.param):
        yield


def some(*batch):
    return torch.randn(*batch, 3, 2, 6, 8, dtype=torch.float64)


def by_backward(function, x, grad):
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, grad)[0]


@pytest.mark.parametrize("name", FORMULAS)
def test_forward_mode_is_the_transpose_of_the_backward(chosen, name):
    x, tangent = some(), some()
    value, along = torch.func.jvp(FORMULAS[name], (x,), (tangent,))
    grad = torch.randn_like(value)
    torch.testing.assert_close(value, FORMULAS[name](x))
    torch.testing.assert_close((grad * along).sum(), (by_backward(FORMULAS[name], x, grad) * tangent).sum())


@pytest.mark.parametrize("name", FORMULAS)
def test_dual_tensors_keep_their_tangent_without_recording_gradients(name):
    x, tangent = some(), some()
    with torch.no_grad(), forward_ad.dual_level():
        _, along = forward_ad.unpack_dual(FORMULAS[name](forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(along, torch.func.jvp(FORMULAS[name], (x,), (tangent,))[1])


def in_a_dual_level(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD_MODES = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "jvp of vmap": lambda function, x: torch.func.jvp(torch.func.vmap(function), (x[None],), (x[None],)),
    "dual tensor": in_a_dual_level,
}


@pytest.mark.parametrize("name", VOLUMES)
@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_forward_mode_of_a_volume_is_refused(name, mode):
    with pytest.raises(RuntimeError, match="gramian_volume has no derivative in forward mode"):
        FORWARD_MODES[mode](VOLUMES[name], some())


def test_what_has_no_tangent_passes_through_a_dual_level():
    x = some()
    with forward_ad.dual_level():
        inside = VOLUMES["gramian_contrastive_loss"](x)
    torch.testing.assert_close(inside, VOLUMES["gramian_contrastive_loss"](x))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_is_a_loop_over_samples_and_keeps_their_gradients(chosen, name):
    x = some(2)
    function, leaf = DIFFERENTIABLE[name], x.clone().requires_grad_()
    mapped = torch.func.vmap(function)(leaf)
    wanted = torch.stack([function(sample) for sample in x])
    torch.testing.assert_close(mapped, wanted)
    grad = torch.randn_like(wanted)
    (got,) = torch.autograd.grad(mapped, leaf, grad)
    torch.testing.assert_close(got, torch.stack([by_backward(function, *pair) for pair in zip(x, grad, strict=True)]))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_per_sample_is_that_of_the_backward(name):
    x = some(2)

    def total(sample):
        return DIFFERENTIABLE[name](sample).sum()

    wanted = [by_backward(total, sample, torch.ones((), dtype=x.dtype)) for sample in x]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(x), torch.stack(wanted))


def test_vmap_takes_any_dimension_and_shares_what_has_none():
    a, b, c = torch.randn(4, 2, 8), torch.randn(5, 8, 2), torch.randn(5, 8)
    mapped = torch.func.vmap(ops.gramian_volume, in_dims=(1, 2, None), out_dims=2)(a, b, c)
    wanted = [ops.gramian_volume(a[:, n], b[..., n], c) for n in range(2)]
    torch.testing.assert_close(mapped, torch.stack(wanted, 2))


def test_the_second_derivative_of_a_volume_is_refused_by_transforms():
    with pytest.raises(RuntimeError, match="gramian_volume is not differentiable twice"):
        torch.func.grad(lambda x: torch.func.grad(lambda y: VOLUMES["gramian_volume"](y).sum())(x).sum())(some())


def test_a_backward_in_forward_mode_is_refused():
    x = torch.randn(5, requires_grad=True)
    y = ops.quick_gelu(x)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="quick_gelu is not differentiable twice"),
    ):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones(5), torch.ones(5)))


def test_sorting_in_place_refuses_a_tangent():
    with forward_ad.dual_level(), pytest.raises(ValueError, match="without gradient or tangent"):
        ops.sort_rows(forward_ad.make_dual(torch.ones(2, 3), torch.ones(2, 3)))
