"""What `signal-reid info --config` prints, against counts of another kind."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import signal_reid
from signal_reid.ops.flops import flop_counter
from signal_reid.training.costs import measure_costs
from signal_reid.training.live_memory import KeptBytes, LiveBytes

CPU = torch.device("cpu")
BATCH = 4


@pytest.fixture(scope="module")
def costs(tiny_config):
    return measure_costs(tiny_config("rgbnt201"), CPU, BATCH, num_identities=6, num_cameras=2, repeats=1)


def module(costs, name):
    return next(module for module in costs.modules if module.name == name)


@pytest.mark.parametrize("name", ["rgbnt201", "rgbnt100", "msvr310"])
def test_a_published_model_says_what_pytorchs_counter_counts(name):
    """At full size, without computing anything: tensors have shapes alone."""
    config = signal_reid.load_config(name)
    with torch.device("meta"):
        model = signal_reid.build_model(config, num_identities=171, num_cameras=4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        images, labels = torch.empty(8, 3, 3, *config.data.image_size), torch.zeros(8, dtype=torch.long)
        with flop_counter() as counter:
            model.losses(model.encode(images, labels), labels)
    assert model.flops() == pytest.approx(counter.get_total_flops() / 8, rel=0.01)


def test_modules_add_up_to_the_model(costs):
    whole = costs.whole
    assert sum(module.parameters for module in costs.modules) == whole.parameters
    steps = [module.training for module in costs.modules]
    for count in ("forward_flops", "backward_flops", "kept_bytes"):
        assert sum(getattr(step, count) for step in steps) == pytest.approx(getattr(whole.training, count), rel=0.01)
    passes = [module.inference.flops for module in costs.modules if module.inference is not None]
    assert sum(passes) == whole.inference.flops


def test_the_backbone_costs_what_it_says(costs, tiny_config):
    backbone = signal_reid.build_model(tiny_config("rgbnt201"), 6, 2).backbone
    cost = module(costs, "backbone")
    assert cost.inference.flops == cost.training.forward_flops == 3 * BATCH * backbone.flops()
    # Twice the forward, but for the gradient of the images, which nothing asks for.
    patches = 2 * backbone.patch_embedding.weight.numel() * 64
    assert cost.training.backward_flops == 2 * cost.training.forward_flops - 3 * BATCH * patches


def test_what_is_for_training_only_does_not_run_in_evaluation(costs):
    assert [module.name for module in costs.modules if module.inference is None] == [
        "heads",
        "interaction_head",
        "global_alignment",
        "local_alignment",
    ]
    assert all(module.training.forward_seconds > 0 for module in costs.modules)


def test_a_module_that_the_model_has_not_is_not_listed(tiny_config):
    config = tiny_config("rgbnt201", "model.selective_interaction=false", "model.local_alignment=false")
    costs = measure_costs(config, CPU, 2, num_identities=6, num_cameras=2, repeats=0)
    assert [module.name for module in costs.modules] == ["backbone", "heads", "global_alignment"]
    assert costs.whole.inference.seconds is None
    assert costs.notes == ()


def test_recomputing_activations_keeps_fewer(costs, tiny_config):
    config = tiny_config("rgbnt201", "training.gradient_checkpointing=true")
    recomputing = measure_costs(config, CPU, BATCH, num_identities=6, num_cameras=2, repeats=0)
    kept = [module(each, "backbone").training.kept_bytes for each in (recomputing, costs)]
    assert 0 < kept[0] < kept[1] / 2


def test_memory_that_two_layers_keep_counts_once_and_for_the_first():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    with KeptBytes(model, [x]) as kept:
        model(x).square().sum()
    # The ReLU keeps its output, which the layer after it takes; the square keeps the last layer's output.
    assert dict(kept.by_module) == {"1": 5 * 16 * 4, "": 5 * 4 * 4}


def test_memory_at_once_is_that_of_what_is_still_held():
    x = torch.randn(1000)
    with torch.inference_mode(), LiveBytes(nn.Identity()) as live:
        y = x.exp()  # 1
        z = y.sin() + y.cos()  # 4
        del y
        z = z.view(10, 100).square()  # 2
    assert live.peak == 4 * 4000


@pytest.mark.parametrize(("name", "value"), [("batch", 1), ("identities", 1), ("cameras", 0), ("repeats", -1)])
def test_numbers_that_cannot_be_are_refused(tiny_config, name, value):
    numbers = {"batch": 2, "identities": 2, "cameras": 1, "repeats": 0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        measure_costs(tiny_config("rgbnt201"), CPU, *numbers.values())
