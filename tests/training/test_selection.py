"""What the best epoch is chosen on, and that the log and the report say so."""

import io
import json
import shutil

import pytest
from rich.console import Console

import signal_reid
from signal_reid.report.history import choosing, epoch_table, retrieval_curves
from signal_reid.report.run_report import facts_of
from signal_reid.training.loop import train
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.setup import prepare


@pytest.fixture(scope="module")
def make_config(tiny_config, synthetic, tmp_path_factory):
    output = tmp_path_factory.mktemp("honest") / "run"

    def make(*overrides):
        fixed = (f"data.root={synthetic()}", f"output={output}", "data.batch_size=4", "schedule.epochs=2")
        return tiny_config("rgbnt201", *fixed, "schedule.warmup_epochs=0", *overrides)

    return make


@pytest.fixture(scope="module")
def honest(make_config):
    """A run with identities held out: its configuration, its result, its rows and what it said."""
    config, said = make_config("training.validation=0.4", "training.validation_seed=1"), io.StringIO()
    result = train(config, console=Console(file=said, width=400))
    return config, result, RunDirectory(config.output).rows(), said.getvalue()


def test_the_best_epoch_is_that_of_the_held_out_identities(honest):
    _, result, rows, _ = honest
    measured = {row["epoch"]: row["mAP"] for row in rows if row["kind"] == "validation"}
    assert list(measured) == [1, 2]
    assert (result.best_mAP, result.best_epoch) == (measured[result.best_epoch], max(measured, key=measured.get))
    assert result.dataset.num_train_identities == result.model.num_identities == 3


def test_the_test_set_is_measured_once_with_the_chosen_weights(honest):
    config, result, rows, _ = honest
    ((row,)) = [row for row in rows if row["kind"] == "eval"]
    best = signal_reid.evaluate(RunDirectory(config.output).best).metrics
    assert row["epoch"] == result.best_epoch
    assert row["mAP"] == result.evaluation.metrics.mAP == best.mAP
    assert rows[-1] == row


def test_the_log_and_the_report_name_what_chose(honest, make_config, tmp_path):
    config, result, rows, said = honest
    assert "the best epoch is chosen on 8 triplets of 2 held-out training identities" in said
    assert "held-out training identities (40%)" in dict(facts_of(result.dataset, config))["best epoch"]
    assert choosing(rows) == "validation"
    assert [curve.x for curve in retrieval_curves(rows)] == [[1, 2], [1, 2]]
    assert len(epoch_table(rows)[1]) == 2

    said, usual = io.StringIO(), make_config(f"output={tmp_path / 'usual'}")
    training = prepare(usual, False, Console(file=said, width=400))
    assert training.validator is None
    assert "the best epoch is chosen on the test set, as the published numbers do" in said.getvalue()
    assert (
        dict(facts_of(training.dataset, usual))["best epoch"] == "chosen on the test set, as the published numbers do"
    )


def test_what_is_held_out_stays_so_on_resume(honest, make_config):
    run = RunDirectory(honest[0].output)
    with pytest.raises(ValueError, match=r"training\.validation was 0\.4 in .* and cannot be 0\.0 on resume"):
        run.resume(make_config(), 2, print)


def test_a_run_that_was_killed_before_the_test_set_was_measured_measures_it(honest, make_config, tmp_path):
    config, _, rows, _ = honest
    run = RunDirectory(shutil.copytree(config.output, tmp_path / "killed"))
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows if row["kind"] != "eval"))
    assert not run.finished(2)
    config = make_config("training.validation=0.4", "training.validation_seed=1", f"output={run.path}")
    train(config, resume=True, console=Console(quiet=True))
    assert run.rows() == rows
    assert run.finished(2)
    with pytest.raises(ValueError, match="is finished: epoch 2 of 2"):
        train(config, resume=True, console=Console(quiet=True))


def test_held_out_images_of_a_packed_data_set_are_decoded(make_config, tmp_path, monkeypatch):
    """The packed file holds training images as training resizes them."""
    seen = []
    monkeypatch.setattr("signal_reid.training.setup.make_train_loader", lambda *_, **__: [])
    monkeypatch.setattr("signal_reid.training.setup.Evaluator", lambda config, *_, **__: seen.append(config.data.cache))
    config = make_config("training.validation=0.4", "data.cache=packed", f"output={tmp_path / 'run'}")
    prepare(config, False, Console(quiet=True))
    assert seen == ["packed", "none"]
