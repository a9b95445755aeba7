"""The benchmark of SIM, GAM and LAM runs, checks first, and says nothing when the check fails."""

import json

import pytest
import torch

SMALL = ["--batch", "4", "--runs", "2", "--warmup", "0", "--device", "cpu"]


@pytest.fixture
def modules(script):
    return script("modules")


def test_each_module_and_each_sum_gets_a_row_per_precision(modules, tmp_path):
    assert modules.main([*SMALL, "--precision", "fp32", "bf16", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    groups = ["SIM", "GAM", "LAM", "GAM + LAM", "SIM + GAM + LAM"]
    assert [(r["modules"], r["implementation"]) for r in rows] == [
        (group, f"ours {precision}") for group in groups for precision in ("fp32", "bf16")
    ]
    assert all(0 < r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] and r["device"] for r in rows)


def test_wrong_results_are_reported_without_a_time(modules, tmp_path, monkeypatch, capsys):
    in_double = modules.in_double

    def off_by_one_percent(*arguments):
        oracle = in_double(*arguments)
        with torch.no_grad():
            oracle.modules["local_alignment"].window_weight.mul_(1.01)
        return oracle

    monkeypatch.setattr(modules, "in_double", off_by_one_percent)
    assert modules.main([*SMALL, "--json", str(tmp_path / "out.json")]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: LAM")
    assert "_ms" not in output.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1"], "error: --batch must be at least 4, got 1"),
        (["--upstream", "no/such"], "error: --upstream must name a checkout of the authors' Signal, got no/such"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(modules, capsys, arguments, message):
    assert modules.main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
