import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from signal_reid.evaluation import FeatureSet, RerankingParameters, reranked_distances, retrieval_metrics


def naive_reranking(query, gallery, k1, k2, weight):
    """The paper's equations over Python sets, in double precision."""
    features = np.concatenate([query, gallery]).astype(np.float64)
    distances = np.square(features[:, None] - features[None]).sum(2)
    total = len(features)
    nearest = [sorted(range(total), key=lambda j: (distances[i, j], j)) for i in range(total)]
    relative = distances / distances.max(axis=1, keepdims=True)

    def reciprocal(i, k):
        return {j for j in nearest[i][: k + 1] if i in nearest[j][: k + 1]}

    encodings = np.zeros((total, total))
    for i in range(total):
        members = reciprocal(i, k1)
        expanded = set(members)
        for j in members:
            theirs = reciprocal(j, round(k1 / 2))
            if len(theirs & members) > 2 / 3 * len(theirs):
                expanded |= theirs
        for j in expanded:
            encodings[i, j] = np.exp(-relative[i, j])
    encodings /= encodings.sum(axis=1, keepdims=True)
    encodings = np.stack([encodings[nearest[i][:k2]].mean(axis=0) for i in range(total)])
    a, b = encodings[: len(query), None], encodings[None, len(query) :]
    jaccard = 1 - np.minimum(a, b).sum(2) / np.maximum(a, b).sum(2)
    return (1 - weight) * jaccard + weight * relative[: len(query), len(query) :]


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator)
    items = centres[torch.randint(6, (60,), generator=generator)] + torch.randn(60, 8, generator=generator) / 2
    return items[:15], items[15:]


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 1, 0.3), (1, 3, 0.0), (59, 60, 0.5), (5, 9, 1.0)])
def test_distances_follow_the_paper(features, k1, k2, weight):
    expected = naive_reranking(*(part.numpy() for part in features), k1, k2, weight)
    result = reranked_distances(*features, RerankingParameters(k1, k2, weight))
    # A unit in the last place of fp16 below 1 is 2^-11; a running sum collects a few.
    np.testing.assert_allclose(result.numpy(), expected, atol=3e-3)
    assert abs(result.numpy() - expected).mean() < 5e-4


def test_the_size_of_a_chunk_does_not_matter(features):
    parameters = RerankingParameters(20, 6, 0.3)
    whole, pieces = (reranked_distances(*features, parameters, chunk_bytes=size) for size in (2**30, 1))
    torch.testing.assert_close(whole, pieces, rtol=0, atol=2e-3)


def test_normalising_is_the_same_as_giving_normalised_features(features):
    parameters = RerankingParameters(10, 3, 0.3)
    unit = [torch.nn.functional.normalize(part, dim=1) for part in features]
    torch.testing.assert_close(
        reranked_distances(*features, parameters, normalize=True),
        reranked_distances(*unit, parameters),
        rtol=0,
        atol=2e-3,
    )


@pytest.mark.parametrize("k2", [1, 2])
def test_items_that_all_coincide_have_a_finite_distance(k2):
    result = reranked_distances(torch.ones(4, 3), torch.ones(4, 3), RerankingParameters(2, k2, 0.3), chunk_bytes=640)
    assert result.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k1": 0}, "k1 must be at least 1, got 0"),
        ({"k2": 0}, "k2 must be at least 1, got 0"),
        ({"lambda_value": 1.5}, r"lambda_value must be in 0\.\.1, got 1.5"),
    ],
)
def test_parameters_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RerankingParameters(**arguments)


@pytest.mark.parametrize(
    ("k1", "k2", "message"),
    [
        (60, 6, r"k1 must be in 1\.\.59 for 15 queries and 45 gallery items, got 60"),
        (20, 61, r"k2 must be in 1\.\.60 for 15 queries and 45 gallery items, got 61"),
    ],
)
def test_neighbourhoods_larger_than_the_set_are_refused(features, k1, k2, message):
    with pytest.raises(ValueError, match=message):
        reranked_distances(*features, RerankingParameters(k1, k2))


class CountOperators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class LargestResult(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_metrics_hold_no_matrix_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    identities, cameras = torch.arange(400) % 20, torch.randint(4, (400,), generator=generator)
    features = torch.randn(20, 8, generator=generator)[identities] + torch.randn(400, 8, generator=generator) / 2
    query, gallery = (FeatureSet(features[s], identities[s], cameras[s]) for s in (slice(200), slice(200, None)))
    whole, largest = {}, {}
    for chunk_bytes in (2**28, 2**17):  # the smaller holds 8 rows
        with LargestResult() as results:
            metrics = retrieval_metrics(query, gallery, reranking=RerankingParameters(8, 3), chunk_bytes=chunk_bytes)
        whole[chunk_bytes], largest[chunk_bytes] = metrics.average_precision, results.bytes
    assert largest[2**28] >= 4 * 400**2
    assert largest[2**17] < 2**17
    np.testing.assert_allclose(whole[2**17], whole[2**28], atol=2e-3)


def test_a_cpu_computes_it_in_few_operators_whatever_its_size():
    """An operator that splits its work waits for every core; on a shared machine, thousands wait for minutes."""
    features = torch.randn(240, 16, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with CountOperators() as operators:
            reranked_distances(features[:120], features[120:], RerankingParameters())
    finally:
        torch.set_num_threads(before)
    assert operators.count < 500


def test_the_number_of_threads_changes_nothing():
    features = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(reranked_distances(features[:40], features[40:], RerankingParameters(k1=20, k2=6)))
    torch.set_num_threads(before)
    assert torch.equal(*results)
