"""The report of a run: its numbers, its pictures, and a reason for each picture that cannot be."""

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

import signal_reid
from signal_reid import program
from signal_reid.config import dump_config
from signal_reid.data import Dataset, open_dataset
from signal_reid.evaluation import FeatureSet
from signal_reid.evaluation.evaluator import Evaluation, Evaluator, measure
from signal_reid.methods.signal.pictures.attention import Attention
from signal_reid.methods.signal.pictures.offsets import Offsets
from signal_reid.methods.signal.pictures.tokens import Tokens
from signal_reid.methods.signal.pictures.volumes import VolumesPicture
from signal_reid.report import Headline
from signal_reid.report.model_pictures import feature_pictures
from signal_reid.report.request import USUAL, PageRequest
from signal_reid.report.run_report import report_on_training, save_baselines
from signal_reid.runtime.errors import InputError
from signal_reid.training.run_directory import MetricsLog, RunDirectory
from signal_reid.upstream.parameters import ours_to_authors


@pytest.fixture
def reported(tiny_config, synthetic, tmp_path):
    """The page of an untrained model, by the overrides of its configuration."""

    def write(*overrides, request=USUAL):
        config = tiny_config("rgbnt201", f"data.root={synthetic()}", f"output={tmp_path}", *overrides)
        run, samples = RunDirectory(tmp_path), open_dataset("rgbnt201", config.data.root)
        run.start(config)
        torch.manual_seed(0)
        model = signal_reid.build_model(config, samples.num_train_identities, samples.num_cameras)
        save_baselines(run, [Headline("before", 0.1, 0.2, 0.3, 0.4)])
        numbers = dict(zip(("mAP", "rank1", "rank5", "rank10"), (0.123, 0.2, 0.3, 0.4), strict=True))
        with MetricsLog(run, 0, print) as log:
            log.write("eval", 7, 14, **numbers)
        evaluation = Evaluator(config, samples, torch.device("cpu")).run(model)
        report = report_on_training(run, config, samples, evaluation, model, request)
        return unescape(report.read_text()), evaluation, samples

    return write


def test_the_report_has_every_query_and_every_picture(reported):
    page, evaluation, dataset = reported()
    for sample in dataset.query:
        assert f"<bdi>{sample.name}</bdi>" in page
    assert page.count("<article") == min(24, evaluation.metrics.num_valid_queries)
    of_queries = [picture.title for picture in (Tokens, Attention)]
    of_queries = [f"{title}, {when} training" for title in of_queries for when in ("before", "after")]
    titles = ("Features on a plane", "Similarity of pairs", Offsets.title, VolumesPicture.title, *of_queries)
    assert [title for title in titles if f">{title}</h" not in page] == []
    assert "Before training: as training began: random weights of training.seed=1234." in page
    assert [name for name in ("before", "after training") if f'<th scope="row">{name}</th>' not in page] == []
    assert "best epoch (7), chosen on the test set" in page
    assert "12.3" in page


@pytest.fixture
def lacking(reported):
    """The page of a model without two of its modules and without the weights that its training began with."""
    modules = ("model.selective_interaction=false", "model.global_alignment=false")
    request = PageRequest(count=2, top=3, order="worst", limit=2)
    return reported(*modules, "model.backbone.weights=/nowhere/clip.pt", request=request)


def test_a_picture_that_cannot_be_says_why(lacking, tmp_path):
    page, evaluation, dataset = lacking
    assert "No picture of tokens: " in page
    assert "No picture of volumes: " in page
    assert "is not shown, as model.backbone.weights=/nowhere/clip.pt is not on this machine: " in page
    assert f"signal-reid report {tmp_path} --before FILE" in page
    # as many lists and items as were asked for, the worst first
    worst = np.argsort(evaluation.metrics.average_precision, kind="stable")[:2]
    listed = re.findall(r'<article .*?data-name="(.*?)"', page)
    assert listed == [dataset.query[i].name for i in worst]
    assert page.count('<li class="item') == 2 * 3
    assert "Shifts of 2 samples" in page


def test_a_gallery_too_small_for_a_map_says_so(tiny_config):
    config, labels = tiny_config(), torch.tensor([0, 0])
    pair = FeatureSet(torch.eye(2), labels, torch.tensor([0, 1]))
    (shown,) = feature_pictures(
        Evaluation(pair, pair, measure(pair, pair, config)), config, Dataset("", Path(), [], [], [], ())
    )
    assert shown.notes == ["There is no such picture: a map needs at least 3 samples, got 2."]


def test_the_authors_weights_have_a_page_without_a_run(tiny_config, synthetic, tmp_path, monkeypatch):
    config = tiny_config("rgbnt201", f"data.root={synthetic()}")
    (tmp_path / "config.yml").write_text(dump_config(config))
    state = signal_reid.build_model(config, 5, 2).state_dict()
    torch.save(dict(ours_to_authors(state)), tmp_path / "Signalbest.pth")
    request = PageRequest(queries=("000006_cam1_0002",), limit=1, before="pretrained")
    path = program.report_weights(tmp_path / "Signalbest.pth", request=request)
    page = unescape(path.read_text())
    assert path.name == "Signalbest.html"
    monkeypatch.setattr(program, "Evaluator", None)
    with pytest.raises(InputError, match=r"no query is named 'nobody'; such as 000006_cam1_0000\.jpg"):
        program.report_weights(tmp_path / "Signalbest.pth", request=PageRequest(queries=("nobody",)))
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        program.report_weights(tmp_path / "Signalbest.pth", request=PageRequest(before="absent.pth"))
    assert f"{len(state)} entries loaded (authors naming)" in page
    assert re.findall(r'<article .*?data-name="(.*?)"', page) == ["000006_cam1_0002.jpg"]
    assert f">{Tokens.title}, before training</h" in page
    assert [word for word in ('id="training"', "best epoch", "after training</th>") if word in page] == []


@pytest.mark.parametrize("name", ["count", "top", "limit", "size_limit"])
def test_a_page_of_less_than_one_is_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        PageRequest(**{name: 0})
