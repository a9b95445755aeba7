"""A model is run once over what is both query and gallery."""

import pytest
import torch

from signal_reid.config import load_config
from signal_reid.data import open_dataset
from signal_reid.data.synthetic import synthesize
from signal_reid.evaluation.evaluator import Evaluator


class Corner(torch.nn.Module):
    """Features of a few pixels; counts the triplets it has seen."""

    seen = 0

    def forward(self, images, cameras):
        self.seen += len(images)
        return images[:, :, :, ::8, ::8].flatten(1)


@pytest.mark.parametrize(("name", "shared"), [("rgbnt201", True), ("msvr310", False)])
def test_query_and_gallery_are_one_set_where_the_dataset_says_so(name, shared, tmp_path):
    counts = {"train_identities": 2, "test_identities": 3, "images_per_identity": 4, "cameras": 2}
    root = synthesize(name, tmp_path / "data", **counts, image_size=(64, 32))
    data = {"dataset": name, "root": str(root), "image_size": [64, 32], "workers": 0}
    protocol = "camera" if name == "rgbnt201" else "scene"
    model = {"selective_interaction": False, "local_alignment": False}
    config = load_config({"model": model, "data": data, "evaluation": {"protocol": protocol}})
    dataset, corner = open_dataset(name, root), Corner()
    evaluation = Evaluator(config, dataset, torch.device("cpu")).run(corner)
    assert (evaluation.query is evaluation.gallery) == shared
    assert evaluation.query.identities.tolist() == [sample.identity for sample in dataset.query]
    assert evaluation.gallery.identities.tolist() == [sample.identity for sample in dataset.gallery]
    assert corner.seen == len({*dataset.query, *dataset.gallery})
