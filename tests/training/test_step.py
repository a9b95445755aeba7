"""Every way to compute a training step gives the losses of the plain one."""

import types
import warnings

import pytest
import torch

import signal_reid
from signal_reid.runtime.device import Precision
from signal_reid.runtime.distributed import Processes
from signal_reid.training import make_optimizer
from signal_reid.training.clock import StepClock
from signal_reid.training.step import TrainingStep, wants_compile

STEPS = 10


@pytest.fixture(scope="module")
def loss_curve(tiny_config):
    """Losses of 10 steps from one initialisation on one sequence of batches."""

    def run(*overrides, precision="fp32", compiler="aot_eager", device="cpu"):
        config = tiny_config("rgbnt201", "model.backbone.layers=2", *overrides)
        chosen = Precision(precision, torch.device(device))
        torch.manual_seed(0)
        model = signal_reid.build_model(config, num_identities=4, num_cameras=2).to(device).train()
        model.backbone.checkpointing = config.training.gradient_checkpointing
        optimizer, scaler = make_optimizer(model, config.optimizer), chosen.scaler()
        step = TrainingStep(model, config, chosen, scaler, compiler)
        batches = [torch.randn(8, 3, 3, 64, 64) for _ in range(3)]
        labels, cameras = torch.arange(8, device=device) // 2, torch.arange(8, device=device) % 2
        losses = []
        for index in range(STEPS):
            parts = step.forward(batches[index % 3].to(device), cameras, labels)
            optimizer.zero_grad(set_to_none=True)
            step.backward(parts["total"])
            scaler.step(optimizer)
            scaler.update()
            losses.append(parts["total"].item())
        return losses

    return run


@pytest.fixture(scope="module")
def plain(loss_curve):
    return loss_curve()


@pytest.fixture(scope="module")
def plain_bf16(loss_curve):
    return loss_curve(precision="bf16")


OPTIONS = {
    "accumulation": ["training.accumulation=4"],
    "checkpointing": ["training.gradient_checkpointing=true"],
    "both": ["training.accumulation=2", "training.gradient_checkpointing=true"],
    "compiled": ["training.compile=true"],
    "compiled parts": ["training.compile=true", "training.accumulation=2"],
    "compiled checkpointing": ["training.compile=true", "training.gradient_checkpointing=true"],
}


def test_training_has_an_effect(plain):
    assert plain[-1] < 0.9 * plain[0]


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_follows_the_plain_fp32_curve(loss_curve, plain, option):
    assert loss_curve(*OPTIONS[option]) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("option", ["accumulation", "checkpointing", "compiled", "compiled checkpointing"])
def test_each_option_follows_the_bf16_curve_as_closely_as_bf16_follows_fp32(loss_curve, plain, plain_bf16, option):
    noise = max(abs(a - b) for a, b in zip(plain_bf16, plain, strict=True))
    assert noise > 0
    optioned = loss_curve(*OPTIONS[option], precision="bf16")
    assert max(abs(a - b) for a, b in zip(optioned, plain, strict=True)) <= 2 * noise


