"""The benchmark of a whole evaluation runs the model once for a set that is query and gallery, and checks first."""

import json

import pytest
import torch

import signal_reid

SMALL = ["--items", "64", "--batch", "40", "--runs", "1", "--warmup", "0", "--device", "cpu", "--threads", "1"]
SMALL += ["--same-process"]  # where the authors' code is replaced
TINY = ["model.backbone.layers=1", "model.k_intra=4", "data.image_size=[64,64]", "model.local_alignment=false"]
TINY += ["model.backbone.width=48", "model.backbone.heads=3", "model.backbone.output_dim=32"]


@pytest.fixture
def evaluation(script, monkeypatch):
    module = script("evaluation")
    monkeypatch.setattr(module, "configuration", lambda args: signal_reid.load_config(args.config, TINY))
    return module


@pytest.fixture
def theirs(evaluation, monkeypatch):
    """Features and metrics of ours in the authors' place; the features times `factor`."""

    class Theirs:
        factor = map_factor = 1.0
        runs = 0

        def __init__(self, ours, args):
            self.ours = ours

        def forward(self, precision, count):
            items = self.ours.first(count).features(precision)
            return [(items.features * self.factor, items)]

        def run(self, precision):
            Theirs.runs += 1
            return self.ours.run(precision).mAP, None

        def measure(self, query, gallery):
            assert query is gallery  # the check runs the model once
            return self.ours.measure(query[0][1]).mAP * Theirs.map_factor, None

    monkeypatch.setattr(evaluation, "upstream_side", Theirs)
    return Theirs


def test_every_precision_is_a_row(evaluation, tmp_path):
    out = tmp_path / "out.json"
    assert evaluation.main([*SMALL, "--precision", "fp32", "bf16", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["evaluation"] for row in rows] == ["ours fp32", "ours bf16"]
    assert all(row["p50_ms"] > 0 and row["items"] == 64 for row in rows)


def test_the_authors_are_timed_in_fp32_and_in_the_precisions_asked_for(evaluation, theirs, tmp_path):
    out = tmp_path / "out.json"
    assert evaluation.main([*SMALL, "--precision", "bf16", "--upstream", "there", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["evaluation"] for row in rows] == ["upstream fp32", "upstream bf16", "ours bf16"]
    assert min(rows[-1]["speedup"], rows[-1]["same_precision"]) > 0
    assert theirs.runs == 2  # a round of each


def test_the_authors_side_can_be_timed_in_fp32_alone(evaluation, theirs, tmp_path):
    out = tmp_path / "out.json"
    options = ["--precision", "bf16", "--upstream", "there", "--upstream-precision", "--json", str(out)]
    assert evaluation.main([*SMALL, *options]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["evaluation"] for row in rows] == ["upstream fp32", "ours bf16"]
    assert rows[-1]["speedup"] > 0
    assert "same_precision" not in rows[-1]


def test_the_first_batches_hold_matches(evaluation):
    """The check measures these alone, however many triplets there are."""
    args = evaluation.parse(["--items", "836", "--batch", "64"])
    first, *_ = evaluation.make_batches(evaluation.configuration(args), args)
    assert first.labels.unique(return_counts=True)[1].tolist() == [4] * 16


@pytest.mark.parametrize(
    ("what", "factor", "message"),
    [("factor", 1.001, "features: relative error"), ("map_factor", 0.5, "mAP differs by")],
)
def test_other_results_are_reported_without_a_time(evaluation, theirs, capsys, what, factor, message):
    setattr(theirs, what, factor)
    assert evaluation.main([*SMALL, "--upstream", "there"]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}")
    assert "_ms" not in output.out


def test_their_side_runs_queries_and_gallery(evaluation):
    seen = []

    def model(images, cam_label, view_label, training, sge):
        seen.append((len(cam_label), training, sge, sorted(images)))
        return images["RGB"].flatten(1)

    class Metrics:
        def camera(self, results, num_query, reranking):
            return sum(len(result[0]) for result in results), num_query

    images = {name: torch.ones(3, 2) for name in ("RGB", "NI", "TI")}
    batch = evaluation.Batch(None, *[torch.arange(3)] * 4)
    theirs = evaluation.Theirs(model, Metrics(), [(images, batch)] * 2, torch.device("cpu"), "stage")
    assert theirs.run("fp32") == (12, 6)
    assert seen == [(3, False, "stage", ["NI", "RGB", "TI"])] * 4


def test_sets_too_small_for_their_metrics_are_refused(evaluation, capsys):
    assert evaluation.main([*SMALL, "--items", "63"]) == 2
    assert capsys.readouterr().err == "error: --items must be at least 64, got 63\n"


def test_their_side_has_a_process_of_its_own_on_a_cpu(evaluation, capsys, tmp_path):
    options = [option for option in SMALL if option != "--same-process"]
    assert evaluation.main([*options, "--layers", "1", "--upstream", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --upstream must name a checkout")
