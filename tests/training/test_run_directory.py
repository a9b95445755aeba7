"""The directory of a run: what is read back, what damage costs, and what is on the disk first."""

import json
import os

import pytest

from signal_reid.config import dump_config
from signal_reid.report.contents import Headline
from signal_reid.report.run_report import load_baselines, save_baselines
from signal_reid.runtime.errors import InputError
from signal_reid.training import loop
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
        json.dumps(ROW | {"total": "2.0"}),
        json.dumps(ROW | {"mAP": [0.5]}),
        json.dumps(ROW | {"mAP": 10**400}),
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
    run.metrics.write_bytes(json.dumps({**ROW, "\u00e9": 1.5}, ensure_ascii=False).encode() + b"\n")
    assert run.rows()[0]["\u00e9"] == 1.5
    run.metrics.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="line 1 is not JSON"):
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


def row(kind, epoch):
    return json.dumps({"kind": kind, "epoch": epoch, "step": 2 * epoch, "total": 1.0})


@pytest.fixture
def run(tiny_config, tmp_path):
    """A run of three epochs."""
    config = tiny_config("rgbnt201", f"output={tmp_path / 'run'}")
    run = RunDirectory(config.output)
    run.start(config)
    run.metrics.write_text("".join(row(kind, epoch) + "\n" for epoch in (1, 2, 3) for kind in ("step", "epoch")))
    return run, config


def resumed(run, config, after_epoch=3):
    said = []
    run.resume(config, after_epoch, said.append)
    return [(row["kind"], row["epoch"]) for row in run.rows()], said


def test_resuming_keeps_what_the_checkpoint_covers(run):
    rows, said = resumed(*run, after_epoch=2)
    assert rows == [("step", 1), ("epoch", 1), ("step", 2), ("epoch", 2)]
    assert said == []


def test_a_finished_run_goes_on_for_more_epochs_and_one_that_is_not_does_not(run):
    run, config = run
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"epochs": 3})})
    run.start(config)
    run.last.touch()
    longer = config.model_copy(update={"schedule": config.schedule.model_copy(update={"epochs": 5})})
    with pytest.raises(InputError, match=r"schedule\.epochs was 3 in .* and cannot be 5 on resume"):
        run.resume(longer, 2, print)
    said = []
    run.resume(longer, 3, said.append)
    assert said[-1] == f"{run.path} was finished; epoch 4 has the rate of a schedule of 5 epochs"
    assert not run.last.exists()
    with pytest.raises(InputError, match=r"schedule\.epochs was 5"):
        run.resume(config, 5, print)


BAD = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "empty": b"",
    "no object": b"[1, 2]",
    "no epoch": b'{"kind": "step", "step": 1}',
    "an epoch that is no number": b'{"kind": "step", "epoch": "two", "step": 1}',
    "an epoch that is true": b'{"kind": "step", "epoch": true, "step": 1}',
    "deep": b"[" * 100_000,
    "a huge number": b'{"kind": "step", "step": 1, "epoch": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_a_bad_line_is_named_and_does_not_bar_resuming(run, line):
    run, config = run
    lines = run.metrics.read_bytes().split(b"\n")
    run.metrics.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]))
    with pytest.raises(InputError, match=rf"^{run.metrics}: damaged, line 4 is not .{{1,200}}\)$"):
        run.rows()
    rows, said = resumed(run, config)
    assert len(rows) == 6
    assert len(said) == 1
    assert "line 4" in said[0]
    assert "\n" not in said[0]


def test_of_many_bad_lines_the_first_are_named(run):
    run, config = run
    run.metrics.write_bytes(b"x\n" * 30 + run.metrics.read_bytes())
    rows, said = resumed(run, config)
    assert len(rows) == 6
    assert len(said) == 21
    assert said[-1] == f"{run.metrics}: 10 more lines are damaged; left out"


def test_a_gap_is_named_and_does_not_bar_resuming(run):
    run, config = run
    run.metrics.write_text(row("step", 1) + "\n" + row("epoch", 3) + "\n")
    rows, said = resumed(run, config)
    assert rows == [("step", 1), ("epoch", 3)]
    assert len(said) == 1
    assert "epoch 1, 2 are missing" in said[0]


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ((10, 20, 40, 50, 60, 90, 100), "the numbers of steps between 20 and 40, between 60 and 90 are missing"),
        ((10, 20, 30, 35, 40, 45), None),  # a run that was resumed with another `training.log_every`
        ((5, 10, 20, 30), None),
        ((10,), None),
    ],
)
def test_a_gap_within_an_epoch_is_named(run, steps, named):
    run, config = run
    rows = [json.dumps({"kind": "step", "epoch": 1, "step": step, "total": 0.5}) for step in steps]
    run.metrics.write_text("\n".join([*rows, row("epoch", 1)]) + "\n")
    kept, said = resumed(run, config, after_epoch=1)
    assert len(kept) == len(steps) + 1
    assert said == ([f"{run.metrics}: {named}; the training lacks nothing"] if named else [])


def test_a_lost_file_is_a_gap(run):
    run, config = run
    run.metrics.unlink()
    rows, said = resumed(run, config)
    assert rows == []
    assert "epoch 1, 2, 3" in said[0]


def test_rows_are_on_the_disk_when_flush_returns(run, monkeypatch):
    run, _ = run
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with MetricsLog(run, 6, print) as log:
        log.write("step", 4, 7, total=1.0)
        log.flush()
    assert flushed == [str(run.metrics)]


def test_metrics_are_flushed_before_the_checkpoint_that_covers_them(tiny_config, synthetic, tmp_path, monkeypatch):
    events = []
    write, flush = MetricsLog.write, MetricsLog.flush
    monkeypatch.setattr(
        MetricsLog, "write", lambda log, kind, *a, **n: (events.append(kind), write(log, kind, *a, **n))
    )
    monkeypatch.setattr(MetricsLog, "flush", lambda log: (events.append("flush"), flush(log)))
    monkeypatch.setattr(loop, "save", lambda *_: events.append("checkpoint"))
    settings = [f"data.root={synthetic()}", f"output={tmp_path / 'run'}", "schedule.epochs=1", "evaluation.every=1"]
    config = tiny_config("rgbnt201", *settings, "schedule.warmup_epochs=0")
    loop.train(config)
    assert events[-4:] == ["epoch", "eval", "flush", "checkpoint"]
    assert dump_config(config) == (tmp_path / "run" / "config.yml").read_text()


def test_a_number_that_json_does_not_have_is_null(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsLog(run, 0, print) as log:
        log.write("step", 1, 1, total=float("nan"), head_0=float("inf"), gam=0.5)
    (line,) = run.metrics.read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["total"], row["head_0"], row["gam"]) == (None, None, 0.5)
    assert run.rows() == [row]
