"""What version 0.1.0 wrote still works: a run that stopped after two of four epochs, its weights and its features."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from signal_reid.cli import main
from signal_reid.data.synthetic import synthesize
from signal_reid.evaluation import load_features, retrieval_metrics

FILES = Path(__file__).parent / "v0.1.0"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data set that the run was trained on."""
    root = tmp_path_factory.mktemp("data")
    sizes = {"train_identities": 6, "test_identities": 4, "images_per_identity": 4, "cameras": 2}
    synthesize("rgbnt201", root / "RGBNT201", **sizes, image_size=(64, 64), seed=3)
    return root


@pytest.fixture
def run(tmp_path):
    """The run directory as version 0.1.0 left it, but for the finished run's numbers."""
    for name in ("config.yml", "checkpoint.pt", "best.safetensors", "metrics.jsonl"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(FILES / name, tmp_path / "run" / name)
    return tmp_path / "run"


def signal_reid(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["signal-reid", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_resumed_with_the_losses_of_one_that_never_stopped(run, data, monkeypatch):
    assert signal_reid(monkeypatch, "train", "--resume", run, f"data.root={data}") == 0
    for resumed, finished in zip(rows(run / "metrics.jsonl"), rows(FILES / "finished.jsonl"), strict=True):
        assert [resumed[name] for name in ("kind", "epoch", "step")] == [
            finished[name] for name in ("kind", "epoch", "step")
        ]
        assert resumed.keys() >= finished.keys()  # 0.2.0 tells more of the losses
        compared = [name for name in ("total", "head_0", "head_1", "gam", "lam") if name in finished]
        assert [resumed[name] for name in compared] == pytest.approx([finished[name] for name in compared], rel=1e-4)


def test_weights_are_evaluated_with_the_configuration_beside_them(run, data, tmp_path, monkeypatch):
    output = tmp_path / "numbers.json"
    arguments = ("eval", "--weights", run / "best.safetensors", "--output", output, f"data.root={data}")
    assert signal_reid(monkeypatch, *arguments) == 0
    assert json.loads(output.read_text()).keys() == json.loads((FILES / "evaluated.json").read_text()).keys()


def test_weights_are_evaluated_away_from_their_run(run, data, tmp_path, monkeypatch):
    moved, output = tmp_path / "elsewhere" / "best.safetensors", tmp_path / "numbers.json"
    moved.parent.mkdir()
    (run / "best.safetensors").rename(moved)
    arguments = ("eval", "--weights", moved, "--output", output, f"data.root={data}")
    assert signal_reid(monkeypatch, *arguments) == 0
    assert json.loads(output.read_text()).keys() == json.loads((FILES / "evaluated.json").read_text()).keys()


def test_features_are_measured_to_the_same_numbers():
    features, _ = load_features(FILES / "features.safetensors")
    metrics = retrieval_metrics(features, features, protocol="camera")
    measured = json.loads((FILES / "evaluated.json").read_text())
    assert metrics.cmc.tolist() == measured.pop("cmc")
    assert metrics.summary() == pytest.approx(measured)


def test_weights_give_the_same_features(run, data, tmp_path, monkeypatch):
    output = tmp_path / "features.safetensors"
    arguments = ("extract", "--weights", run / "best.safetensors", "--split", "query", "--output", output)
    assert signal_reid(monkeypatch, *arguments, f"data.root={data}") == 0
    ours, theirs = load_file(output), load_file(FILES / "features.safetensors")
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(ours["features"], theirs["features"], rtol=1e-4, atol=1e-5)
