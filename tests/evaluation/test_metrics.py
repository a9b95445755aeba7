import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signal_reid.evaluation import FeatureSet, RerankingParameters, match_ranks, rank_gallery, retrieval_metrics
from signal_reid.evaluation import metrics as metrics_module
from signal_reid.evaluation.protocols import PROTOCOLS, SameIdentity


def naive_ranking(query, gallery, i, attribute):
    """Kept gallery items of query i, nearest first, from the definition."""
    distances = [
        sum((a - b) ** 2 for a, b in zip(query.features[i].tolist(), row, strict=True))
        for row in gallery.features.tolist()
    ]
    same = [
        gallery.identities[j] == query.identities[i] and getattr(gallery, attribute)[j] == getattr(query, attribute)[i]
        for j in range(len(gallery))
    ]
    kept = [j for j in range(len(gallery)) if not same[j]]
    return sorted(kept, key=lambda j: (distances[j], j)), distances


def naive_metrics(query, gallery, attribute, max_rank):
    precisions, penalties, curves = [], [], []
    for i in range(len(query)):
        ranking, _ = naive_ranking(query, gallery, i, attribute)
        ranks = [r for r, j in enumerate(ranking, 1) if gallery.identities[j] == query.identities[i]]
        if not ranks:
            precisions.append(math.nan)
            continue
        precisions.append(sum(n / rank for n, rank in enumerate(ranks, 1)) / len(ranks))
        penalties.append(len(ranks) / ranks[-1])
        curves.append([float(ranks[0] <= r) for r in range(1, min(max_rank, len(gallery)) + 1)])
    return precisions, penalties, curves


@st.composite
def small_sets(draw):
    """Sets with whole-number features, so that distances are exact and ties and duplicates abound."""

    def draw_set(size):
        numbers = [draw(st.lists(st.integers(0, high), min_size=size, max_size=size)) for high in (2, 2, 3, 2, 2)]
        features = torch.tensor(numbers[:2], dtype=torch.float32).t()
        return FeatureSet(features, *(torch.tensor(values) for values in numbers[2:]))

    return draw_set(draw(st.integers(1, 6))), draw_set(draw(st.integers(1, 12)))


@pytest.mark.parametrize("protocol", ["camera", "scene"])
def test_golden_map_and_cmc(golden, golden_sets, protocol):
    metrics = retrieval_metrics(*golden_sets, protocol=protocol)
    assert metrics.mAP == pytest.approx(float(golden[f"{protocol}_mAP"]), abs=1e-6)
    np.testing.assert_allclose(metrics.cmc, golden[f"{protocol}_cmc"], atol=1e-6)


@pytest.mark.parametrize(("k1", "k2"), [(50, 15), (20, 6)])
def test_golden_map_and_cmc_after_reranking(golden, golden_sets, k1, k2):
    metrics = retrieval_metrics(*golden_sets, reranking=RerankingParameters(k1, k2, 0.3))
    assert metrics.mAP == pytest.approx(float(golden[f"rerank_k{k1}_{k2}_mAP"]), abs=1e-4)
    np.testing.assert_allclose(metrics.cmc, golden[f"rerank_k{k1}_{k2}_cmc"], atol=1e-4)


@settings(deadline=None)
@given(small_sets(), st.sampled_from(["camera", "scene"]), st.integers(1, 15), st.integers(1, 4000))
def test_metrics_follow_the_definition(sets, protocol, max_rank, chunk_bytes):
    precisions, penalties, curves = naive_metrics(*sets, f"{protocol}s", max_rank)
    arguments = {"protocol": protocol, "max_rank": max_rank, "normalize": False, "chunk_bytes": chunk_bytes}
    if not curves:
        with pytest.raises(ValueError, match=f"no query has a match in the gallery under the {protocol} protocol"):
            retrieval_metrics(*sets, **arguments)
        return
    metrics = retrieval_metrics(*sets, **arguments)
    np.testing.assert_allclose(metrics.average_precision, precisions, atol=1e-12)
    np.testing.assert_allclose(metrics.cmc, np.mean(curves, axis=0), atol=1e-12)
    assert metrics.mAP == pytest.approx(np.nanmean(precisions))
    assert metrics.minp == pytest.approx(np.mean(penalties))
    assert metrics.num_valid_queries == len(curves)


