from dataclasses import replace

import pytest
import torch

from signal_reid.evaluation import PROTOCOLS, dropped, retrieval_metrics
from signal_reid.evaluation.protocols import SameIdentity


@pytest.fixture
def pair(make_set):
    query = make_set([[0.0]], identities=[1], cameras=[2], scenes=[3])
    gallery = make_set([[0.0]] * 4, identities=[1, 1, 1, 9], cameras=[2, 2, 5, 2], scenes=[3, 8, 3, 3])
    return query, gallery


def test_camera_drops_the_querys_identity_and_camera(pair):
    assert dropped("camera", *pair).tolist() == [[True, True, False, False]]


def test_scene_drops_the_querys_identity_and_scene(pair):
    assert dropped("scene", *pair).tolist() == [[True, False, True, False]]


def test_none_drops_the_query_itself_alone(pair):
    query, gallery = pair
    assert not dropped("none", query, gallery).any()  # nothing says that one of them is the query
    query, gallery = replace(query, items=torch.tensor([5])), replace(gallery, items=torch.tensor([4, 5, 6, 7]))
    assert dropped("none", query, gallery).tolist() == [[False, True, False, False]]


def test_none_measures_as_its_definition_says(golden_sets):
    sets = golden_sets[0]
    metrics = retrieval_metrics(sets, sets, protocol="none")
    features = torch.nn.functional.normalize(sets.features.double(), dim=1)
    precisions = []
    for row, (feature, identity) in enumerate(zip(features, sets.identities, strict=True)):
        order = [i for i in (features - feature).square().sum(1).argsort().tolist() if i != row]
        hits = [rank for rank, i in enumerate(order, start=1) if sets.identities[i] == identity]
        if hits:
            precisions.append(sum(n / rank for n, rank in enumerate(hits, start=1)) / len(hits))
    assert metrics.num_valid_queries == len(precisions)
    assert metrics.mAP == pytest.approx(sum(precisions) / len(precisions), rel=1e-6)


def test_an_unknown_protocol_is_named_with_the_known_ones(pair):
    with pytest.raises(ValueError, match="protocol must be one of camera, scene, none, got 'cam'"):
        dropped("cam", *pair)


@pytest.mark.parametrize("side", [0, 1])
def test_scene_without_scenes_names_the_set_that_lacks_them(pair, make_set, side):
    sets = list(pair)
    sets[side] = make_set([[0.0]], [1], [2])
    with pytest.raises(ValueError, match=f"protocol scene needs scenes, and the {('query', 'gallery')[side]} set"):
        retrieval_metrics(*sets, protocol="scene")


def test_every_protocol_drops_a_query_from_its_own_gallery(golden_sets):
    query = golden_sets[0]
    for protocol in PROTOCOLS:
        assert dropped(protocol, query, query).diagonal().all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("rows", [slice(None), slice(3, 7), slice(5, 5)])
def test_candidates_are_the_items_of_the_query_s_identity(golden_sets, protocol, rows):
    query, gallery = golden_sets
    drop = dropped(protocol, query, gallery)[rows]
    same = query.identities[rows, None] == gallery.identities
    columns, match, dropped_ones = SameIdentity(query, gallery, protocol).candidates(rows)
    assert all(len(set(row.tolist())) == len(row) for row in columns)
    assert [row[kept].tolist() for row, kept in zip(columns, match | dropped_ones, strict=True)] == [
        row.nonzero().flatten().tolist() for row in same
    ]
    assert torch.equal(dropped_ones, drop.gather(1, columns))
    assert torch.equal(match, (same & ~drop).gather(1, columns))


def test_a_query_of_an_unknown_identity_has_no_candidates(make_set):
    query = make_set([[0.0]] * 3, [9, 1, 5], [0, 0, 0])
    gallery = make_set([[0.0]] * 3, [1, 1, 7], [0, 1, 0])
    columns, match, drop = SameIdentity(query, gallery, "camera").candidates(slice(None))
    assert columns.shape == (3, 2)
    assert match.tolist() == [[False, False], [False, True], [False, False]]
    assert drop.tolist() == [[False, False], [True, False], [False, False]]


def test_the_most_candidates_that_a_query_has_are_known(pair):
    assert SameIdentity(*pair, "camera").most == 3
