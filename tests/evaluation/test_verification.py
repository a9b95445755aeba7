"""The ROC and its operating points against all pairs, one at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signal_reid.evaluation import FeatureSet, roc


def naive_pairs(query, gallery, protocol):
    """Squared distances of the genuine and of the impostor pairs that the protocol keeps, from the definition."""
    genuine, impostor = [], []
    for i in range(len(query)):
        for j in range(len(gallery)):
            pairs = zip(query.features[i].tolist(), gallery.features[j].tolist(), strict=True)
            distance = sum((a - b) ** 2 for a, b in pairs)
            if query.identities[i] != gallery.identities[j]:
                impostor.append(distance)
            elif getattr(query, f"{protocol}s")[i] != getattr(gallery, f"{protocol}s")[j]:
                genuine.append(distance)
    return genuine, impostor


@st.composite
def sets_with_ties(draw):
    def draw_set(size):
        numbers = [draw(st.lists(st.integers(0, high), min_size=size, max_size=size)) for high in (3, 3, 2, 2, 2)]
        features = torch.tensor(numbers[:2], dtype=torch.float32).t()
        return FeatureSet(features, *(torch.tensor(values) for values in numbers[2:]))

    return draw_set(draw(st.integers(1, 6))), draw_set(draw(st.integers(1, 9)))


@settings(deadline=None, max_examples=60)
@given(sets_with_ties(), st.sampled_from(["camera", "scene"]), st.integers(1, 3000), st.floats(0, 1))
def test_it_counts_the_pairs_of_the_definition(sets, protocol, chunk_bytes, rate):
    genuine, impostor = naive_pairs(*sets, protocol)
    arguments = {"protocol": protocol, "normalize": False, "chunk_bytes": chunk_bytes}
    if not genuine or not impostor:
        with pytest.raises(ValueError, match=r"no genuine pair|no impostor pair"):
            roc(*sets, **arguments)
        return
    found = roc(*sets, **arguments)
    assert (found.genuine, found.impostors) == (len(genuine), len(impostor))
    assert found.thresholds.tolist() == sorted(set(genuine))
    assert found.true_accepts.tolist() == [sum(d <= t for d in genuine) for t in found.thresholds]
    assert found.false_accepts.tolist() == [sum(d <= t for d in impostor) for t in found.thresholds]
    nearer = [(g < i) + (g == i) / 2 for g in genuine for i in impostor]
    assert found.area == pytest.approx(np.mean(nearer))

    point = found.at(rate)
    allowed = [t for t in genuine if np.mean([d <= t for d in impostor]) <= rate]
    assert point.threshold == (max(allowed) if allowed else None)
    assert point.true_accept_rate == pytest.approx(len(allowed) / len(genuine))
    assert point.false_accept_rate <= rate


def test_a_rate_that_cannot_be_is_refused(golden_sets):
    found = roc(golden_sets[0][:40], golden_sets[1][:60])
    with pytest.raises(ValueError, match=r"false_accept_rate must be in 0\.\.1, got 1\.5"):
        found.at(1.5)


def test_scikit_learn_agrees(golden_sets):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn (extra embedding)")
    query, gallery = golden_sets
    found = roc(query, gallery)
    units = [torch.nn.functional.normalize(part.features.double(), dim=1) for part in (query, gallery)]
    squared = torch.cdist(*units).square()
    same = query.identities[:, None] == gallery.identities
    kept = ~(same & (query.cameras[:, None] == gallery.cameras))
    labels, scores = same[kept].numpy(), -squared[kept].numpy()
    assert found.area == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-6)
    false, true, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    for rate in (0.001, 0.01, 0.1):
        assert found.at(rate).true_accept_rate == pytest.approx(true[false <= rate].max(), abs=1e-3)
