"""Timing, percentiles, ratios and the check that stands before every number."""

import importlib
import json
import os

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def common(script):
    return script("harness.common")


def test_percentiles_are_interpolated_and_in_milliseconds(common):
    assert common.percentiles([0.001, 0.002, 0.003, 0.004, 0.011]) == {"p20_ms": 1.8, "p50_ms": 3.0, "p80_ms": 5.4}


def test_speedup_is_the_median_of_the_ratios_of_rounds(common):
    theirs, ours = [10.0, 30.0, 2.0], [1.0, 10.0, 2.0]  # ratios 10, 3, 1; the ratio of medians would be 5
    assert common.speedup(theirs, ours) == 3.0


def test_every_round_calls_every_step_once_and_the_order_alternates(common):
    calls = []
    times = common.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, 1, CPU)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_results_within_the_tolerance_pass_and_give_their_error(common):
    assert common.check_close("loss", torch.tensor([1.0, 10.001]), torch.tensor([1.0, 10.0]), 1e-3) < 2e-4


@pytest.mark.parametrize("wrong", [1.1, float("nan"), float("inf")])
def test_a_wrong_result_raises_and_names_what_is_wrong(common, wrong):
    with pytest.raises(common.WrongResultError, match=r"^loss: .* no time is reported$"):
        common.check_close("loss", torch.tensor(wrong), torch.tensor(1.0), 1e-3)


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n",
    ],
)
def test_the_driver_is_that_of_the_kernel_module(common, monkeypatch, text):
    monkeypatch.setattr(common.Path, "is_file", lambda path: True)
    monkeypatch.setattr(common.Path, "read_text", lambda path: text)
    assert common._driver() == "550.54.15"


def test_without_the_kernel_module_nvidia_smi_is_asked_for_the_driver(common, monkeypatch):
    monkeypatch.setattr(common.Path, "is_file", lambda path: False)
    monkeypatch.setattr(common, "_output", lambda command: "550.54.15\n550.54.15")
    assert common._driver() == "550.54.15"
    monkeypatch.setattr(common, "_output", lambda command: None)
    assert common._driver() is None


def test_the_environment_of_a_gpu_names_its_driver(common, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(common, "_driver", lambda: "550.54.15")
    assert common.environment(torch.device("cuda"))["driver"] == "550.54.15"
    assert "driver" not in common.environment(CPU)


def test_json_holds_the_rows_and_names_device_threads_and_torch(common, tmp_path):
    common.write_json(tmp_path / "rows.json", [{"step": "ours", "p50_ms": 1.5}], CPU)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == [{"step": "ours", "p50_ms": 1.5}]
    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["device"]
    assert written["environment"]["threads"] == torch.get_num_threads()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


class Options:
    device = "cpu"

    def __init__(self, path):
        self.json = str(path)


def rows_of(path):
    written = json.loads(path.read_text())
    return written["complete"], [row["step"] for row in written["rows"]]


def test_a_row_is_in_the_file_as_soon_as_it_is_measured(common, tmp_path, capsys):
    path = tmp_path / "rows.json"

    def benchmark(args):
        yield {"step": "first"}
        assert rows_of(path) == (False, ["first"])
        yield {"step": "second"}
        assert rows_of(path) == (False, ["first", "second"])

    assert common.run(benchmark, Options(path), "title") == 0
    assert rows_of(path) == (True, ["first", "second"])
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted after 1 rows"),
        (RuntimeError("out of memory"), 1, "error: out of memory"),
    ],
)
def test_what_was_measured_before_a_run_ends_is_kept(common, tmp_path, capsys, error, status, message):
    def benchmark(args):
        yield {"step": "first"}
        raise error

    assert common.run(benchmark, Options(tmp_path / "rows.json"), "title") == status
    assert rows_of(tmp_path / "rows.json") == (False, ["first"])
    assert capsys.readouterr().err == f"{message}\n"


def test_rows_go_where_the_caller_s_directory_says(common, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def benchmark(args):
        os.chdir("/")
        yield {"step": "first"}

    assert common.run(benchmark, Options("rows.json"), "title") == 0
    assert rows_of(tmp_path / "rows.json") == (True, ["first"])


def test_an_object_of_another_process_answers_and_raises_as_it_would_here(common):
    other = common.OwnProcess(importlib.import_module, "os")
    assert other.getpid() != os.getpid()
    with pytest.raises(FileNotFoundError, match="not there"):
        other.stat("not there")
    assert other.getpid() != os.getpid()  # an error does not end it


def test_an_object_that_cannot_be_made_raises_here(common):
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        common.OwnProcess(importlib.import_module, "no_such_module")
