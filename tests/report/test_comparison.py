"""Runs beside each other: the data of the page against a recomputation from the features alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

import signal_reid
from signal_reid.data import Dataset, Sample
from signal_reid.evaluation import FeatureSet
from signal_reid.evaluation.evaluator import Evaluation, measure
from signal_reid.report.comparison import (
    ComparedRun,
    caveats,
    change_rows,
    comparable,
    disagreements,
    overlaid_curves,
    query_change,
    results_table,
    setting_differences,
)
from signal_reid.report.selection import Ranking

ITEMS = 40


@pytest.fixture(scope="module")
def labels():
    generator = torch.Generator().manual_seed(1)
    identities = torch.arange(ITEMS) % 10
    identities[0] = 99  # a query without a match
    return identities, torch.randint(0, 3, (ITEMS,), generator=generator)


@pytest.fixture(scope="module")
def features():
    return {
        name: torch.randn(ITEMS, 6, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("ab")
    }


@pytest.fixture
def make_run(labels, features):
    """A run with random features, ranked as the report ranks."""

    def make(name, *overrides, history=(), names=None):
        config = signal_reid.load_config("rgbnt201", list(overrides))
        items = FeatureSet(features[name], *labels)
        evaluation = Evaluation(items, items, measure(items, items, config))
        names = names or [f"{i:06d}.jpg" for i in range(ITEMS)]
        samples = [Sample(-1, -1, -1, (), name) for name in names]
        results = Ranking.of(evaluation, config, 10, Dataset("", Path(), [], samples, samples, ())).results()
        return ComparedRun(name, config, history, results, list(zip(names, labels[0].tolist(), strict=True)))

    return make


def recomputed(features, labels):
    """Average precision (NaN without a match) and whether rank 1 is right, by sorting distances in NumPy."""
    x, (identities, cameras) = features.double().numpy(), (part.numpy() for part in labels)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    precision, first = [], []
    for i in range(ITEMS):
        kept = ~((identities == identities[i]) & (cameras == cameras[i]))
        order = np.argsort(((x - x[i]) ** 2).sum(1)[kept])
        right = (identities[kept] == identities[i])[order]
        ranks = np.flatnonzero(right) + 1
        precision.append((np.arange(1, len(ranks) + 1) / ranks).mean() if len(ranks) else np.nan)
        first.append(bool(right[0]))
    return np.array(precision), np.array(first)


def test_queries_gained_and_lost_are_those_of_a_recomputation(make_run, features, labels):
    (was, first_was), (now, first_now) = (recomputed(features[name], labels) for name in "ab")
    change = query_change(make_run("a"), make_run("b"))
    assert list(change.gained) == np.flatnonzero(first_now & ~first_was).tolist() != []
    assert list(change.lost) == np.flatnonzero(first_was & ~first_now).tolist() != []
    assert list(change.better) == np.flatnonzero(now > was).tolist()
    assert list(change.worse) == np.flatnonzero(now < was).tolist()
    assert change.mean == pytest.approx(np.nanmean(now - was), abs=1e-12)


def test_disagreements_begin_with_the_largest_gap(make_run, features, labels):
    gaps = np.abs(np.subtract(*(recomputed(features[name], labels)[0] for name in "ab")))
    chosen = disagreements([make_run("a"), make_run("b")], 5)
    assert gaps[chosen] == pytest.approx(np.sort(gaps[~np.isnan(gaps)])[::-1][:5])
    everything = disagreements([make_run("a"), make_run("b")], ITEMS)
    assert 0 not in everything  # has no match
    assert disagreements([make_run("a"), make_run("a")], 5) == []


def test_every_query_is_in_the_file(make_run, features, labels):
    header, *rows = change_rows([make_run("a"), make_run("b")])
    assert header[3:] == [f"{what} of {run}" for run in "ab" for what in ("average_precision", "first_match_rank")]
    assert len(rows) == ITEMS
    for column, name in ((3, "a"), (5, "b")):
        precision, first = recomputed(features[name], labels)
        given = [np.nan if row[column] == "" else row[column] for row in rows]
        assert given == pytest.approx(precision, nan_ok=True)
        assert [row[column + 1] == 1 for row in rows] == first.tolist()
    assert rows[0][3:] == ["", "", "", ""]


def test_only_settings_that_differ_are_listed(make_run):
    runs = [make_run("a", "output=x", "schedule.epochs=3"), make_run("b", "output=y", "model.local_alignment=false")]
    table = setting_differences(runs)
    assert table.header == ["setting", "a", "b"]
    assert table.rows == [["model.local_alignment", "true", "false"], ["schedule.epochs", "3", "50"]]


def test_the_table_has_the_last_and_the_best_epoch(make_run):
    rows = [
        {
            "kind": "eval",
            "epoch": epoch,
            "step": epoch,
            "mAP": mAP,
            "rank1": 0.5,
            "rank5": 0.6,
            "rank10": 0.7,
            "mINP": 0.1,
        }
        for epoch, mAP in ((1, 0.4), (2, 0.8), (3, 0.6))
    ]
    rows.append({"kind": "eval", "epoch": 4, "step": 16, "mAP": None, "rank1": None})  # none of the queries has a match
    finished, empty = results_table([make_run("a", history=rows), make_run("b")]).rows
    assert finished == ["a", 3, "60.0", "50.0", "60.0", "70.0", "10.0", "80.0", "50.0", 2]
    assert set(empty[1:]) == {"n/a"}


def test_curves_of_several_runs_lie_over_each_other(make_run, history):
    other = [{**row, "learning_rate": 1.0} if row["kind"] == "epoch" else row for row in history]
    charts = {
        title: curves
        for title, _, curves in overlaid_curves([make_run("a", history=history), make_run("b", history=other)])
    }
    assert list(charts) == ["Loss", "Loss head 0", "mAP", "R-1", "Learning rate"]
    assert [curve.label for curve in charts["Loss"]] == ["a", "b"]
    assert charts["Loss"][0].y == [row["total"] for row in history if row["kind"] == "step"]
    assert "Learning rate" not in {title for title, _, _ in overlaid_curves([make_run("a", history=history)] * 2)}


@pytest.mark.parametrize(
    ("override", "said", "queries"),
    [
        ("data.dataset=rgbnt100", "different data sets (a on rgbnt201, b on rgbnt100)", False),
        ("evaluation.reranking=true", "differ in evaluation.reranking (a False, b True)", True),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(make_run, override, said, queries):
    runs = [make_run("a"), make_run("b", override, "evaluation.k1=5", "evaluation.k2=2")]
    lines = caveats(runs)
    assert [said in line for line in lines] == [True, *[False] * (not queries)]
    assert len(comparable(runs)) == 1 + queries


def test_other_queries_are_not_compared(make_run):
    runs = [make_run("a"), make_run("b", names=[f"other{i}" for i in range(ITEMS)])]
    assert caveats(runs) == ["The queries of b are not compared: they are not those of a."]
    assert caveats([make_run("a"), make_run("b")]) == []
