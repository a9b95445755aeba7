"""The report of a run: its numbers, its pictures, and a reason for each picture that cannot be."""

from dataclasses import replace
from html import unescape

import pytest
import torch

import signal_reid
from signal_reid.data import open_dataset
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.report import Headline
from signal_reid.report.run_report import report_on_training, save_baselines
from signal_reid.training.run_directory import MetricsLog, RunDirectory


@pytest.fixture
def reported(tiny_config, synthetic, tmp_path):
    """The page of an untrained model, by the overrides of its configuration."""

    def write(*overrides, dataset=lambda found: found):
        config = tiny_config("rgbnt201", f"data.root={synthetic()}", f"output={tmp_path}", *overrides)
        run, samples = RunDirectory(tmp_path), dataset(open_dataset("rgbnt201", config.data.root))
        run.start(config)
        torch.manual_seed(0)
        model = signal_reid.build_model(config, samples.num_train_identities, samples.num_cameras)
        save_baselines(run, [Headline("before", 0.1, 0.2, 0.3, 0.4)])
        numbers = dict(zip(("mAP", "rank1", "rank5", "rank10"), (0.123, 0.2, 0.3, 0.4), strict=True))
        with MetricsLog(run, 0, print) as log:
            log.write("eval", 7, 14, **numbers)
        evaluation = Evaluator(config, samples, torch.device("cpu")).run(model)
        report = report_on_training(run, config, samples, evaluation, model)
        return unescape(report.read_text()), evaluation, samples

    return write


def test_the_report_has_every_query_and_every_picture(reported):
    page, evaluation, dataset = reported()
    for sample in dataset.query:
        assert f"<bdi>{sample.name}</bdi>" in page
    assert page.count("<article") == min(24, evaluation.metrics.num_valid_queries)
    titles = ("Features on a plane", "Similarity of pairs", *(picture.title for picture in model_pictures()))
    assert [title for title in titles if f">{title}</h" not in page] == []
    assert "before" in page
    assert "best epoch (7), chosen on the test set" in page
    assert "12.3" in page
    assert "after training" in page


def model_pictures():
    from signal_reid.methods.registry import METHODS

    return METHODS.get("signal").pictures().values()


def test_a_picture_that_cannot_be_says_why(reported):
    page, _, _ = reported("model.selective_interaction=false", "model.global_alignment=false")
    assert "No picture of tokens: " in page
    assert "No picture of volumes: " in page


def test_a_gallery_too_small_for_a_map_says_so(reported):
    def smaller(found):
        one = [sample for sample in found.query if sample.identity == found.query[0].identity]
        pair = [one[0], next(sample for sample in one if sample.camera != one[0].camera)]
        return replace(found, query=pair, gallery=pair)

    page, _, _ = reported(dataset=smaller)
    assert "a map needs at least 3 samples, got 2" in page
