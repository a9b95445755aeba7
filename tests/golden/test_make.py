"""The script that makes the golden files follows the recipe of the tests, and tells rounding from a mistake."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from signal_reid.upstream.parameters import ours_to_authors


@pytest.fixture
def make(golden_directory, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("golden_make", golden_directory / "make.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "golden_make", module)
    spec.loader.exec_module(module)

    yield module

    for name in [name for name in sys.modules if name.split(".")[0] == "harness"]:
        del sys.modules[name]


def test_weights_are_those_of_the_golden_tests(make, golden):
    expected = ours_to_authors(golden.model().state_dict())
    for name, value in expected.items():
        made = make.parameter_value(name, tuple(value.shape), golden.seed)
        assert np.array_equal(made, value.numpy()), name


def test_inputs_are_those_of_the_golden_tests(make, golden):
    inputs = make.make_inputs(golden.config.data.image_size, golden.seed)
    assert torch.equal(torch.stack([inputs.images[name] for name in ("RGB", "NI", "TI")], 1), golden.images)
    assert torch.equal(inputs.cameras, golden.cameras)
    assert torch.equal(inputs.labels, golden.labels)


def test_every_stored_file_agrees_with_itself_and_can_be_written(make, golden_directory, tmp_path):
    names = {path.name for path in golden_directory.iterdir() if path.suffix in (".npz", ".json")}
    assert names == {"rgbnt201.npz", "msvr310.npz", "lr_schedule.json", "retrieval.npz"}
    for name in names - {"lr_schedule.json"}:
        stored = make.read(golden_directory / name)
        make.write(tmp_path / name, stored)
        assert set(make.compare(make.read(tmp_path / name), stored).values()) == {0.0}


def test_schedules_are_written_as_they_are_read(make, tmp_path):
    schedules = {"A": {"parameters": ["w"], "lr_by_epoch_from_1": [[0.1], [0.2]]}}
    make.write(tmp_path / "lr_schedule.json", schedules)
    stored = make.read(tmp_path / "lr_schedule.json")
    assert stored == {"A parameters": ["w"], "A lr_by_epoch_from_1": [[0.1], [0.2]]}
    assert set(make.compare(make.flat(schedules), stored).values()) == {0.0}


def test_a_difference_is_relative_to_the_largest_magnitude(make):
    assert make.largest_difference(np.float32([0.0, 4.0]), np.float32([0.02, 4.0])) == pytest.approx(0.005)


def test_each_gradient_is_relative_to_itself_unless_it_is_rounding(make):
    stored = {"grad_norms": np.float32([100.0, 1.0, 1e-7])}
    assert make.compare({"grad_norms": np.float32([100.0, 1.1, 1e-7])}, stored)["grad_norms"] == pytest.approx(0.1)
    assert make.compare({"grad_norms": np.float32([100.0, 1.0, 2e-7])}, stored)["grad_norms"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("made", "stored"),
    [
        (np.array([True, False]), np.array([True, True])),
        (np.array(["a", "b"]), np.array(["b", "a"])),
        (np.zeros(2, np.float32), np.zeros(3, np.float32)),
        (np.zeros(2, np.int64), np.zeros(2, np.float32)),
    ],
)
def test_other_names_masks_shapes_or_kinds_are_infinitely_off(make, made, stored):
    assert make.largest_difference(made, stored) == float("inf")


def test_a_value_that_is_not_a_number_does_not_agree(make):
    assert not make.largest_difference(np.float32([np.nan]), np.float32([1.0])) <= make.tolerance_of("eval_feature")


def test_an_entry_that_only_one_file_has_is_infinitely_off(make):
    one = {"a": np.zeros(1), "b": np.zeros(1)}
    assert make.compare(one, {"a": np.zeros(1)}) == {"a": 0.0, "b": float("inf")}
    assert make.compare({"a": np.zeros(1)}, one) == {"a": 0.0, "b": float("inf")}


@pytest.mark.parametrize(("factor", "code", "verdict"), [(1.0, 0, "agrees"), (1.01, 1, "DIFFERS")])
def test_the_exit_code_says_whether_the_stored_files_agree(
    make, golden_directory, monkeypatch, tmp_path, capsys, factor, code, verdict
):
    made = make.read(golden_directory / "retrieval.npz")
    made["camera_mAP"] = made["camera_mAP"] * factor
    (tmp_path / "modeling").mkdir()
    monkeypatch.setattr(make, "make_all", lambda checkout: {"retrieval.npz": made})
    assert make.main([str(tmp_path)]) == code
    assert f"retrieval.npz camera_mAP: {verdict}, " in capsys.readouterr().out


def test_another_directory_is_refused_in_one_line(make, tmp_path, capsys):
    assert make.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: CHECKOUT must name a checkout of the authors' code, got {tmp_path}\n"
