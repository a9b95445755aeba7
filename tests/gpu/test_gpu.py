"""What only a GPU can show: results on the device, streams, other devices, graphs, and that nothing waits."""

import pytest
import torch

import signal_reid
from signal_reid import ops
from signal_reid.evaluation.distances import SquaredDistances, distances_within
from signal_reid.ops.cuda import core
from signal_reid.training import total_loss

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [pytest.param(DTYPES[0], marks=pytest.mark.rehearsed), *DTYPES[1:]])
def test_equals_the_oracle(op, dtype, example, kernels, poisoned, assert_equals_oracle):
    case = example(op, dtype)
    assert_equals_oracle(case, case.run())


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("batch", [2, 300])  # samples that blocks share, and whole ones
def test_a_query_that_points_at_one_token_attends_to_it_to_the_bit(dtype, batch, poisoned):
    """Integers tell where each element of the tensor cores' matrices comes from: a wrong row or channel shows."""
    M, N, C, Q = 3, 128, 512, 24
    tokens = torch.randint(-8, 9, (batch, M * N, C), device="cuda").to(dtype)
    tokens[..., :Q] = 0
    pointed = torch.stack([torch.randperm(M * N, device="cuda")[:Q] for _ in range(batch)])  # (batch, Q)
    samples, q = torch.arange(batch, device="cuda")[:, None], torch.arange(Q, device="cuda")
    tokens[samples, pointed, q] = 8
    queries, grad = torch.zeros(batch, Q, C, device="cuda", dtype=dtype), torch.randint(-8, 9, (batch, Q, C)).to(tokens)
    queries[:, q, q] = 64
    mask = torch.rand(batch, M * N, device="cuda") < 5 / 6
    mask[samples, pointed] = True
    expected = torch.zeros_like(tokens)
    expected[samples, pointed] = grad
    leaves = queries.requires_grad_(), tokens.view(batch, M, N, C).requires_grad_()
    with ops.use_backend("cuda"):
        z = ops.attend_masked(*leaves, mask.view(batch, M, N))
        of_queries, of_tokens = torch.autograd.grad(z, leaves, grad)
    assert torch.equal(z, tokens[samples, pointed])
    assert torch.equal(of_tokens.view_as(expected), expected)
    assert (of_queries == 0).all()


def test_the_automatic_choice_on_a_gpu_is_cuda():
    tensor = torch.zeros(1, device="cuda")
    assert next(ops.dispatch._candidates("gramian", tensor, None)) == "cuda"


def test_the_native_core_has_nothing_against_this_gpu():
    assert core.native().probe(torch.cuda.current_device()) is None
    assert core.native().probe(torch.cuda.device_count()).startswith("invalid device ordinal")
    assert core.unavailable_reason(start=True) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_lose_nothing_though_tf32_is_allowed(dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    features = torch.randn(90, 700, device="cuda").to(dtype)
    expected = torch.cdist(features.double(), features.double()).square().float()
    for distances in (SquaredDistances(features)(features), distances_within(features)):
        torch.testing.assert_close(distances, expected, rtol=1e-5, atol=1e-2)  # of about 1,400


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_same_to_the_bit_on_every_run(op, dtype, example, kernels):
    case = example(op, dtype)
    first = case.run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(case.run(), first, strict=True))


def test_runs_on_the_current_stream_forward_and_backward(op, example, kernels, assert_equals_oracle):
    """The inputs are written on that stream behind a long wait: another stream would read them too early."""
    case, ready = example(op), example(op, seed=1)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for leaf, value in zip(case.leaves, ready.leaves, strict=True):
            leaf.copy_(value)
        results = case.run()
    stream.synchronize()
    assert_equals_oracle(ready, results)


def test_backward_runs_on_the_stream_of_its_forward(op, example, kernels, assert_equals_oracle):
    case = example(op)
    if case.backward is None:
        pytest.skip("has no backward")
    leaves = [x.detach().requires_grad_() for x in case.leaves]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output = case.call(*leaves)
        grad = case.grad_of(output)
        torch.cuda._sleep(100_000_000)
        late = torch.zeros_like(grad).copy_(grad)
    stream_grads = torch.autograd.grad(output, leaves, late)  # called where the default stream is current
    torch.cuda.synchronize()
    assert_equals_oracle(case, [output.detach(), *stream_grads])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tensor_on_another_device_than_the_current_one(op, example, kernels, assert_equals_oracle):
    case = example(op, device="cuda:1")
    with torch.cuda.device(0):
        results = case.run()
        assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_equals_oracle(case, results)