@settings(deadline=None)
@given(small_sets(), st.sampled_from(["camera", "scene"]), st.integers(1, 15), st.integers(1, 4000))
def test_ranked_lists_follow_the_definition(sets, protocol, top, chunk_bytes):
    query, gallery = sets
    indices, distances, valid = rank_gallery(*sets, protocol, top, normalize=False, chunk_bytes=chunk_bytes)
    assert indices.shape == distances.shape == valid.shape == (len(query), min(top, len(gallery)))
    for i in range(len(query)):
        ranking, from_query = naive_ranking(query, gallery, i, f"{protocol}s")
        ranking = ranking[:top]
        rest = indices.shape[1] - len(ranking)
        assert indices[i].tolist() == ranking + [-1] * rest
        assert distances[i].tolist() == [from_query[j] for j in ranking] + [math.inf] * rest
        assert valid[i].tolist() == [True] * len(ranking) + [False] * rest


@settings(deadline=None)
@given(small_sets(), st.sampled_from(["camera", "scene"]), st.integers(1, 4000))
def test_ranks_of_the_matches_follow_the_definition(sets, protocol, chunk_bytes):
    query, gallery = sets
    for i, found in enumerate(match_ranks(*sets, protocol, normalize=False, chunk_bytes=chunk_bytes)):
        ranking, _ = naive_ranking(query, gallery, i, f"{protocol}s")
        assert found == [r for r, j in enumerate(ranking, 1) if gallery.identities[j] == query.identities[i]]


@pytest.mark.parametrize("reranking", [None, RerankingParameters(20, 6, 0.3)])
def test_average_precision_is_that_of_the_ranks_of_the_matches(golden_sets, reranking):
    sets = golden_sets[0][:60], golden_sets[1][:90]
    expected = retrieval_metrics(*sets, reranking=reranking).average_precision
    ranks = match_ranks(*sets, reranking=reranking)
    precisions = [np.mean([k / rank for k, rank in enumerate(found, 1)]) if found else math.nan for found in ranks]
    np.testing.assert_allclose(precisions, expected, rtol=1e-12)


@pytest.mark.parametrize("reranking", [None, RerankingParameters(20, 6, 0.3)])
def test_the_order_of_the_gallery_does_not_matter(golden_sets, reranking):
    query, gallery = golden_sets
    shuffled = gallery[torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0))]
    first = retrieval_metrics(query, gallery, reranking=reranking)
    second = retrieval_metrics(query, shuffled, reranking=reranking)
    # Re-ranking sums in half precision in the order of the gallery.
    assert first.mAP == pytest.approx(second.mAP, abs=1e-9 if reranking is None else 1e-3)


def test_the_size_of_a_chunk_does_not_matter(golden_sets):
    whole, pieces = (retrieval_metrics(*golden_sets, chunk_bytes=size) for size in (2**30, 1))
    np.testing.assert_allclose(whole.average_precision, pieces.average_precision, atol=1e-6)


def test_a_set_against_itself_is_measured_like_against_a_copy(golden_sets):
    query, _ = golden_sets
    copy = FeatureSet(query.features.clone(), query.identities, query.cameras, query.scenes)
    itself, other = retrieval_metrics(query, query), retrieval_metrics(query, copy)
    np.testing.assert_allclose(itself.average_precision, other.average_precision, atol=1e-5)
    np.testing.assert_allclose(itself.cmc, other.cmc, atol=1e-6)


