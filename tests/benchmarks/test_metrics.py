"""The benchmark of distances, ranks and re-ranking checks its results first; a large search has its own process."""

import json
import os
import subprocess
import sys

import pytest
import torch

SMALL = ["--items", "60", "--dimension", "16", "--runs", "1", "--warmup", "0", "--device", "cpu", "--threads", "1"]


@pytest.fixture
def benchmark(script):
    return script("metrics")


def test_the_script_times_both_protocols_and_a_large_search(benchmarks_directory, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(benchmarks_directory.parent)}
    out = tmp_path / "out.json"
    command = [sys.executable, benchmarks_directory / "metrics.py", *SMALL, "--large", "50", "3000", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["task"] for row in rows] == ["metrics, camera", "metrics, scene", "metrics, camera, large"]
    assert all(row["p50_ms"] > 0 for row in rows)
    assert (rows[-1]["queries"], rows[-1]["gallery"], rows[-1]["dimension"]) == (50, 3000, 128)
    assert 0 < rows[-1]["mAP"] < 1
    if sys.platform == "linux":
        assert rows[-1]["peak_MiB"] > 50


@pytest.fixture
def checkout(tmp_path):
    """A made-up checkout whose metrics are given and whose plots need what is not there."""
    utils = tmp_path / "checkout" / "utils"
    utils.mkdir(parents=True)
    (utils / "metrics.py").write_text(
        "from scipy.integrate import simps\nimport seaborn as sns, numpy as np\nfrom sklearn import manifold\n"
        "import json, os\n"
        "GIVEN = json.load(open(os.path.join(os.path.dirname(__file__), 'given.json')))\n"
        "class R1_mAP_eval:\n"
        "    def __init__(self, num_query, max_rank=50, feat_norm=True, reranking=False):\n"
        "        self.num_query, self.reranking = num_query, reranking\n"
        "    def reset(self):\n        self.seen = 0\n"
        "    def update(self, output):\n        print('told', len(output))\n        self.seen += len(output[0])\n"
        "    def compute(self):\n"
        "        assert self.seen == 2 * self.num_query\n"
        "        open('re.txt', 'w').write('theirs')\n"
        "        mAP, cmc = GIVEN['reranked' if self.reranking else 'camera']\n"
        "        return np.array(cmc), mAP, None\n"
        "class R1_mAP(R1_mAP_eval):\n"
        "    def compute(self):\n        return np.array(GIVEN['scene'][1]), GIVEN['scene'][0], None\n"
    )
    return utils.parent


def give(benchmark, checkout, factor=1.0):
    """Make the checkout return our own numbers, the scene's times a factor."""
    items, others = (benchmark.batches_of(benchmark.make_set(60, 16, 2, seed), torch.device("cpu")) for seed in (1, 2))
    given = {}
    for name, gallery, protocol, reranking in (
        ("camera", None, "camera", None),
        ("scene", None, "scene", None),
        ("reranked", others, "camera", benchmark.RERANKING),
    ):
        metrics = benchmark.our_metrics(items, gallery, protocol, reranking)
        given[name] = [metrics.mAP * (factor if name == "scene" else 1), metrics.cmc.tolist()]
    (checkout / "utils" / "given.json").write_text(json.dumps(given))


def test_the_authors_metrics_and_re_ranking_are_timed_beside_ours(benchmark, checkout, tmp_path, monkeypatch, capsys):
    give(benchmark, checkout)
    monkeypatch.chdir(tmp_path)
    assert benchmark.main([*SMALL, "--upstream", "checkout", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["upstream", "ours"] * 3
    assert all(row["speedup"] > 0 for row in rows[1::2])
    assert "told" not in capsys.readouterr().out
    assert not (tmp_path / "re.txt").exists()


def test_wrong_results_are_reported_without_a_time(benchmark, checkout, tmp_path, monkeypatch, capsys):
    give(benchmark, checkout, factor=1.001)
    assert benchmark.main([*SMALL, "--upstream", str(checkout), "--json", str(tmp_path / "out.json")]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: metrics, scene, fp32: mAP and CMC differ by up to")
    assert "_ms" not in output.out
    assert not (tmp_path / "out.json").exists()


def test_low_precision_features_are_measured_beside_the_same_numbers_in_fp32(benchmark, tmp_path):
    out = tmp_path / "out.json"
    assert benchmark.main([*SMALL, "--precision", "fp32", "bf16", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["precision"]) for row in rows] == [
        (f"metrics, {protocol}", precision) for precision in ("fp32", "bf16") for protocol in ("camera", "scene")
    ]
    (task, *_) = benchmark.make_tasks(benchmark.parse(SMALL), torch.device("cpu"), "bf16")
    assert task.ours.args[0][0][0].dtype == torch.bfloat16


def test_too_few_items_are_refused(benchmark, capsys):
    assert benchmark.main([*SMALL, "--items", "1"]) == 2
    assert capsys.readouterr().err == "error: --items must be at least 2, got 1\n"
