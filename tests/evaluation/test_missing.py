"""Missing modalities against an evaluation for each setting, written from its definition."""

import re

import numpy as np
import pytest
import torch

import signal_reid
from signal_reid.data import Augmentation, make_eval_loader, open_dataset
from signal_reid.evaluation import FeatureSet, retrieval_metrics
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.evaluation.missing import MissingEvaluator, Setting, field_settings, parse_settings, subsets
from signal_reid.methods.base import Encoded

NAMES = ("RGB", "NI", "TI")
CPU = torch.device("cpu")
SOME = ("query=RGB", "gallery=NI,TI", "query=TI;gallery=NI,TI", "query=NI,TI;gallery=RGB", "query=NI;gallery=RGB,TI")
"""Of any-to-any: shared modalities and none, one and two on a side."""


@pytest.fixture(scope="module")
def subject(tiny_config, synthetic):
    """A model, its configuration and the images of its data set."""
    config = tiny_config("rgbnt201", f"data.root={synthetic()}", "evaluation.batch_size=5")
    dataset = open_dataset("rgbnt201", config.data.root)
    torch.manual_seed(0)
    model = signal_reid.build_model(config, 5, dataset.num_cameras).eval()
    with torch.no_grad():  # cameras that differ, so that whose zero image it is makes a difference
        model.backbone.camera_embedding.normal_(std=2.0)
    whole = tiny_config("rgbnt201", f"data.root={synthetic()}")
    (batch,) = make_eval_loader(whole, dataset.query, CPU)
    return config, dataset, model, batch


def changed(config, **evaluation):
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})


def with_zero_images(model, config, batch, present):
    """Features of samples whose absent images are black after normalisation, by a run of the backbone of their own."""
    images = Augmentation(config.data).normalize(batch.images)
    for index in range(3):
        if index not in present:
            images[:, index] = 0
    with torch.no_grad():
        return model(images, batch.cameras)


def naive_parts(model, config, batch, present):
    """Class token and row of the interaction of each present modality: a list of (B, 2C), by modality."""
    images = Augmentation(config.data).normalize(batch.images)
    with torch.no_grad():
        tokens, cls = model.encode(images, batch.cameras)
        for index in set(range(3)) - set(present):
            tokens[:, index], cls[:, index] = 0, 0
        rows = model.selective_interaction(tokens, cls).unflatten(1, (3, -1))
    return {index: torch.cat([cls[:, index], rows[:, index]], dim=1) for index in present}


def measured(batch, query, gallery):
    labels = (batch.labels, batch.cameras)
    return retrieval_metrics(FeatureSet(query, *labels), FeatureSet(gallery, *labels))


