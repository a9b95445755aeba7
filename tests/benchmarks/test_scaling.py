"""The benchmark of several processes says what follows from its numbers; two processes run it in `test_sharing.py`."""

import json

import pytest

TOY = ["--batch", "4", "--runs", "1", "--warmup", "0", "--layers", "1", "--device", "cpu", "--threads", "1", "--set"]
TOY += ["model.backbone.width=48", "model.backbone.heads=3", "model.backbone.output_dim=32"]


@pytest.fixture
def scaling(script):
    return script("scaling")


@pytest.fixture
def started(scaling, monkeypatch, tmp_path):
    """The numbers that are reported, with one process's in the place of two processes', which exchange for a second."""
    assert scaling.main([*TOY, "--task", str(tmp_path / "results.json")]) == 0
    (alone,) = json.loads((tmp_path / "results.json").read_text())
    two = {**alone, "counted": {"gradient": 8_000_000, "gathered": 4_000_000, "buffer": 1_000_000}}
    two |= {"seconds": [2.0], "exchange_seconds": [1.0]}
    results = {1: [{**alone, "seconds": [3.0]}], 2: [two]}
    monkeypatch.setattr(scaling, "start", lambda args, size, path: results[size])
    return results


def test_rows_and_predictions(scaling, started, tmp_path):
    out = tmp_path / "out.json"
    assert scaling.main([*TOY, "--processes", "2", "--links", "20", "--json", str(out)]) == 0
    alone, two, *predicted = json.loads(out.read_text())["rows"]
    assert (alone["processes"], alone["efficiency"], alone["sent_MB"]) == (1, 1, 0)
    assert (two["processes"], two["per_process"], two["samples_per_s"], two["efficiency"]) == (2, 2, 2, 0.75)
    assert two["sent_MB"] == 8 + 2 + 1  # of a ring of two: once all gradients, half of what is gathered, the buffers
    assert (two["if_after"], two["if_beside"]) == (0.6, 1)
    assert [row["processes"] for row in predicted] == [2, 4, 8]


def test_the_model_is_that_of_the_table_in_the_docs(scaling):
    """An H100 at 40 % of its peak takes 33 ms for 64 samples, and sends 362 MB through 20 GB/s in 18 ms."""
    predicted = scaling.efficiencies(33.4, 2, 18.1)
    assert [100 * share for share in predicted.values()] == pytest.approx([48, 70], abs=1)


def test_another_loss_than_one_process_s_is_no_time(scaling, started, capsys):
    started[2][0]["loss"] *= 1.001
    assert scaling.main([*TOY, "--processes", "2"]) == 1
    assert "loss of 2 processes in fp32: relative error 1.0e-03" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "3"], "--batch must be at least 4 and a multiple of --processes [3], got 4"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_measured(scaling, capsys, options, message):
    assert scaling.main([*TOY, *options]) == 2
    assert message in capsys.readouterr().err