def test_a_captured_graph_serves_new_inputs(op, example, kernels, assert_equals_oracle):
    case, new = example(op), example(op, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        grad = case.grad_of(case.call(*case.leaves))
        for _ in range(3):
            case.run(grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.run(grad)
    for leaf, value in zip(case.leaves, new.leaves, strict=True):
        leaf.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert_equals_oracle(new, results)


@pytest.mark.parametrize("backend", ["auto", "reference", "cuda", "triton"])
def test_a_training_step_never_waits_for_the_device(tiny_config, backend):
    config = tiny_config()
    model = signal_reid.build_model(config, num_identities=4, num_cameras=2).cuda().train()
    images = torch.randn(8, 3, 3, 64, 64, device="cuda")
    labels, cameras = torch.arange(8, device="cuda") // 2, torch.zeros(8, dtype=torch.int64, device="cuda")

    def step():
        with ops.use_backend(backend):
            total_loss(model.losses(model.encode(images, cameras), labels), config).backward()

    step()  # the first call loads libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_training_gives_the_reference_s_loss_and_gradients(tiny_config, backend):
    config = tiny_config()
    torch.manual_seed(0)
    model = signal_reid.build_model(config, num_identities=4, num_cameras=2).cuda().train()
    images = torch.randn(8, 3, 3, 64, 64, device="cuda")
    labels = torch.arange(8, device="cuda") // 2
    found = []
    for name in ("reference", backend):
        model.zero_grad()
        with ops.use_backend(name):
            loss = total_loss(model.losses(model.encode(images), labels), config)
            loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for expected, got in zip(*found, strict=True):
        assert (got - expected).abs().max() <= 1e-3 * expected.abs().max().clamp_min(1e-3)


def test_compiles_without_a_graph_break(example, kernels, assert_equals_oracle):
    case = example("deformable_sample")
    case.call = torch.compile(case.call, fullgraph=True)
    assert_equals_oracle(case, case.run())


def test_cuda_selects_among_as_many_tokens_as_shared_memory_holds_and_refuses_one_more():
    M, C, native = 8, 64, core.native()
    limit = native.shared_bytes_per_block(torch.cuda.current_device())
    N = sum(native.select_tokens_shared_bytes(M=M, N=n, C=C, dtype=0) <= limit for n in range(1, 2048))
    assert 1 < N < 2047
    tokens, query = torch.randint(-2, 3, (1, M, N + 1, C), device="cuda").float(), torch.ones(1, M, C, device="cuda")
    fitting = tokens[:, :, :N], query, query, 10, 20
    with ops.use_backend("reference"):
        expected = ops.select_tokens(*fitting)
    with ops.use_backend("cuda"):
        assert torch.equal(ops.select_tokens(*fitting), expected)
        with pytest.raises(ops.BackendError, match="of shared memory"):
            ops.select_tokens(tokens, query, query, 10, 20)


def test_more_than_shared_memory_holds_is_refused_by_cuda_and_served_by_triton():
    tokens, query = torch.randn(1, 8, 1024, 64, device="cuda"), torch.randn(1, 8, 64, device="cuda")
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="shared memory"):
        ops.select_tokens(tokens, query, query, 10, 20)
    with ops.use_backend("triton"):
        expected = ops.select_tokens(tokens, query, query, 10, 20)
    assert torch.equal(ops.select_tokens(tokens, query, query, 10, 20), expected)


def test_cuda_and_triton_select_the_same_to_the_bit_where_sums_are_exact(example):
    masks = []
    for backend in ("cuda", "triton"):
        with ops.use_backend(backend):
            masks += example("select_tokens", torch.bfloat16).run()
    assert torch.equal(*masks)


@pytest.mark.rehearsed
def test_volume_and_gradient_stay_finite_where_vectors_coincide(kernels, device):
    vector = torch.nn.functional.normalize(torch.randn(4, 512, device=device), dim=1)
    leaves = [vector.clone().requires_grad_() for _ in range(3)]
    volume = ops.gramian_volume(*leaves)
    volume.sum().backward()
    assert volume.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
