import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signal_reid.evaluation import FeatureSet, match_ranks, rank_gallery, retrieval_metrics
from signal_reid.report import Headline, Ranking, choose_queries


def test_the_best_the_median_and_the_worst_are_chosen():
    assert choose_queries(np.array([0.5, 0.1, 0.9, 0.7, 0.3]), 3) == [2, 0, 1]


def test_queries_without_a_match_are_never_chosen():
    assert choose_queries(np.array([np.nan, 0.1, np.nan, 0.7]), 4) == [3, 1]
    assert choose_queries(np.array([np.nan]), 4) == []


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=20), st.integers(0, 25))
def test_chosen_queries_are_distinct_valid_and_go_from_best_to_worst(values, count):
    precision = np.array(values)
    chosen = choose_queries(precision, count)
    valid = precision[~np.isnan(precision)]
    assert len(chosen) == len(set(chosen)) == min(count, len(valid))
    picked = precision[chosen].tolist()
    assert picked == sorted(picked, reverse=True)
    if len(chosen) >= 2:
        assert (picked[0], picked[-1]) == (valid.max(), valid.min())


@pytest.fixture
def sets():
    def build(features, identities, cameras):
        return FeatureSet(torch.tensor(features)[:, None], torch.tensor(identities), torch.tensor(cameras))

    return build([0.0, 5.0], [1, 2], [0, 0]), build([0.0, 1.0, 2.0, 5.0], [1, 2, 1, 2], [0, 1, 1, 1])


def test_lists_hold_the_ranking_with_images_and_verdicts(sets, triplet):
    precision = retrieval_metrics(*sets, normalize=False).average_precision
    nearest = rank_gallery(*sets, top=4, normalize=False)
    ranks = match_ranks(*sets, normalize=False)
    ranking = Ranking(*sets, nearest, precision, ranks, ["first", "second"], ["a", "b", "c", "d"])
    lists = ranking.lists([1, 0], lambda i: triplet(100 + i), triplet)
    assert [(ranked.identity, ranked.name, ranked.average_precision) for ranked in lists] == [
        (2, "second", precision[1]),
        (1, "first", precision[0]),
    ]
    assert lists[0].images[0, 0, 0, 0] == 101
    results = lists[1].results  # the gallery's first item has the query's identity and camera
    assert [(item.identity, item.camera, item.distance, item.correct, item.name) for item in results] == [
        (2, "1", 1.0, False, "b"),
        (1, "1", 4.0, True, "c"),
        (2, "1", 25.0, False, "d"),
    ]
    assert [int(item.images[0, 0, 0, 0]) for item in results] == [1, 2, 3]
    assert [(found.match_ranks, found.nearest, found.nearest_identity) for found in ranking.results()] == [
        ([2], "b", 2),
        ([1, 3], "d", 2),
    ]


def test_a_headline_is_the_summary_of_a_measurement(sets):
    metrics = retrieval_metrics(*sets, normalize=False)
    assert Headline.of("after", metrics) == Headline("after", metrics.mAP, 0.5, 1.0, 1.0)
