"""PyTorch knows the operators: opcheck, torch.compile without a graph break, torch.export, autocast."""

from functools import partial

import pytest
import torch

from signal_reid import ops
from signal_reid.ops.backend import BACKENDS, serves
from signal_reid.ops.library import ENTRIES

LIBRARY = torch.ops.signal_reid


def offset_parameters():
    """Of two modalities' heads of 6 channels."""
    return torch.randn(2, 6), torch.randn(2, 6, 4, 4), torch.randn(2, 6), torch.randn(2, 6)


CASES = {
    "select_tokens": lambda: (torch.randn(1, 2, 5, 4), torch.randn(1, 2, 4), torch.randn(1, 2, 4), 2, 3),
    "gramian_volume": lambda: (torch.randn(3, 8), [torch.randn(4, 8), torch.randn(4, 8)]),
    "gramian_volume_backward": lambda: (torch.randn(3, 4), torch.randn(3, 8), [torch.randn(4, 8), torch.randn(4, 8)]),
    "gramian_loss": lambda: (torch.randn(4, 3, 8), torch.tensor(0.07), 0.1),
    "gramian_loss_backward": lambda: (
        torch.randn(4, 3, 8),
        torch.randn(()),
        torch.tensor(0.07),
        torch.randn(()),
        torch.rand(4, 4),
        0.1,
    ),
    "deformable_sample": lambda: (torch.randn(2, 40, 6), torch.randn(2, 2, 3), 8, 5, 2.0),
    "deformable_sample_backward": lambda: (
        torch.randn(2, 6, 6),
        torch.randn(2, 40, 6),
        torch.randn(2, 2, 3),
        8,
        5,
        2.0,
    ),
    "quick_gelu": lambda: (torch.randn(3, 5),),
    "quick_gelu_backward": lambda: (torch.randn(3, 5), torch.randn(3, 5)),
    "add_layer_norm": lambda: (*torch.randn(2, 2, 3, 8).unbind(0), *torch.randn(2, 8).unbind(0), 1e-5, torch.float32),
    "layer_norm": lambda: (torch.randn(2, 3, 8), *torch.randn(2, 8).unbind(0), 1e-5, torch.float16),
    "add_layer_norm_backward": lambda: (
        *torch.randn(3, 2, 3, 8).unbind(0),
        torch.randn(8),
        1e-5,
        torch.bfloat16,
    ),
    "attend": lambda: (torch.randn(3, 2, 2, 5, 4),),
    "attend_backward": lambda: (torch.randn(2, 2, 5, 4), torch.randn(3, 2, 2, 5, 4), torch.rand(2, 2, 5, 5)),
    "mean_tokens": lambda: (torch.randn(2, 3, 9, 8).half(),),
    "attend_masked": lambda: (torch.randn(2, 4, 8).half(), torch.randn(2, 3, 9, 8), torch.rand(2, 3, 9) < 0.5),
    "attend_masked_backward": lambda: (
        torch.randn(2, 4, 8),
        torch.randn(2, 4, 8),
        torch.randn(2, 3, 9, 8),
        torch.rand(2, 3, 9) < 0.5,
        torch.randn(2, 4, 8),
        [torch.rand(2, 4, 27), torch.randn(2, 27, 8)],
    ),
    "cross_attend": lambda: (
        torch.randn(2, 3, 8),
        torch.randn(2, 3, 9, 8),
        torch.rand(2, 3, 9) < 0.5,
        torch.randn(24, 8),
        torch.randn(24),
        2,
    ),
    "cross_attend_backward": lambda: (
        torch.randn(2, 3, 8),
        torch.randn(2, 3, 8),
        torch.randn(2, 3, 9, 8),
        torch.rand(2, 3, 9) < 0.5,
        torch.randn(24, 8),
        torch.randn(24),
        2,
        [],
    ),
    "convolve_windows": lambda: (torch.randn(2, 9, 8, 6), torch.randn(6, 4, 4)),
    "convolve_windows_backward": lambda: (torch.randn(2, 2, 2, 6), torch.randn(2, 9, 8, 6), torch.randn(6, 4, 4)),
    "offset_head": lambda: (torch.randn(2, 3, 45, 6), *offset_parameters(), 9, 5),
    "offset_head_backward": lambda: (torch.randn(2, 3, 2, 1), torch.randn(2, 3, 45, 6), *offset_parameters(), 9, 5),
    "pairwise_error": lambda: (torch.randn(3, 4, 5).half(),),
    "pairwise_error_backward": lambda: (torch.randn(3, 4, 5), torch.randn(())),
    "sort_rows": lambda: (torch.randn(3, 5),),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.library.opcheck(getattr(LIBRARY, name).default, CASES[name]())


OPERATORS = {name: getattr(entry, "args", ["residual_norm"])[0] for name, entry in ENTRIES.items()}
SERVED = [(backend, name) for backend in BACKENDS for name in CASES if serves(backend, OPERATORS[name])]


def reversed_dimensions(x):
    return x.permute(*reversed(range(x.ndim)))


LAYOUTS = {
    "transposed": lambda x: reversed_dimensions(reversed_dimensions(x).contiguous()),
    "swapped": lambda x: x if x.ndim < 2 else x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def laid_out(argument, layout):
    if isinstance(argument, list):
        return [laid_out(x, layout) for x in argument]
    return LAYOUTS[layout](argument) if isinstance(argument, torch.Tensor) and argument.ndim else argument


def test_every_operator_has_a_case():
    assert CASES.keys() == ENTRIES.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "name"), SERVED, indirect=["backend"])