COMPILED_FOR_A_GPU = {
    "compiled": OPTIONS["compiled"],
    "parts": OPTIONS["compiled parts"],
    "checkpointing": OPTIONS["compiled checkpointing"],
    "graphs": [*OPTIONS["compiled"], "training.cuda_graphs=true"],
    "parts as graphs": [*OPTIONS["compiled parts"], "training.cuda_graphs=true"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("option", COMPILED_FOR_A_GPU)
def test_compiled_for_a_gpu_follows_the_plain_curve(loss_curve, plain, option):
    losses = loss_curve(*COMPILED_FOR_A_GPU[option], compiler="inductor", device="cuda")
    assert losses == pytest.approx(plain, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["compiled", "graphs"])
def test_compiled_for_a_gpu_in_bf16_is_as_close_as_bf16_is(loss_curve, plain, plain_bf16, option):
    noise = max(abs(a - b) for a, b in zip(plain_bf16, plain, strict=True))
    losses = loss_curve(*COMPILED_FOR_A_GPU[option], precision="bf16", compiler="inductor", device="cuda")
    assert max(abs(a - b) for a, b in zip(losses, plain, strict=True)) <= 2 * noise


def broken_compiler(graph, inputs):
    raise RuntimeError("no compiler\nis here")


def broken_for_the_backward(graph, inputs):
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.exc import TorchDynamoException

    def broken(graph, inputs):
        raise TorchDynamoException("no compiler\nis here")

    return aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken)(graph, inputs)


def test_graphs_are_not_pickled_which_can_end_the_process(loss_curve):
    from torch._functorch import config

    if not hasattr(config, "enable_autograd_cache"):
        pytest.skip("this torch caches no graphs")
    seen = []

    def compiler(graph, inputs):
        seen.append(config.enable_autograd_cache)
        return graph.forward

    before = config.enable_autograd_cache
    loss_curve("training.compile=true", compiler=compiler)
    assert seen
    assert not any(seen)
    assert config.enable_autograd_cache == before


def test_what_the_compiler_warns_of_itself_is_not_shown(loss_curve, recwarn):
    def compiler(graph, inputs):
        warnings.warn("TensorFloat32 tensor cores available but not enabled", stacklevel=1)
        warnings.warn_explicit("check is deprecated", FutureWarning, "lowering.py", 1960, "torch._inductor.lowering")
        warnings.warn("of something else", stacklevel=1)
        return graph.forward

    loss_curve("training.compile=true", compiler=compiler)
    assert {str(warning.message) for warning in recwarn} == {"of something else"}


def test_compiling_by_default_falls_back_and_says_why(loss_curve, plain, monkeypatch):
    monkeypatch.setattr("signal_reid.training.step.wants_compile", lambda config, device: True)
    assert loss_curve("training.compile=auto", compiler=broken_compiler) == plain


@pytest.mark.parametrize("compiler", [broken_compiler, broken_for_the_backward])
def test_compiling_that_was_asked_for_fails_in_one_line(loss_curve, compiler):
    with pytest.raises(ValueError, match=r"^torch\.compile failed, --no-compile does without it: .*no compiler$"):
        loss_curve("training.compile=true", compiler=compiler)


def test_an_error_of_the_step_itself_is_not_the_compiler_s(tiny_config):
    config = tiny_config("rgbnt201", "training.compile=true")
    model = signal_reid.build_model(config, num_identities=4, num_cameras=2).train()
    precision = Precision("fp32", torch.device("cpu"))
    step = TrainingStep(model, config, precision, precision.scaler(), "aot_eager")
    with pytest.raises(IndexError, match="index"):
        step.forward(torch.randn(4, 3, 3, 64, 64), torch.full((4,), 7), torch.arange(4) // 2)


def test_every_sample_meets_the_whole_batch_when_it_is_divided(tiny_config):
    """Batch statistics, hardest triplets and volumes of a divided step are those of the whole one, gradients too."""
    gradients = []
    for parts in (1, 2, 8):
        config = tiny_config("rgbnt201", f"training.accumulation={parts}")
        torch.manual_seed(0)
        model = signal_reid.build_model(config, num_identities=4, num_cameras=2).double().train()
        precision = Precision("fp32", torch.device("cpu"))
        step = TrainingStep(model, config, precision, precision.scaler())
        images = torch.randn(8, 3, 3, 64, 64, dtype=torch.float64)
        step.backward(step.forward(images, torch.zeros(8, dtype=torch.long), torch.arange(8) // 2)["total"])
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for divided in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(divided[name], gradient, rtol=1e-6, atol=1e-10, msg=name)


def test_checkpointing_keeps_less(tiny_config):
    def kept(checkpointing):
        model = signal_reid.build_model(tiny_config("rgbnt201", "model.backbone.layers=4"), 4, 2).train()
        model.backbone.checkpointing = checkpointing
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            feature = model(torch.randn(8, 3, 3, 64, 64))
        assert feature.requires_grad  # the graph lives until here
        return sum(sizes.values())

    assert kept(True) < 0.5 * kept(False)


def test_without_alignment_only_class_tokens_have_a_gradient(tiny_config):
    off = ["selective_interaction", "global_alignment", "local_alignment"]
    config = tiny_config("rgbnt201", "training.accumulation=2", *(f"model.{name}=false" for name in off))
    model = signal_reid.build_model(config, num_identities=4, num_cameras=2).train()
    precision = Precision("fp32", torch.device("cpu"))
    step = TrainingStep(model, config, precision, precision.scaler())
    parts = step.forward(torch.randn(8, 3, 3, 64, 64), torch.zeros(8, dtype=torch.long), torch.arange(8) // 2)
    step.backward(parts["total"])
    assert model.backbone.projection.grad.abs().max() > 0


def test_compiling_is_for_gpus_unless_asked_for(tiny_config):
    cpu = torch.device("cpu")
    assert not wants_compile(tiny_config("rgbnt201"), cpu)
    assert wants_compile(tiny_config("rgbnt201", "training.compile=true"), cpu)


def test_cuda_graphs_need_a_gpu(tiny_config):
    with pytest.raises(ValueError, match=r"training\.cuda_graphs needs a GPU and training\.compile, got cpu"):
        wants_compile(tiny_config("rgbnt201", "training.cuda_graphs=true"), torch.device("cpu"))


def test_parts_must_divide_the_batch(tiny_config):
    with pytest.raises(ValueError, match=r"training\.accumulation must divide data\.batch_size \(8\), got 3"):
        tiny_config("rgbnt201", "training.accumulation=3")


def test_laps_add_up_by_name():
    clock = StepClock(torch.device("cpu"))
    for name in ("data", "forward", "data"):
        clock.lap(name)
    laps = clock.seconds()
    assert list(laps) == ["data", "forward"]
    assert all(seconds > 0 for seconds in laps.values())


BACKBONE_ALONE = [f"model.{part}=false" for part in ("selective_interaction", "global_alignment", "local_alignment")]


def test_several_processes_compile_whole_graphs(tiny_config, monkeypatch):
    """PyTorch would split them where a bucket of gradients ends, and lose gradients where `no_grad` is cut in two."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Shared:
        """Runs this process's part where DistributedDataParallel would run it."""

        def __init__(self, model, config, processes, per_sample, losses):
            self.per_sample = per_sample

        def forward(self, images, cameras, labels):
            return self.per_sample(images, cameras)

    monkeypatch.setattr("signal_reid.training.step.SharedStep", Shared)
    buckets = 4096
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", buckets)
    active = types.SimpleNamespace(bucket_bytes_cap=buckets)
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", active)
    config = tiny_config("rgbnt201", "training.compile=true", *BACKBONE_ALONE)
    model = signal_reid.build_model(config, num_identities=4, num_cameras=2).train()
    precision = Precision("fp32", torch.device("cpu"))
    step = TrainingStep(model, config, precision, precision.scaler(), compiler, processes=Processes(0, 2, 0, 2))
    step.forward(torch.randn(4, 3, 3, 64, 64), torch.arange(4) % 2, torch.arange(4) // 2)
    assert len(graphs) == 1