@settings(deadline=None)
@given(small_sets(), st.sampled_from(sorted(PROTOCOLS)))
def test_a_large_gallery_is_ranked_like_a_small_one(sets, protocol):
    distances = torch.cdist(sets[0].features, sets[1].features).square()
    same = SameIdentity(*sets, protocol).candidates(slice(None))
    positions, counts = metrics_module._match_positions(distances, same)
    by_key = metrics_module._positions_by_key(distances, same)
    assert of_matches(positions, counts) == of_matches(by_key, counts)


@pytest.mark.parametrize("ties", [1, 8, 300])
def test_few_and_many_ties_rank_by_index(make_set, ties):
    distances = torch.randperm(600).float().view(12, 50)
    distances.view(-1)[torch.randperm(600)[: 2 * ties]] = torch.arange(ties).float().repeat(2)
    query = make_set([[0.0]] * 12, [1, 2] * 6, [9] * 12)
    gallery = make_set([[0.0]] * 50, [1, 2, 3, 1, 3] * 10, [0] * 50)
    same = SameIdentity(query, gallery, "camera").candidates(slice(None))
    ranks = distances.argsort(dim=1, stable=True).argsort(dim=1)
    matches = query.identities[:, None] == gallery.identities
    positions, counts = metrics_module._match_positions(distances, same)
    assert of_matches(positions, counts) == [
        sorted(row[match].tolist()) for row, match in zip(ranks, matches, strict=True)
    ]


def of_matches(positions, counts):
    return [row[:count].tolist() for row, count in zip(positions, counts, strict=True)]


def test_a_set_of_equal_features_against_itself_ranks_by_index(make_set):
    items = make_set([[1.0, 2.0]] * 5, [1, 1, 2, 1, 2], [0, 1, 0, 2, 1])
    ranks = {0: [1, 3], 1: [1, 3], 3: [1, 2], 2: [4], 4: [3]}  # the query's own camera is dropped: itself
    expected = [sum(n / rank for n, rank in enumerate(ranks[i], 1)) / len(ranks[i]) for i in range(5)]
    np.testing.assert_allclose(retrieval_metrics(items, items).average_precision, expected)


def test_low_precision_features_give_the_metrics_of_their_fp32_values(golden_sets):
    low = [FeatureSet(s.features.bfloat16(), s.identities, s.cameras, s.scenes) for s in golden_sets]
    exact = [FeatureSet(s.features.float(), s.identities, s.cameras, s.scenes) for s in low]
    first, second = retrieval_metrics(*low), retrieval_metrics(*exact)
    np.testing.assert_allclose(first.average_precision, second.average_precision, atol=1e-6)


def test_working_memory_stays_within_its_bound(make_set, monkeypatch):
    """Many queries of one identity, whose pairs are the most memory there can be."""
    sizes = []
    match_positions = metrics_module._match_positions

    def recorded(distances, same):
        sizes.append(distances.numel())
        return match_positions(distances, same)

    monkeypatch.setattr(metrics_module, "_match_positions", recorded)
    items = make_set(torch.randn(40, 3).tolist(), [1] * 40, list(range(40)))
    retrieval_metrics(items, items, chunk_bytes=40 * 108 * 4)  # 108 bytes for a pair of one identity, four queries
    assert sizes == [4 * 40] * 10


def test_the_scale_of_features_matters_only_without_normalisation(golden_sets):
    query, gallery = golden_sets
    scale = torch.rand(len(gallery), 1, generator=torch.Generator().manual_seed(0)) + 0.5
    scaled = FeatureSet(gallery.features * scale, gallery.identities, gallery.cameras)
    assert retrieval_metrics(query, scaled).mAP == pytest.approx(retrieval_metrics(query, gallery).mAP, abs=1e-6)
    assert retrieval_metrics(query, scaled, normalize=False).mAP < retrieval_metrics(query, gallery).mAP - 0.01


