"""Selection keeps what a plain loop over torch.topk keeps, and says what is wrong with bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signal_reid.ops import select_tokens


def by_loop(tokens, intra_query, inter_query, k_intra, k_inter):
    """One sample, one modality, one token at a time; lower index first among equals, NaN before everything."""
    B, M, N, _ = tokens.shape
    mask = torch.zeros(B, M, N, dtype=torch.bool)

    def best(scores, k):
        key = [(float("inf") if s != s else s, s != s) for s in scores]
        return sorted(range(len(scores)), key=lambda i: (not key[i][1], -key[i][0], i))[:k]

    for b in range(B):
        for m in range(M):
            own = (tokens[b, m].double() @ intra_query[b, m].double()).tolist()
            mask[b, m, best(own, k_intra)] = True
            others = [o for o in range(M) if o != m]
            scores = torch.cat([tokens[b, o].double() @ inter_query[b, m].double() for o in others]).tolist()
            for index in best(scores, k_inter):
                mask[b, others[index // N], index % N] = True
    return mask


def integers(*shape, low=-2, high=3):
    """Small whole numbers: sums are exact in every dtype, and ties abound."""
    return torch.randint(low, high, shape).float()


@given(
    st.integers(0, 3),
    st.integers(2, 4),
    st.sampled_from([1, 2, 5, 31]),
    st.integers(1, 6),
    st.data(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(deadline=None, max_examples=60)
def test_keeps_what_a_loop_keeps_ties_included(B, M, N, C, data, dtype):
    torch.manual_seed(data.draw(st.integers(0, 999)))
    k_intra, k_inter = data.draw(st.integers(1, N)), data.draw(st.integers(1, (M - 1) * N))
    arguments = integers(B, M, N, C).to(dtype), integers(B, M, C).to(dtype), integers(B, M, C).to(dtype)
    assert torch.equal(select_tokens(*arguments, k_intra, k_inter), by_loop(*arguments, k_intra, k_inter))


def test_real_scores_agree_with_topk():
    tokens, query = torch.randn(4, 3, 128, 64), torch.randn(4, 3, 64)
    mask = select_tokens(tokens, query, torch.zeros_like(query), 80, 1)
    scores = (tokens @ query[..., None]).squeeze(-1)
    kept = torch.zeros_like(mask).scatter_(2, scores.topk(80).indices, True)
    kept[:, 0, 0] = kept[:, 1, 0] = True  # all inter scores tie, so the first token of another modality is kept
    assert torch.equal(mask, kept)


def test_nan_counts_as_largest():
    tokens = integers(1, 2, 4, 3)
    tokens[0, 0, 2, 1] = float("nan")
    query = torch.ones(1, 2, 3)
    mask = select_tokens(tokens, query, query, 1, 1)
    assert mask[0, 0].tolist() == [False, False, True, False]


def test_strided_tokens_are_taken_as_they_are():
    sequence = torch.randn(2, 3, 17, 8)
    query = torch.randn(2, 3, 8)
    strided, packed = sequence[:, :, 1:], sequence[:, :, 1:].contiguous()
    assert torch.equal(select_tokens(strided, query, query, 5, 7), select_tokens(packed, query, query, 5, 7))


def test_no_gradient_passes():
    tokens = torch.randn(1, 2, 4, 3, requires_grad=True)
    assert not select_tokens(tokens, torch.randn(1, 2, 3), torch.randn(1, 2, 3), 2, 2).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_intra": 5}, r"k_intra must be in 1\.\.4 \(N\), got 5"),
        ({"k_intra": 0}, r"k_intra must be in 1\.\.4 \(N\), got 0"),
        ({"k_inter": 5}, r"k_inter must be in 1\.\.4 \(\(M - 1\) N\), got 5"),
        ({"tokens": torch.randn(1, 1, 4, 3)}, "tokens must hold at least 2 modalities"),
        ({"tokens": torch.randn(2, 4, 3)}, r"tokens must be \(B, M, N, C\)"),
        ({"tokens": torch.ones(1, 2, 4, 3, dtype=torch.int64)}, "tokens must be float32"),
        ({"intra_query": torch.randn(1, 2, 4)}, r"intra_query must have shape \(1, 2, 3\)"),
        ({"inter_query": torch.randn(1, 2, 3).half()}, "inter_query must have the dtype of tokens"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "tokens": torch.randn(1, 2, 4, 3),
        "intra_query": torch.randn(1, 2, 3),
        "inter_query": torch.randn(1, 2, 3),
        "k_intra": 2,
        "k_inter": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        select_tokens(**arguments)
