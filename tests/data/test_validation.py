"""Identities that are held out of training."""

import pytest

from signal_reid.data import DataError, hold_out, open_dataset


@pytest.fixture(scope="module")
def dataset(synthetic):
    return open_dataset("rgbnt201", synthetic())


def test_no_identity_is_in_both_parts_and_no_sample_is_lost(dataset):
    left, held = hold_out(dataset, 0.4, 0)
    kept, out = ({sample.identity for sample in samples} for samples in (left.train, held.query))
    assert (len(kept), len(out), kept & out) == (3, 2, set())
    assert sorted(left.train + held.query, key=lambda sample: sample.name) == dataset.train
    assert held.gallery == held.query
    assert (left.query, left.gallery, left.num_cameras) == (dataset.query, dataset.gallery, dataset.num_cameras)


def test_the_seed_chooses_them(dataset):
    chosen = [tuple(sorted({s.identity for s in hold_out(dataset, 0.4, seed)[1].query})) for seed in range(8)]
    assert chosen == [tuple(sorted({s.identity for s in hold_out(dataset, 0.4, seed)[1].query})) for seed in range(8)]
    assert len(set(chosen)) > 1


@pytest.mark.parametrize(("share", "count"), [(0.2, 1), (0.9, 4)])
def test_two_identities_are_held_out_and_two_are_left(dataset, share, count):
    with pytest.raises(DataError, match=rf"leave at least 2 of 5 .*, got {share}, which holds out {count}$"):
        hold_out(dataset, share, 0)
