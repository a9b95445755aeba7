from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signal_reid.data.errors import DataError
from signal_reid.data.sampler import IdentitySampler

LABELS = [identity for identity, count in enumerate((7, 3, 12, 5, 4, 9)) for _ in range(count)]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 20), min_size=2, max_size=12),
    st.integers(2, 4),
    st.integers(2, 5),
    st.integers(0, 3),
)
def test_every_batch_holds_p_identities_of_k_images(counts, identities, instances, epoch):
    identities = min(identities, len(counts))
    labels = [identity for identity, count in enumerate(counts) for _ in range(count)]
    sampler = IdentitySampler(labels, identities * instances, instances, seed=3)
    batches = sampler.batches(epoch)
    assert batches
    for batch in batches:
        assert sorted(Counter(labels[index] for index in batch).values()) == [instances] * identities
        groups = [batch[start : start + instances] for start in range(0, len(batch), instances)]
        assert all(len({labels[index] for index in group}) == 1 for group in groups)


def test_no_image_is_dealt_twice_in_an_epoch_unless_its_identity_has_too_few():
    dealt = Counter(index for batch in IdentitySampler(LABELS, 8, 4, seed=0).batches(0) for index in batch)
    assert {LABELS[index] for index, times in dealt.items() if times > 1} <= {1}


def test_an_identity_with_too_few_images_is_drawn_with_replacement():
    batches = IdentitySampler([0, 1, 1, 1, 1], 8, 4, seed=0).batches(0)
    assert len(batches) == 1
    assert batches[0].count(0) == 4


def test_an_epoch_ends_when_too_few_identities_have_groups_left():
    sampler = IdentitySampler([0] * 40 + [1] * 4, 4, 2, seed=0)
    assert len(sampler.batches(0)) == 2


def test_all_groups_are_dealt_when_the_identities_are_even():
    sampler = IdentitySampler([0] * 9 + [1] * 8, 4, 2, seed=0)
    assert len(sampler.batches(0)) == 4


def test_the_same_seed_and_epoch_give_the_same_batches():
    first, second = IdentitySampler(LABELS, 8, 4, seed=5), IdentitySampler(LABELS, 8, 4, seed=5)
    second.batches(0)
    assert first.batches(3) == second.batches(3)


def test_another_epoch_or_seed_gives_other_batches():
    sampler = IdentitySampler(LABELS, 8, 4, seed=5)
    assert sampler.batches(0) != sampler.batches(1)
    assert sampler.batches(0) != IdentitySampler(LABELS, 8, 4, seed=6).batches(0)


def test_iteration_deals_the_chosen_epoch():
    sampler = IdentitySampler(LABELS, 8, 4, seed=5)
    sampler.set_epoch(2)
    assert list(sampler) == sampler.batches(2)
    assert len(sampler) == len(sampler.batches(2))


def test_batch_size_must_be_a_multiple_of_instances():
    with pytest.raises(DataError, match=r"batch_size must be a multiple of instances \(4\), got 10"):
        IdentitySampler(LABELS, 10, 4, seed=0)


def test_too_few_identities_are_refused():
    with pytest.raises(DataError, match="needs at least 2 identities, got 1"):
        IdentitySampler([0, 0, 0, 0], 4, 2, seed=0)
