"""What a run directory holds may be damaged; the line that says so names the file."""

import json

import pytest

from signal_reid.report.contents import Headline
from signal_reid.report.run_report import load_baselines, save_baselines
from signal_reid.runtime.errors import InputError
from signal_reid.training.run_directory import MetricsLog, RunDirectory

ROW = {"kind": "step", "epoch": 1, "step": 2, "total": float("nan")}


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "3",
        "[]",
        "null",
        "{}",
        json.dumps({"kind": "step"}),
        json.dumps(ROW | {"epoch": "1"}),
        json.dumps(ROW | {"epoch": -1}),
        json.dumps(ROW | {"epoch": 1e9}),
        json.dumps(ROW | {"step": True}),
        json.dumps(ROW | {"step": 2**70}),
        json.dumps(ROW | {"kind": 3}),
        "[" * 100_000,
        '{"kind": "step", "epoch": ' + "9" * 5000 + "}",
    ],
)
def test_a_line_that_is_no_row_of_metrics_is_named(line, tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: damaged, .*line.* 2") as caught:
        run.rows()
    assert len(str(caught.value).splitlines()) == 1


def test_metrics_are_utf_8_whatever_the_locale(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_bytes(json.dumps({**ROW, "note": "\u00e9"}, ensure_ascii=False).encode() + b"\n")
    assert run.rows()[0]["note"] == "\u00e9"
    run.metrics.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="a line is not JSON"):
        run.rows()


def test_baselines_come_back(tmp_path):
    run, rows = RunDirectory(tmp_path), [Headline("random weights", 0.1, 0.2, 0.3, 0.4)]
    assert load_baselines(run) == []
    save_baselines(run, rows)
    assert load_baselines(run) == rows


@pytest.mark.parametrize(
    "content", ["", "3", "{}x", "[3]", "[{}]", '[{"name": 1}]', "[" * 100_000, "null", '{"a": 1}', "\xff"]
)
def test_damaged_baselines_are_named(content, tmp_path):
    run = RunDirectory(tmp_path)
    run.baselines.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"baselines\.json: damaged"):
        load_baselines(run)
    headline = {"name": "a", "mAP": 0.1, "rank1": 0.1, "rank5": 0.1, "rank10": 0.1}
    for change in ({"name": 3}, {"mAP": "x"}, {"rank1": None}, {"rank5": 10**400}, {"more": 1}):
        run.baselines.write_text(json.dumps([headline | change]))
        with pytest.raises(InputError, match=r"baselines\.json: damaged"):
            load_baselines(run)


def test_a_path_that_is_not_utf_8_does_without_tensorboard(tmp_path):
    run, said = RunDirectory(tmp_path / "caf\udce9"), []
    run.path.mkdir()
    with MetricsLog(run, 0, said.append) as log:
        log.write("step", 1, 1, total=0.5)
    assert run.rows() == [{"kind": "step", "epoch": 1, "step": 1, "total": 0.5}]
    assert len(said) == 1
