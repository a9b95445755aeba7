"""Inputs on the GPU and the fp64 oracle's results for them."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from signal_reid import ops
from signal_reid.ops.reference import (
    activation,
    cross_attention,
    deformable_sampling,
    gramian,
    gramian_loss,
    masked_attention,
    offset_head,
    pairwise_error,
    residual_norm,
    token_selection,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter in a rehearsal
SAMPLES = 5 if DEVICE == "cuda" else 1
GRID = (16, 8)


@dataclass
class Example:
    """A call of one operator; `leaves` have gradients unless the operator has none."""

    name: str
    leaves: tuple[torch.Tensor, ...]
    call: Any
    forward: Any
    backward: Any

    def run(self, grad=None):
        """Output and gradients, through the public function and autograd."""
        leaves = [x.detach().requires_grad_(self.backward is not None) for x in self.leaves]
        output = self.call(*leaves)
        if self.backward is None:
            return [output]
        grad = self.grad_of(output) if grad is None else grad
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    def grad_of(self, output):
        generator = torch.Generator().manual_seed(7)
        return torch.randn(output.shape, generator=generator).to(output)

    def oracle(self, dtype=torch.float64):
        """The same by the reference, computed in `dtype`."""
        leaves = [x.detach().to(dtype) for x in self.leaves]
        output = self.forward(*leaves)
        if self.backward is None:
            return [output]
        return [output, *self.backward(self.grad_of(self.call(*self.leaves)).to(output.dtype), *leaves)]


def make_selection(draw):
    quarters = [(4 * draw(*shape).float()).round() / 4 for shape in ((4, 3, 129, 512), (4, 3, 512), (4, 3, 512))]
    tokens, intra, inter = (x.to(draw.dtype) for x in quarters)  # their scores are exact, the masks equal to the bit
    leaves = (tokens[:, :, 1:], intra, inter)
    return (
        leaves,
        lambda *x: ops.select_tokens(*x, 80, 160),
        lambda *x: token_selection.select_tokens(*x, 80, 160),
        None,
    )


def make_volume(draw):
    leaves = tuple(draw(n, 512).float() for n in (33, 64, 64))  # the operator computes in fp32 whatever it is given
    return (
        leaves,
        ops.gramian_volume,
        lambda anchor, *others: gramian.forward(anchor, others),
        lambda grad, anchor, *others: gramian.backward(grad, anchor, others),
    )


def make_loss(draw):
    features = draw(64, 3, 512).float()
    temperature = features.new_tensor(0.07)

    def forward(features):
        return gramian_loss.forward(features, temperature.to(features), 0.1)[0]

    def backward(grad, features):
        _, *kept = gramian_loss.forward(features, temperature.to(features), 0.1)
        return gramian_loss.backward(features, grad, temperature.to(features), *kept, 0.1)[:1]

    return (features,), lambda x: ops.gramian_contrastive_loss(x, temperature), forward, backward


def make_sampling(draw):
    return (
        (draw(5, 129, 512)[:, 1:], draw(5, 4, 2)),
        lambda tokens, offsets: ops.deformable_sample(tokens, offsets, GRID),
        lambda *x: deformable_sampling.forward(*x, *GRID, 2.0),
        lambda *x: deformable_sampling.backward(*x, *GRID, 2.0),
    )


def kept(samples, device):
    """A mask (samples, 3, 129) of five tokens in six, for every seed: a captured graph keeps the one it had."""
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(samples, 3, 129, generator=generator) < 5 / 6).to(device)


def make_attention(draw):
    mask = kept(SAMPLES, draw.device)
    return (
        (draw(SAMPLES, 24, 512) * 512**-0.5, draw(SAMPLES, 3, 130, 512)[:, :, 1:]),
        lambda queries, tokens: ops.attend_masked(queries, tokens, mask),
        lambda queries, tokens: masked_attention.forward(queries, tokens, mask)[0],
        lambda grad, queries, tokens: masked_attention.backward(grad, queries, tokens, mask, grad, []),
    )


def make_head(draw):
    """Of hidden tokens with a class token in front, and of a grid with a column beyond the last window."""
    hidden, window = draw(3, 5, 145, 512)[:, :, 1:], draw(3, 512, 4, 4) / 4
    parameters = draw(3, 512), window, draw(3, 512), draw(3, 512)
    return (
        (hidden, *parameters),
        lambda hidden, *parameters: ops.predict_offsets(hidden, (16, 9), *parameters),
        lambda *x: offset_head.forward(*x, 16, 9),
        lambda *x: offset_head.backward(*x, 16, 9),
    )


def make_error(draw):
    return (
        (draw(3, 64, 8, 512),),
        ops.pairwise_mse_loss,
        pairwise_error.forward,
        lambda grad, maps: (pairwise_error.backward(maps, grad),),
    )


def make_cross_attention(draw):
    mask, encoded = kept(5, draw.device), draw(5, 3, 130, 512)
    return (
        (encoded[:, :, 0], encoded[:, :, 1:], draw(1536, 512) * 512**-0.5, draw(1536)),
        lambda queries, tokens, weight, bias: ops.cross_attend(queries, tokens, mask, weight, bias, 8),
        lambda queries, tokens, *parameters: cross_attention.forward(queries, tokens, mask, *parameters, 8)[0],
        lambda grad, queries, tokens, *parameters: cross_attention.backward(
            grad, queries, tokens, mask, *parameters, 8, []
        ),
    )


def make_gelu(draw):
    return (draw(7, 129, 96),), ops.quick_gelu, activation.forward, lambda *x: (activation.backward(*x),)


def make_norm(draw):
    """The sum plus its normalisation, so that both take part."""

    def forward(x, branch, weight, bias):
        total, normed = residual_norm.forward(x, branch, weight, bias, 1e-5, x.dtype)
        return total + normed

    def backward(grad, x, branch, weight, bias):
        grad_x, grad_affine = residual_norm.backward(grad, grad, x + branch, weight, 1e-5, None)
        return grad_x, grad_x, *grad_affine

    leaves = draw(SAMPLES, 129, 768), draw(SAMPLES, 129, 768), draw(768), draw(768)
    return leaves, lambda *x: sum(ops.add_layer_norm(*x)), forward, backward


MAKERS = {
    "select_tokens": make_selection,
    "gramian_volume": make_volume,
    "gramian_contrastive_loss": make_loss,
    "deformable_sample": make_sampling,
    "attend_masked": make_attention,
    "cross_attend": make_cross_attention,
    "predict_offsets": make_head,
    "pairwise_mse_loss": make_error,
    "quick_gelu": make_gelu,
    "add_layer_norm": make_norm,
}


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=MAKERS)
def op(request):
    return request.param


@pytest.fixture
def example():
    """Make a call of an operator in a dtype on a device."""

    def make(name, dtype=torch.float32, device=DEVICE, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        draw.dtype, draw.device = dtype, device
        return Example(name, *MAKERS[name](draw))

    return make


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """Serve every operator from our kernels of each kind; a test fails, and says why, where they are not available.

    A rehearsal has the CUDA kernels alone: the interpreter of Triton takes too long, or does not take this NumPy.
    """
    if DEVICE == "cpu" and request.param == "triton":
        pytest.skip("not rehearsed")
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned():
    """What `torch.empty` gives starts as NaN, or true."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_equals_oracle():
    """Errors at most 1e-4 in fp32, else twice those of plain PyTorch in the same dtype."""

    def check(example, results):
        exact, plain = example.oracle(), example.oracle(example.leaves[0].dtype)
        for got, of_plain, expected in zip(results, plain, exact, strict=True):
            if got.dtype == torch.bool:
                assert torch.equal(got, expected)
                continue
            error, error_of_plain = ((x.double() - expected).abs().max() for x in (got, of_plain))
            scale = expected.abs().max()
            assert error <= (1e-4 * scale if got.dtype == torch.float32 else 2 * error_of_plain)

    return check