def test_results_lie_as_their_fakes_whatever_the_strides(backend, name, layout):
    if name == "sort_rows" and layout == "expanded":
        pytest.skip("nothing is written to memory that several elements share")
    first, *others = CASES[name]()
    laid_out_first, *laid_out_others = (laid_out(argument, layout) for argument in (first, *others))
    check = partial(torch.library.opcheck, getattr(LIBRARY, name).default, test_utils="test_faketensor")
    check((laid_out_first, *others))
    check((laid_out_first, *laid_out_others))


def everything(tokens, cls, offsets):
    mask = ops.select_tokens(tokens, cls, cls, 4, 8)
    volume = ops.gramian_volume(*tokens.mean(2).unbind(1))
    sampled = ops.deformable_sample(tokens.flatten(0, 1), offsets, (4, 4))
    return volume.sum() + sampled.square().sum() + (ops.quick_gelu(tokens) * mask[..., None]).sum()


def inputs():
    return (
        torch.randn(2, 3, 16, 8, requires_grad=True),
        torch.randn(2, 3, 8, requires_grad=True),
        torch.randn(6, 2, 2, requires_grad=True),
    )


def test_compiles_without_a_graph_break_forward_and_backward():
    arguments = inputs()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    eager, traced = everything(*arguments), compiled(*arguments)
    assert torch.allclose(eager, traced)
    used = (arguments[0], arguments[2])
    for a, b in zip(torch.autograd.grad(eager, used), torch.autograd.grad(traced, used), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_compiles_without_gradients():
    arguments = [x.detach() for x in inputs()]
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert torch.allclose(everything(*arguments), compiled(*arguments))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    arguments = [x.detach().cuda().requires_grad_() for x in inputs()]
    everything(*arguments).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*arguments).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, tokens, cls, offsets):
            return everything(tokens, cls, offsets)

    arguments = tuple(x.detach() for x in inputs())
    exported = torch.export.export(Module(), arguments)
    assert torch.allclose(exported.module()(*arguments), everything(*arguments))


def offsets_of(x):
    """Of a batch whose values are the parameters as well."""
    window = x[:, 0, 1, :, None, None].expand(-1, -1, 4, 4)
    return ops.predict_offsets(x.repeat(1, 1, 4, 1), (4, 6), x[:, 0, 0], window, x[:, 1, 0], x[:, 1, 1])


