"""Learning rates and weight decay of the three published recipes, epoch by epoch, as the authors' code sets them."""

import json

import pytest

import signal_reid
from signal_reid.training import make_optimizer, set_rates
from signal_reid.upstream.parameters import ours_to_authors


@pytest.fixture(scope="module", params=["RGBNT201", "RGBNT100", "MSVR310"])
def recipe(request, golden_directory):
    stored = json.loads((golden_directory / "lr_schedule.json").read_text())[request.param]
    config = signal_reid.load_config(request.param.lower(), ["model.backbone.layers=1"])
    model = signal_reid.build_model(config, num_identities=8, num_cameras=4)
    optimizer = make_optimizer(model, config.optimizer)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = {name: group_of[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    markers = {name: model.get_parameter(name).detach() * 0 + index for index, name in enumerate(groups)}
    names = list(groups)
    authors = {name: groups[names[int(value.flatten()[0])]] for name, value in ours_to_authors(markers).items()}
    return stored, config, optimizer, [authors[name] for name in stored["parameters"]]


def test_learning_rates_of_every_epoch(recipe):
    stored, config, optimizer, groups = recipe
    for epoch, expected in enumerate(stored["lr_by_epoch_from_1"], start=1):
        set_rates(optimizer, epoch, config.optimizer.base_rate, config.schedule)
        assert [group["lr"] for group in groups] == pytest.approx(expected, rel=1e-6), f"epoch {epoch}"


def test_weight_decay(recipe):
    stored, _, _, groups = recipe
    assert [group["weight_decay"] for group in groups] == pytest.approx(stored["weight_decay"])


def test_groups_are_merged_by_rate(recipe):
    _, _, optimizer, _ = recipe
    rates = [group["base_rate"] for group in optimizer.param_groups]
    assert len(rates) == len(set(rates)) <= 4
