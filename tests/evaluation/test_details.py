"""What is told of a ranking beyond its summary, against the definitions."""

import math
import random

import numpy as np
import pytest
import torch

from signal_reid.evaluation import FeatureSet, bootstrap_interval, match_ranks, query_ranks, retrieval_metrics
from signal_reid.evaluation.expansion import expanded_queries


@pytest.fixture(scope="module")
def ranked(golden_sets):
    query, gallery = golden_sets[0][:80], golden_sets[1][:200]
    return query, gallery, query_ranks(query, gallery)


def test_precision_at_k_is_the_share_of_matches_among_the_first_k(ranked):
    query, gallery, found = ranked
    for k in (1, 5, 300):
        shares = [sum(rank <= k for rank in ranks) / k for ranks in match_ranks(query, gallery) if ranks]
        assert found.precision_at(k) == pytest.approx(sum(shares) / len(shares))
    metrics = retrieval_metrics(query, gallery)
    assert found.precision_at(1) == pytest.approx(metrics.rank(1))
    np.testing.assert_allclose(found.average_precision, metrics.average_precision, rtol=1e-12)


@pytest.mark.parametrize(("method", "attribute"), [("by_camera", "cameras"), ("by_identity", "identities")])
def test_a_breakdown_is_what_a_group_of_queries_measures_alone(ranked, method, attribute):
    query, gallery, found = ranked
    groups = getattr(found, method)()
    labels = getattr(query, attribute)
    assert [group.label for group in groups] == sorted(set(labels.tolist()))
    assert sum(group.queries for group in groups) == len(query)
    for group in groups:
        if group.valid_queries:
            alone = retrieval_metrics(query[labels == group.label], gallery)
            assert group.valid_queries == alone.num_valid_queries
            assert (group.mAP, group.rank1) == pytest.approx((alone.mAP, alone.rank(1)))


def test_a_group_without_a_match_has_no_numbers(make_set):
    query = make_set([[0.0], [1.0]], [1, 2], [0, 1])
    found = query_ranks(query, make_set([[0.0]], [1], [1]))
    assert [(group.valid_queries, group.mAP) for group in found.by_camera()] == [(1, 1.0), (0, None)]


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """Intervals of samples of a known mean, against the plain bootstrap of the definition."""
    values = np.random.default_rng(5).beta(2, 3, 40)
    interval = bootstrap_interval(np.append(values, math.nan), level=0.9, resamples=4000, seed=1)
    draw = random.Random(2)
    means = sorted(sum(draw.choices(values.tolist(), k=40)) / 40 for _ in range(4000))
    assert interval.low == pytest.approx(means[200], abs=0.006)
    assert interval.high == pytest.approx(means[3799], abs=0.006)


def test_the_interval_depends_on_the_seed_alone(monkeypatch):
    values = np.linspace(0, 1, 30)
    first = bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) == first
    assert bootstrap_interval(values, seed=4) != first
    monkeypatch.setattr("signal_reid.evaluation.details._DRAWS_AT_ONCE", 100)
    chunked = bootstrap_interval(values, seed=3)
    assert (chunked.low, chunked.high) == pytest.approx((first.low, first.high), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": np.array([math.nan])}, "at least one number"),
        ({"level": 1.0}, "level must be between 0 and 1, got 1.0"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
    ],
)
def test_an_interval_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**{"values": np.ones(3), **arguments})


@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
def test_query_expansion_follows_its_definition(chunk_bytes):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 4, generator=generator) for n in (3, 6)]
    query, gallery = (FeatureSet(f, torch.zeros(len(f)).long(), torch.zeros(len(f)).long()) for f in rows)
    expanded = expanded_queries(query, gallery, 3, 2.0, chunk_bytes)
    for i in range(3):
        own = rows[0][i].double() / rows[0][i].double().norm()
        units = [row / row.norm() for row in rows[1].double()]
        nearest = sorted(units, key=lambda unit: float((unit - own).square().sum()))[:3]
        mean = own + sum(max(float(own @ unit), 0.0) ** 2 * unit for unit in nearest)
        torch.testing.assert_close(expanded.features[i], (mean / mean.norm()).float())
    assert torch.equal(expanded.identities, query.identities)


def test_query_expansion_wants_as_many_items_as_it_averages(make_set):
    one = make_set([[1.0]], [1], [0])
    with pytest.raises(ValueError, match=r"neighbours must be in 1\.\.1 \(gallery items\), got 2"):
        expanded_queries(one, one, 2)
