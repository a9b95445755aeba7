import math

from signal_reid.report.history import (
    best_row,
    epoch_table,
    last_row,
    learning_rate_curves,
    loss_curves,
    part_curves,
    retrieval_curves,
)


def test_losses_go_by_step_with_the_total_first():
    rows = [{"kind": "step", "epoch": 1, "step": s, "gam": 1.0 * s, "total": 2.0 * s} for s in (1, 2)]
    curves = loss_curves(rows, {"gam": "GAM"})
    assert [(curve.label, curve.x, curve.y) for curve in curves] == [("loss", [1, 2], [2, 4]), ("GAM", [1, 2], [1, 2])]


def test_a_run_without_step_rows_shows_the_means_of_its_epochs(history):
    curves = loss_curves([row for row in history if row["kind"] != "step"])
    assert [(curve.label, curve.x) for curve in curves] == [("loss", [2, 4]), ("head 0", [2, 4])]


def test_learning_rate_and_retrieval_go_by_epoch(history):
    assert [(curve.x, curve.y) for curve in learning_rate_curves(history)] == [([1, 2], [3e-4, 1.5e-4])]
    assert [(curve.label, curve.y) for curve in retrieval_curves(history)] == [
        ("mAP", [0.4, 0.8]),
        ("R-1", [0.432, 0.864]),
    ]


def test_numbers_that_are_not_finite_are_not_drawn(history):
    history[0]["total"] = math.nan
    assert loss_curves(history)[0].x == [2, 3, 4]
    for value in (None, 1e308):  # at which an axis overflows
        history[1]["total"] = value
        assert loss_curves(history)[0].x == [3, 4]


def test_nothing_gives_no_curves_and_no_rows():
    assert loss_curves([]) == learning_rate_curves([]) == retrieval_curves([]) == []
    assert epoch_table([]) == (["epoch"], [])


def test_the_table_joins_training_and_evaluation_of_an_epoch(history):
    del history[3]
    header, rows = epoch_table(history)
    assert header == ["epoch", "loss", "learning rate", "samples/s", "MFU", "mAP", "R-1"]
    assert rows == [
        ["1", "5.125", "3.00e-04", "201.5", "25.0%", "n/a", "n/a"],
        ["2 (best)", "2.562", "1.50e-04", "201.5", "25.0%", "80.0%", "86.4%"],
    ]


def test_the_best_epoch_is_the_earliest_of_the_highest_mAP_on_what_chose_it():  # noqa: N802 - the field's name
    rows = [{"kind": "eval", "epoch": epoch, "step": epoch, "mAP": mAP} for epoch, mAP in enumerate((0.1, 0.3, 0.3), 1)]
    assert best_row(rows)["epoch"] == 2
    assert best_row([*rows, {"kind": "validation", "epoch": 1, "step": 1, "mAP": 0.2}])["kind"] == "validation"
    assert best_row([]) is None


def test_the_last_evaluation_is_that_of_the_kind_that_chose_the_best(history):
    assert last_row(history)["epoch"] == 2
    assert last_row([*history, {"kind": "validation", "epoch": 1, "step": 2, "mAP": 0.3}])["kind"] == "validation"
    assert last_row([]) is None


def test_what_tells_of_a_loss_is_no_curve_beside_it():
    rows = [{"kind": "step", "epoch": 1, "step": 1, "total": 2.0, "head_0": 2.0, "head_0.accuracy": 0.5}]
    assert [curve.label for curve in loss_curves(rows)] == ["loss", "head 0"]


def test_what_tells_of_losses_is_a_chart_of_its_own_with_a_curve_for_each_loss():
    told = {"head_0.identity": 3.0, "head_0.accuracy": 0.25, "head_1.identity": 2.0, "head_1.accuracy": math.nan}
    rows = [{"kind": kind, "epoch": 1, "step": 1, "total": 2.0, **told} for kind in ("step", "epoch")]
    found = {
        part: [(c.label, c.x, c.y) for c in curves] for part, curves in part_curves(rows, {"head_1": "SIM"}).items()
    }
    assert found == {
        "identity": [("head 0", [1.0], [3.0]), ("SIM", [1.0], [2.0])],
        "accuracy": [("head 0", [1.0], [0.25])],
    }
