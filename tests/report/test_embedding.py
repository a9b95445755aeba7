import builtins

import numpy as np
import pytest
import torch

from signal_reid.evaluation import FeatureSet, dropped
from signal_reid.report.embedding import (
    Similarities,
    draw_embedding,
    draw_map,
    embedding_map,
    identity_colours,
    map_picture,
    project,
    similarities,
    similarities_picture,
)
from signal_reid.runtime.errors import InputError


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(36)
    features = torch.randn(36, 8, generator=generator) + 3 * torch.nn.functional.one_hot(labels % 6, 8)
    return FeatureSet(features, labels % 6, labels // 6 % 3)


def test_principal_components_hold_the_largest_variances_of_unit_features(items):
    places = project(items.features)
    unit = items.features.double() / items.features.double().norm(dim=1, keepdim=True)
    variances = np.linalg.eigvalsh(np.cov(unit.numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(places.var(0), variances[:2], rtol=1e-9)
    assert abs(np.cov(places.T)[0, 1]) < 1e-12


def test_the_same_seed_gives_the_same_map(items):
    np.testing.assert_array_equal(project(items.features), project(items.features.clone(), seed=4))
    pytest.importorskip("sklearn", reason="t-SNE needs scikit-learn")
    first, second = (project(items.features[:12], "tsne", 1) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (12, 2)


def test_umap_is_reproducible(items):
    pytest.importorskip("umap", reason="UMAP needs umap-learn")
    first, second = (project(items.features, "umap", 1) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("projection", "module", "library"), [("tsne", "sklearn", "scikit-learn"), ("umap", "umap", "umap-learn")]
)
def test_a_library_that_is_not_installed_is_named(monkeypatch, items, projection, module, library):
    importing = builtins.__import__

    def lacking(name, *arguments):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return importing(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(InputError, match=rf"map={projection} needs {library}: pip install 'signal-reid\[embedding\]'"):
        project(items.features, projection)


def test_too_few_samples_are_refused(items):
    with pytest.raises(InputError, match="a map needs at least 3 samples, got 2"):
        project(items.features[:2])


def test_similarities_count_the_pairs_that_the_protocol_ranks(items):
    found = similarities(items[:9], items, "camera", bins=20)
    unit = items.features.double() / items.features.double().norm(dim=1, keepdim=True)
    cosine = unit[:9] @ unit.T
    same = items.identities[:9, None] == items.identities
    pairs = (cosine[same & ~dropped("camera", items[:9], items)], cosine[~same])
    for kind, counts in enumerate((found.right, found.wrong)):
        np.testing.assert_array_equal(counts, np.histogram(pairs[kind].numpy(), 20, (-1, 1))[0])
        assert found.means[kind] == pytest.approx(float(pairs[kind].mean()), abs=1e-6)
        assert found.deviations[kind] == pytest.approx(float(pairs[kind].std(correction=0)), abs=1e-6)
    shares = [counts / counts.sum() for counts in (found.right, found.wrong)]
    assert found.overlap == pytest.approx(sum(min(a, b) for a, b in zip(*shares, strict=True)))


def test_what_is_drawn_of_the_similarities_holds_every_pair(items):
    found = similarities(items, items, "camera")
    edges, right, wrong = found.drawn()
    assert (right.sum(), wrong.sum()) == (found.right.sum(), found.wrong.sum())
    assert len(right) <= 50
    np.testing.assert_allclose(np.diff(edges), edges[1] - edges[0])
    narrow = Similarities(found.edges, found.right * 0, np.eye(4000)[3999] + np.eye(4000)[3900], (0, 0), (0, 0))
    edges, right, wrong = narrow.drawn()
    assert (len(wrong), wrong.sum()) == (50, 2)
    assert edges[-1] == 1


def test_a_map_has_the_asked_for_number_of_identities_spread_over_all(items):
    found = embedding_map(items, identities=3)
    assert sorted(set(found.identities.tolist())) == [0, 2, 5]
    assert (len(found.places), found.of) == (18, 6)
    with pytest.raises(InputError, match="count must be at least 1, got 0"):
        embedding_map(items, identities=0)


def test_identities_differ_in_colour_and_cameras_in_shape(items):
    found = embedding_map(items)
    drawn = {}
    for line in draw_map(found).axes[0].lines:
        for x, y in zip(*line.get_data(), strict=True):
            drawn[round(float(x), 9), round(float(y), 9)] = (tuple(line.get_color()), line.get_marker())
    looks = [drawn[tuple(place)] for place in found.places.round(9).tolist()]
    assert len(looks) == 36
    for labels, part in ((found.identities, 0), (found.cameras, 1)):
        pairs = {(int(label), look[part]) for label, look in zip(labels, looks, strict=True)}
        assert len(pairs) == len({label for label, _ in pairs}) == len({look for _, look in pairs})


def test_colours_of_identities_are_different():
    assert len(set(identity_colours(30))) == 30


def test_the_pictures_have_their_numbers(items):
    found, pairs = embedding_map(items), similarities(items, items, "camera")
    assert len(map_picture(found).tables[0].rows) == 36
    picture = similarities_picture(pairs)
    assert [row[:2] for row in picture.tables[0].rows] == [
        ["right", int(pairs.right.sum())],
        ["wrong", int(pairs.wrong.sum())],
    ]
    assert len(draw_embedding(found, pairs, "column").axes) == 2