PLAIN = {
    "attend": lambda x: ops.attend(x[:, None]),
    "mean_tokens": ops.mean_tokens,
    "attend_masked": lambda x: ops.attend_masked(x[:, 0, :5], x, x[..., 0] < 0.5),
    "cross_attend": lambda x: ops.cross_attend(
        x[:, 0, :5], x, x[..., 0] < 0.5, x[0, 0, :3].repeat(8, 1).sin(), x[0, 0, 0].repeat(3), 2
    ),
    "convolve_windows": lambda x: ops.convolve_windows(x, x[0, 0, 0, :, None, None].expand(-1, 2, 2)),
    "predict_offsets": offsets_of,
    "pairwise_mse_loss": ops.pairwise_mse_loss,
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_compiler_gets_plain_pytorch_to_merge_with_its_neighbours(name):
    graphs = []
    torch.compiler.reset()  # past a few recompilations of one function PyTorch gives up

    def collect(graph, example):
        graphs.append(graph)
        return graph.forward

    def call(x):
        return PLAIN[name](x * 2).sin().sum()

    x = torch.randn(3, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend=collect)
    (grad,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(grad, torch.autograd.grad(call(x), x)[0], rtol=1e-9, atol=1e-9)
    assert "signal_reid" not in str(graphs[0].graph)


@pytest.mark.parametrize("name", ["attend", "attend_masked", "cross_attend", "convolve_windows"])
def test_second_derivative_of_a_plain_operator_is_refused(name):
    x = torch.randn(3, 2, 6, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name} is not differentiable twice"):
        torch.autograd.grad(PLAIN[name](x).sum(), x, create_graph=True)


@pytest.mark.parametrize("name", ["gramian_volume", "deformable_sample", "quick_gelu"])
def test_second_derivative_is_refused(name):
    tokens, _, offsets = inputs()
    value = {
        "gramian_volume": lambda: ops.gramian_volume(*tokens.mean(2).unbind(1)),
        "deformable_sample": lambda: ops.deformable_sample(tokens.flatten(0, 1), offsets, (4, 4)),
        "quick_gelu": lambda: ops.quick_gelu(tokens),
    }[name]()
    with pytest.raises(RuntimeError, match=f"{name} is not differentiable twice"):
        torch.autograd.grad(value.sum(), tokens, create_graph=True)


def test_an_operator_takes_one_tensor_several_times_when_it_is_compiled():
    a, b = torch.randn(2, 4, 8, requires_grad=True).unbind(0)

    def volume(a, b):
        return ops.gramian_volume(a, b, b)

    compiled = torch.compile(volume, fullgraph=True, backend="aot_eager")
    grad = torch.randn(4, 4)
    torch.testing.assert_close(compiled(a, b), volume(a, b))
    of_compiled, of_eager = (torch.autograd.grad(f(a, b), (a, b), grad) for f in (compiled, volume))
    torch.testing.assert_close(of_compiled, of_eager)


ON_META = {
    **PLAIN,
    "gramian_volume": lambda x: ops.gramian_volume(*x.mean(2).unbind(1)),
    "gramian_contrastive_loss": lambda x: ops.gramian_contrastive_loss(x.mean(2), x[0, 0, 0, 0]),
    "select_tokens": lambda x: ops.select_tokens(x, x.mean(2), x.mean(2), 2, 3),
    "deformable_sample": lambda x: ops.deformable_sample(x.flatten(1, 2), x[:, :, :2, 0], (3, 4)),
    "quick_gelu": ops.quick_gelu,
    "add_layer_norm": lambda x: ops.add_layer_norm(x, x, x[0, 0, 0], x[0, 0, 0])[1],
}


@pytest.mark.parametrize("name", ON_META)
def test_a_tensor_without_values_has_a_result_and_a_gradient_without_values(name):
    x = torch.randn(3, 2, 6, 8, requires_grad=name != "select_tokens")
    on_meta = x.detach().to("meta").requires_grad_(x.requires_grad)
    real, fake = ON_META[name](x), ON_META[name](on_meta)
    assert fake.is_meta
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    if x.requires_grad:
        assert torch.autograd.grad(fake.sum(), on_meta)[0].shape == x.shape
