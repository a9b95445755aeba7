"""The directory of a run: what is read back, what damage costs, and what is on the disk first."""

import json
import os

import pytest

from signal_reid.config import dump_config
from signal_reid.runtime.errors import InputError
from signal_reid.training import loop
from signal_reid.training.run_directory import MetricsLog, RunDirectory


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
    with pytest.raises(InputError, match=rf"^{run.metrics}: damaged, line 4 is not a row of numbers \(.{{1,100}}\)$"):
        run.rows()
    rows, said = resumed(run, config)
    assert len(rows) == 6
    assert len(said) == 1
    assert "line 4" in said[0]
    assert "\n" not in said[0]


def test_a_gap_is_named_and_does_not_bar_resuming(run):
    run, config = run
    run.metrics.write_text(row("step", 1) + "\n" + row("epoch", 3) + "\n")
    rows, said = resumed(run, config)
    assert rows == [("step", 1), ("epoch", 3)]
    assert len(said) == 1
    assert "epoch 1, 2 are missing" in said[0]


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
