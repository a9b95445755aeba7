"""How close an operator must come to its formula."""

import pytest
import torch

from signal_reid import ops


def results_of(function, inputs, grad):
    """The output and the gradient of every input, as a function of floating inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))


@pytest.fixture(scope="session")
def assert_as_close_as_plain():
    """Output and gradients: in fp32 within 1e-4 of the largest magnitude; in lower precision at most twice as far from
    the formula in fp64 as the same formula in that precision, whose error is taken as no less than one rounding, or as
    many as an operator of several products makes: of few numbers, plain PyTorch's may happen to have hardly any."""

    def check(function, formula, inputs, grad, roundings=1):
        exact = results_of(formula, [x.double() for x in inputs], grad.double())
        plain, ours = (results_of(f, inputs, grad) for f in (formula, function))
        for got, of_plain, wanted in zip(ours, plain, exact, strict=True):
            assert got.shape == wanted.shape
            assert got.dtype == of_plain.dtype
            if not wanted.numel():
                continue
            error, allowed = ((x.double() - wanted).abs().max() for x in (got, of_plain))
            largest = wanted.abs().max()
            rounding = roundings * torch.finfo(got.dtype).eps / 2 * largest
            assert error <= (1e-4 * largest if inputs[0].dtype == torch.float32 else 2 * max(allowed, rounding))

    return check


@pytest.fixture(scope="session")
def takes():
    """Whether a backend can be used here for such a tensor: on a GPU, its kernels take nothing of the host's."""

    def check(backend, tensor):
        for_gpus = torch.cuda.is_available() and backend in ("cuda", "triton")
        return ops.dispatch.unavailable_reason(backend) is None and (
            backend == "reference" or for_gpus == tensor.is_cuda
        )

    return check