def test_all_settings_are_those_of_the_field():
    assert [[NAMES[i] for i in range(3) if i not in s.query] for s in field_settings(3)] == [
        ["RGB"],
        ["NI"],
        ["TI"],
        ["RGB", "NI"],
        ["RGB", "TI"],
        ["NI", "TI"],
    ]
    assert all(setting.query == setting.gallery for setting in field_settings(3))
    assert len(field_settings(2)) == 2
    assert field_settings(1) == []
    assert len(parse_settings(["any-to-any"], NAMES)) == len(subsets(3)) ** 2 == 49


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("RGB,TI", Setting((1,), (1,))),
        ("query=TI", Setting((0, 1), (0, 1, 2))),
        ("gallery=NI , TI", Setting((0, 1, 2), (0,))),
        ("query=RGB;gallery=NI,TI", Setting((1, 2), (0,))),
    ],
)
def test_a_setting_names_what_is_missing(text, setting):
    assert parse_settings([text, text], NAMES) == [setting]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("IR", "missing must name modalities of RGB, NI, TI, got 'IR'"),
        ("RGB,NI,TI", "missing must leave at least one of RGB, NI, TI, got 'RGB,NI,TI'"),
        ("probe=RGB", "missing must be all, any-to-any, NAME,... or query=NAME,...;gallery=NAME,..., got 'probe=RGB'"),
        ("", "missing must name modalities of RGB, NI, TI, got ''"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_settings([text], NAMES)


def test_images_of_zeros_give_what_a_run_for_each_setting_gives(subject):
    config, dataset, model, batch = subject
    settings = parse_settings(["all", *SOME], NAMES)
    table = MissingEvaluator(config, dataset, settings, CPU).run(model)
    assert [setting for setting, _ in table.rows] == settings
    features = {present: with_zero_images(model, config, batch, present) for present in subsets(3)}
    for setting, metrics in table.rows:
        expected = measured(batch, features[setting.query], features[setting.gallery])
        np.testing.assert_allclose(metrics.average_precision, expected.average_precision, atol=1e-9)
    six = [dict(table.rows)[setting].summary() for setting in field_settings(3)]
    assert table.mean == pytest.approx({name: np.mean([row[name] for row in six]) for name in six[0]})


def test_present_parts_are_compared_alone(subject):
    config, dataset, model, batch = subject
    settings = parse_settings(["RGB", "RGB,NI", *SOME], NAMES)
    table = MissingEvaluator(changed(config, absent="present"), dataset, settings, CPU).run(model)
    parts = {present: naive_parts(model, config, batch, present) for present in subsets(3)}
    for (query, gallery), metrics in table.rows:
        shared = sorted(set(query) & set(gallery))
        if shared:
            sides = [torch.cat([parts[side][index] for index in shared], dim=1) for side in (query, gallery)]
        else:
            sides = [sum(parts[side].values()) / len(side) for side in (query, gallery)]
        np.testing.assert_allclose(metrics.average_precision, measured(batch, *sides).average_precision, atol=1e-9)


def test_without_cameras_a_query_is_not_matched_with_itself(subject):
    config, dataset, model, batch = subject
    assert dataset.query == dataset.gallery
    asked = parse_settings(["query=NI,TI", "TI"], NAMES)
    table = MissingEvaluator(changed(config, protocol="none"), dataset, asked, CPU).run(model)
    for (query, gallery), metrics in table.rows:
        labels = (batch.labels, batch.cameras, None, torch.arange(len(batch.labels)))
        sides = [FeatureSet(with_zero_images(model, config, batch, side), *labels) for side in (query, gallery)]
        expected = retrieval_metrics(*sides, "none")
        np.testing.assert_allclose(metrics.average_precision, expected.average_precision, atol=1e-9)


@pytest.mark.parametrize("absent", ["zeros", "present"])
def test_what_lacks_nothing_is_the_plain_evaluation_bit_for_bit(subject, absent):
    config, dataset, model, _ = subject
    plain = Evaluator(config, dataset, CPU).run(model)
    table = MissingEvaluator(changed(config, absent=absent, reranking=True), dataset, field_settings(3), CPU).run(model)
    assert torch.equal(table.complete.query.features, plain.query.features)
    assert table.complete.metrics.summary() == plain.metrics.summary()


def test_the_backbone_runs_once_whatever_is_missing(subject, monkeypatch):
    config, dataset, model, _ = subject
    seen, whole = [], model.backbone.forward

    def counting(images, cameras):
        seen.append(len(images))
        return whole(images, cameras)

    monkeypatch.setattr(model.backbone, "forward", counting)
    MissingEvaluator(config, dataset, parse_settings(["all", *SOME], NAMES), CPU).run(model)
    assert sum(seen) == 3 * (len(dataset.query) + dataset.num_cameras)


def test_a_method_that_mixes_modalities_is_run_for_each_subset(subject, monkeypatch):
    config, dataset, model, batch = subject
    apart = model.encode

    def mixing(images, cameras=None):
        tokens, cls = apart(images, cameras)
        return Encoded(tokens, cls + cls.mean(1, keepdim=True))

    monkeypatch.setattr(type(model), "encodes_modalities_apart", False)
    monkeypatch.setattr(model, "encode", mixing)
    ((_, metrics),) = MissingEvaluator(config, dataset, parse_settings(["NI"], NAMES), CPU).run(model).rows
    feature = with_zero_images(model, config, batch, (0, 2))
    np.testing.assert_allclose(
        metrics.average_precision, measured(batch, feature, feature).average_precision, atol=1e-9
    )


def test_a_feature_without_parts_is_compared_whole_or_not_at_all(subject, monkeypatch):
    config, dataset, model, _ = subject
    monkeypatch.setattr(type(model), "feature_columns", lambda self: None)
    with pytest.raises(ValueError, match="the feature of Signal has no parts by modality"):
        MissingEvaluator(changed(config, absent="present"), dataset, field_settings(3), CPU).run(model)
