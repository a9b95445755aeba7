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


def test_an_unknown_protocol_is_named_with_the_known_ones(pair):
    with pytest.raises(ValueError, match="protocol must be one of camera, scene, got 'cam'"):
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
def test_pairs_of_one_identity_are_those_of_the_whole_matrix(golden_sets, protocol, rows):
    query, gallery = golden_sets
    drop = dropped(protocol, query, gallery)[rows]
    same = query.identities[rows, None] == gallery.identities
    pairs = SameIdentity(query, gallery, protocol).pairs(rows)
    assert torch.equal(torch.stack((pairs.row, pairs.column), 1), same.nonzero())
    assert torch.equal(pairs.drop, drop[pairs.row, pairs.column])
    assert pairs.slot.tolist() == [slot for row in same for slot in range(int(row.sum()))]


def test_the_most_pairs_that_a_query_has_are_known(pair):
    assert SameIdentity(*pair, "camera").most == 3