def test_perfect_features_score_one(make_set):
    query = make_set([[0.0], [9.0]], [1, 2], [0, 0])
    gallery = make_set([[0.0], [0.1], [9.0]], [1, 1, 2], [1, 2, 1])
    metrics = retrieval_metrics(query, gallery, normalize=False)
    assert (metrics.mAP, metrics.minp, metrics.rank(1), metrics.num_valid_queries) == (1, 1, 1, 2)


def test_a_query_without_a_match_is_left_out_and_has_no_average_precision(make_set):
    query = make_set([[0.0], [0.0]], [1, 7], [0, 0])
    metrics = retrieval_metrics(query, make_set([[0.0]], [1], [1]), normalize=False)
    assert (metrics.mAP, metrics.num_valid_queries) == (1, 1)
    assert np.isnan(metrics.average_precision).tolist() == [False, True]


def test_a_match_too_far_for_fp32_is_the_last_one(make_set):
    gallery = make_set([[1e30], [0.0], [1.0]], [1, 2, 3], [1, 1, 1])
    metrics = retrieval_metrics(make_set([[0.0]], [1], [0]), gallery, normalize=False)
    assert metrics.mAP == pytest.approx(1 / 3)


def test_a_small_gallery_cuts_the_curve_and_the_summary_still_has_every_rank(make_set):
    gallery = make_set([[0.0], [1.0]], [2, 1], [1, 1])
    metrics = retrieval_metrics(make_set([[0.0]], [1], [0]), gallery, normalize=False)
    assert metrics.cmc.tolist() == [0, 1]
    assert metrics.summary() == {"mAP": 0.5, "rank1": 0, "rank5": 1, "rank10": 1, "mINP": 0.5}
    assert str(metrics) == "mAP 50.0%, R-1 0.0%, R-5 100.0%, R-10 100.0%"


def test_a_rank_below_one_is_refused(golden_sets):
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        retrieval_metrics(*golden_sets).rank(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_rank": 0}, "max_rank must be at least 1, got 0"), ({"chunk_bytes": 0}, "chunk_bytes must be positive")],
)
def test_sizes_out_of_range_are_refused(golden_sets, arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(*golden_sets, **arguments)


def test_a_ranked_list_of_nothing_is_refused(golden_sets):
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        rank_gallery(*golden_sets, top=0)


def test_sets_of_different_feature_sizes_are_refused(make_set):
    with pytest.raises(ValueError, match="query and gallery features must be of one size, got 1 and 2"):
        retrieval_metrics(make_set([[0.0]], [1], [0]), make_set([[0.0, 1.0]], [1], [1]))


def test_an_empty_set_is_refused(make_set):
    empty = FeatureSet(torch.empty(0, 1), *(torch.empty(0, dtype=torch.int64) for _ in range(2)))
    with pytest.raises(ValueError, match="gallery must hold at least one item, got none"):
        retrieval_metrics(make_set([[0.0]], [1], [0]), empty)


def test_pytorch_metric_learning_agrees(golden_sets):
    reason = "needs pytorch-metric-learning"
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator", reason=reason)
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference", reason=reason)
    distance = pytest.importorskip("pytorch_metric_learning.distances", reason=reason).LpDistance()
    query, gallery = golden_sets
    others = gallery[~torch.isin(gallery.identities, query.identities[:1])]  # one query is left without a match
    for reference in (gallery, others):
        theirs = calculator.AccuracyCalculator(
            include=("precision_at_1", "mean_average_precision"),
            device=torch.device("cpu"),
            knn_func=inference.CustomKNN(distance, batch_size=100),
        ).get_accuracy(query.features, query.identities, reference.features, reference.identities)
        cameras = torch.arange(len(reference)) + len(query)  # no pair shares one, so the protocol drops nothing
        ours = retrieval_metrics(
            FeatureSet(query.features, query.identities, torch.arange(len(query))),
            FeatureSet(reference.features, reference.identities, cameras),
        )
        assert ours.mAP == pytest.approx(theirs["mean_average_precision"], abs=1e-6)
        assert ours.rank(1) == pytest.approx(theirs["precision_at_1"], abs=1e-6)
