"""The CUDA kernel of token selection, run by the emulator, keeps what the oracle keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signal_reid.ops.cuda import token_selection
from signal_reid.ops.dispatch import BackendError
from signal_reid.ops.reference import token_selection as oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def integers(*shape, dtype=torch.float32):
    """Small whole numbers: sums are exact in every dtype, and ties abound."""
    return torch.randint(-2, 3, shape).to(dtype)


def assert_same(tokens, intra_query, inter_query, k_intra, k_inter):
    arguments = tokens, intra_query, inter_query, k_intra, k_inter
    assert torch.equal(token_selection.select_tokens(*arguments), oracle.select_tokens(*arguments))


@pytest.fixture(scope="module")
def check(on_emulator, examples):
    """Tries a property on random sizes, counts to keep and schedules."""

    def run(prepare, sizes=(1, 5, 31, 64, 127, 129), channels=(1, 3, 8, 17, 40, 264)):
        @given(
            st.integers(1, 2),
            st.integers(2, 4),
            st.sampled_from(sizes),
            st.sampled_from(channels),
            st.sampled_from(DTYPES),
            st.randoms(use_true_random=False),
        )
        @settings(max_examples=examples, deadline=None)
        def property_holds(B, M, N, C, dtype, random):
            torch.manual_seed(random.randrange(1000))
            on_emulator(random.randrange(1000))
            k_intra, k_inter = random.randint(1, N), random.randint(1, (M - 1) * N)
            assert_same(*prepare(B, M, N, C, dtype), k_intra, k_inter)

        property_holds()

    return run


def test_keeps_what_the_oracle_keeps_ties_included(check):
    check(lambda B, M, N, C, dtype: [integers(*shape, dtype=dtype) for shape in ((B, M, N, C), (B, M, C), (B, M, C))])


def test_takes_the_tokens_of_a_vit_without_the_class_token(check):
    def sliced(B, M, N, C, dtype):
        features = integers(B, M, N + 1, C, dtype=dtype)
        return features[:, :, 1:], features[:, :, 0], integers(M, B, C, dtype=dtype).transpose(0, 1)

    check(sliced, sizes=(1, 5, 128), channels=(3, 8, 512))


def test_nan_and_infinity_rank_as_in_topk(check):
    def extreme(B, M, N, C, dtype):
        tokens = integers(B, M, N, 1, dtype=dtype)  # one channel: infinity times zero is in question nowhere else
        values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=dtype)
        chosen = torch.rand(B, M, N, 1) < 0.5
        tokens[chosen] = values[torch.randint(0, 5, (int(chosen.sum()),))]
        return tokens, torch.ones(B, M, 1, dtype=dtype), -torch.ones(B, M, 1, dtype=dtype)

    check(extreme)


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_scores_select_as_the_oracle_in_fp64_where_they_differ_clearly(on_emulator, dtype):
    torch.manual_seed(0)
    B, M, N, C, k = 2, 3, 128, 512, 80
    arguments = [torch.randn(*shape).to(dtype) for shape in ((B, M, N, C), (B, M, C), (B, M, C))]
    mask = token_selection.select_tokens(*arguments, k, 1)
    scores = torch.einsum("bmnc,bmc->bmn", arguments[0].double(), arguments[1].double())
    threshold = scores.topk(k).values[..., -1:]
    assert mask[scores > threshold + 1e-3].all()
    only_inter = mask & (scores < threshold - 1e-3)
    assert only_inter.sum() <= B * M  # each modality adds one token of the others


def test_columns_that_are_not_contiguous_are_copied(on_emulator):
    assert_same(integers(2, 3, 16, 5).transpose(2, 3), integers(2, 16, 3).transpose(1, 2), integers(2, 3, 16), 2, 4)


def test_misaligned_tokens_are_read_element_by_element(on_emulator):
    storage = integers(2 * 3 * 9 * 16 + 1)
    assert_same(storage[1:].view(2, 3, 9, 16), integers(2, 3, 16), integers(2, 3, 16), 4, 7)


def test_more_modalities_than_are_ranked_at_once(on_emulator):
    assert_same(integers(1, 7, 33, 24), integers(1, 7, 24), integers(1, 7, 24), 3, 5)


def test_many_tokens(on_emulator):
    assert_same(integers(1, 3, 1024, 8), integers(1, 3, 8), integers(1, 3, 8), 700, 2048)


def test_no_samples_give_an_empty_mask(on_emulator):
    mask = token_selection.select_tokens(torch.empty(0, 3, 8, 4), torch.empty(0, 3, 4), torch.empty(0, 3, 4), 1, 1)
    assert mask.shape == (0, 3, 8)


def test_scores_beyond_shared_memory_are_refused_in_words(on_emulator):
    with pytest.raises(BackendError, match=r"tokens of shape \(1, 4, 2048, 8\).*shared memory; use backend reference"):
        assert_same(integers(1, 4, 2048, 8), integers(1, 4, 8), integers(1, 4, 8), 1, 1)
