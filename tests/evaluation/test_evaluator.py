"""A model is run once over what is both query and gallery."""

from dataclasses import replace

import pytest
import torch

from signal_reid.config import load_config
from signal_reid.data import open_dataset
from signal_reid.data.synthetic import synthesize
from signal_reid.evaluation import RerankingParameters, expanded_queries, retrieval_metrics
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.runtime.errors import InputError


class Corner(torch.nn.Module):
    """Features of a few pixels; counts the triplets it has seen."""

    seen = 0

    def forward(self, images, cameras):
        self.seen += len(images)
        return images[:, :, :, ::8, ::8].flatten(1)


COUNTS = {"train_identities": 2, "test_identities": 3, "images_per_identity": 4, "cameras": 2}


def make_config(name, root, **evaluation):
    data = {"dataset": name, "root": str(root), "image_size": [64, 32], "workers": 0}
    model = {"selective_interaction": False, "local_alignment": False}
    return load_config({"model": model, "data": data, "evaluation": evaluation})


@pytest.mark.parametrize(("name", "shared"), [("rgbnt201", True), ("msvr310", False)])
def test_query_and_gallery_are_one_set_where_the_dataset_says_so(name, shared, tmp_path):
    root = synthesize(name, tmp_path / "data", **COUNTS, image_size=(64, 32))
    config = make_config(name, root, protocol="camera" if name == "rgbnt201" else "scene")
    dataset, corner = open_dataset(name, root), Corner()
    evaluation = Evaluator(config, dataset, torch.device("cpu")).run(corner)
    assert (evaluation.query is evaluation.gallery) == shared
    assert evaluation.query.identities.tolist() == [sample.identity for sample in dataset.query]
    assert evaluation.gallery.identities.tolist() == [sample.identity for sample in dataset.gallery]
    assert corner.seen == len({*dataset.query, *dataset.gallery})


def only_first_camera(samples):
    return [sample for sample in samples if sample.camera == 0]


@pytest.mark.parametrize(
    ("evaluation", "change", "message"),
    [
        ({}, {"query": only_first_camera, "gallery": only_first_camera}, "no query has a match .*camera protocol"),
        ({}, {"gallery": lambda samples: []}, "gallery must hold at least one item"),
        ({"protocol": "scene"}, {}, "protocol scene needs scenes, and the query set has none"),
        ({"reranking": True, "k1": 25}, {}, r"k1 must be in 1\.\.23 for 12 queries and 12 gallery items, got 25"),
        ({"reranking": True, "k1": 3, "k2": 25}, {}, r"k2 must be in 1\.\.24"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_runs(evaluation, change, message, tmp_path):
    root = synthesize("rgbnt201", tmp_path / "data", **COUNTS, image_size=(64, 32))
    dataset = open_dataset("rgbnt201", root)
    changed = replace(dataset, **{split: choose(getattr(dataset, split)) for split, choose in change.items()})
    with pytest.raises(InputError, match=message):
        Evaluator(make_config("rgbnt201", root, **evaluation), changed, torch.device("cpu"))


def test_what_is_done_at_test_is_told_apart_from_the_plain_numbers(tmp_path):
    root = synthesize("rgbnt201", tmp_path / "data", **COUNTS, image_size=(64, 32))
    dataset, cpu = open_dataset("rgbnt201", root), torch.device("cpu")
    usual = Evaluator(make_config("rgbnt201", root), dataset, cpu).run(Corner())
    done = {"flip": True, "expansion": 2, "reranking": True, "k1": 3, "k2": 2}
    changed = Evaluator(make_config("rgbnt201", root, **done), dataset, cpu).run(Corner())
    assert usual.plain is None
    assert changed.plain.summary() == usual.metrics.summary()

    mirrored = Evaluator(make_config("rgbnt201", root, flip=True), dataset, cpu).run(Corner())
    flipped = Evaluator(make_config("rgbnt201", root), dataset, cpu).run(
        lambda_of(lambda x, c: Corner()(x.flip(-1), c))
    )
    torch.testing.assert_close(mirrored.query.features, (usual.query.features + flipped.query.features) / 2)
    sets = expanded_queries(mirrored.query, mirrored.gallery, 2), mirrored.gallery
    torch.testing.assert_close(changed.query.features, sets[0].features)
    assert changed.metrics.mAP == retrieval_metrics(*sets, reranking=RerankingParameters(3, 2, 0.3)).mAP
    with pytest.raises(InputError, match=r"evaluation\.expansion must be at most 12 \(gallery items\), got 13"):
        Evaluator(make_config("rgbnt201", root, expansion=13), dataset, cpu)
    with pytest.raises(InputError, match=r"needs evaluation\.normalize=true"):
        make_config("rgbnt201", root, expansion=1, normalize=False)


def lambda_of(function):
    """A module that computes a function."""
    module = torch.nn.Module()
    module.forward = function
    return module
