"""Selection keeps what a plain loop over the scores keeps, ties included, on every backend."""

import pytest
import torch
from hypothesis import strategies as st

from signal_reid.ops import BackendError, select_tokens, use_backend
from signal_reid.ops.cuda import core
from signal_reid.ops.cuda import token_selection as on_cuda
from signal_reid.ops.reference import token_selection as oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = {"B": st.integers(1, 2), "M": st.integers(2, 4), "dtype": st.sampled_from(DTYPES), "data": st.data()}


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
    return mask.to(tokens.device)


def integers(*shape, dtype=torch.float32):
    """Small whole numbers: sums are exact in every dtype, and ties abound."""
    return torch.randint(-2, 3, shape).to(dtype)


def assert_keeps_what_the_oracle_keeps(tokens, intra_query, inter_query, k_intra, k_inter):
    arguments = tokens, intra_query, inter_query, k_intra, k_inter
    assert torch.equal(select_tokens(*arguments), oracle.select_tokens(*arguments))


def counts(data, M, N):
    return data.draw(st.integers(1, N)), data.draw(st.integers(1, (M - 1) * N))


def test_keeps_what_a_loop_keeps_ties_included(backend):
    def check(B, M, N, C, dtype, data):
        arguments = [integers(*shape, dtype=dtype) for shape in ((B, M, N, C), (B, M, C), (B, M, C))]
        k = counts(data, M, N)
        assert torch.equal(select_tokens(*arguments, *k), by_loop(*arguments, *k))

    backend.for_all(check, **SIZES, N=st.sampled_from([1, 2, 5, 31]), C=st.integers(1, 6))


def test_keeps_what_the_oracle_keeps_at_odd_sizes(backend):
    def check(B, M, N, C, dtype, data):
        arguments = [integers(*shape, dtype=dtype) for shape in ((B, M, N, C), (B, M, C), (B, M, C))]
        assert_keeps_what_the_oracle_keeps(*arguments, *counts(data, M, N))

    C = st.sampled_from([1, 3, 8, 17, 40, 264])
    backend.for_all(check, **SIZES, N=st.sampled_from([1, 5, 31, 64, 127, 129]), C=C)


def test_takes_the_tokens_of_a_vit_without_the_class_token(backend):
    def check(B, M, N, C, dtype, data):
        features = integers(B, M, N + 1, C, dtype=dtype)
        inter_query = integers(M, B, C, dtype=dtype).transpose(0, 1)
        arguments = features[:, :, 1:], features[:, :, 0], inter_query
        assert_keeps_what_the_oracle_keeps(*arguments, *counts(data, M, N))

    backend.for_all(check, **SIZES, N=st.sampled_from([1, 5, 128]), C=st.sampled_from([3, 8, 512]))


def test_nan_and_infinity_rank_as_in_topk_and_zero_has_no_sign(backend):
    def check(B, M, N, dtype, data):
        tokens = integers(B, M, N, 1, dtype=dtype)  # one channel: infinity times zero is in question nowhere else
        values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=dtype)
        chosen = torch.rand(B, M, N, 1) < 0.5
        tokens[chosen] = values[torch.randint(0, 5, (int(chosen.sum()),))]
        ones = torch.ones(B, M, 1, dtype=dtype)
        assert_keeps_what_the_oracle_keeps(tokens, ones, -ones, *counts(data, M, N))

    backend.for_all(check, **SIZES, N=st.sampled_from([1, 5, 31, 64, 129]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_scores_select_as_the_oracle_in_fp64_where_they_differ_clearly(backend, dtype):
    B, M, N, C, k = 1, 3, 128, 512, 80
    arguments = [torch.randn(*shape).to(dtype) for shape in ((B, M, N, C), (B, M, C), (B, M, C))]
    mask = select_tokens(*arguments, k, 1)
    scores = torch.einsum("bmnc,bmc->bmn", arguments[0].double(), arguments[1].double())
    threshold = scores.topk(k).values[..., -1:]
    assert mask[scores > threshold + 1e-3].all()
    only_inter = mask & (scores < threshold - 1e-3)
    assert only_inter.sum() <= B * M  # each modality adds one token of the others


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are neither emulated nor interpreted beside a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_and_triton_agree_to_the_bit_where_sums_are_exact(emulated_core, dtype):
    for seed, (M, N, C) in enumerate([(2, 31, 1), (3, 129, 8), (4, 5, 40)]):
        torch.manual_seed(seed)
        arguments = [integers(*shape, dtype=dtype) for shape in ((1, M, N, C), (1, M, C), (1, M, C))]
        masks = []
        for name in ("cuda", "triton"):
            with core.use(emulated_core), use_backend(name):
                masks.append(select_tokens(*arguments, N // 2, N - 1))
        assert torch.equal(*masks)


def test_nan_counts_as_largest(backend):
    tokens = integers(1, 2, 4, 3)
    tokens[0, 0, 2, 1] = float("nan")
    query = torch.ones(1, 2, 3)
    mask = select_tokens(tokens, query, query, 1, 1)
    assert mask[0, 0].tolist() == [False, False, True, False]


def test_columns_that_are_not_contiguous(backend):
    tokens, intra_query = integers(2, 3, 16, 5).transpose(2, 3), integers(2, 16, 3).transpose(1, 2)
    assert_keeps_what_the_oracle_keeps(tokens, intra_query, integers(2, 3, 16), 2, 4)


def test_queries_that_are_expanded(backend):
    query = integers(1, 1, 16).expand(2, 3, -1)
    assert_keeps_what_the_oracle_keeps(integers(2, 3, 9, 16), query, query, 2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_off_16_bytes(backend, dtype):
    storage = integers(2 * 3 * 9 * 16 + 1, dtype=dtype)
    queries = integers(2, 2, 3, 16, dtype=dtype)
    assert_keeps_what_the_oracle_keeps(storage[1:].view(2, 3, 9, 16), *queries, 4, 7)


def test_more_channels_than_one_block_holds(backend):
    assert_keeps_what_the_oracle_keeps(integers(1, 2, 5, 1100), integers(1, 2, 1100), integers(1, 2, 1100), 2, 3)


def test_many_modalities(backend):
    assert_keeps_what_the_oracle_keeps(integers(1, 7, 33, 24), integers(1, 7, 24), integers(1, 7, 24), 3, 5)


def test_lists_longer_than_a_block(backend):
    assert_keeps_what_the_oracle_keeps(integers(1, 3, 1100, 8), integers(1, 3, 8), integers(1, 3, 8), 700, 2100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the core is not emulated beside a GPU")
@pytest.mark.parametrize(("dtype", "C"), [(torch.float32, 8), (torch.float16, 8), (torch.float16, 7)])
def test_cuda_takes_as_many_tokens_as_shared_memory_holds_and_refuses_one_more(emulated_core, dtype, C):
    M, limit, tag = 7, emulated_core.shared_bytes_per_block(0), core.DTYPE_TAGS[dtype]
    sizes = range(1, 1024)
    needed = [emulated_core.select_tokens_shared_bytes(M=M, N=N, C=C, dtype=tag) for N in sizes]
    N = sum(size <= limit for size in needed)
    assert sizes[0] < N < sizes[-1]
    arguments = [integers(*shape, dtype=dtype) for shape in ((1, M, N + 1, C), (1, M, C), (1, M, C))]
    with core.use(emulated_core), use_backend("cuda"):
        assert_keeps_what_the_oracle_keeps(arguments[0][:, :, :N], *arguments[1:], 3, 5)
        with pytest.raises(BackendError, match="of shared memory"):
            select_tokens(*arguments, 3, 5)


@pytest.mark.parametrize("splits", [2, 3, 40])
def test_blocks_that_share_a_sample_select_to_the_bit_what_one_block_does(emulated_core, monkeypatch, splits):
    arguments = torch.randn(2, 3, 43, 40), torch.randn(2, 3, 40), torch.randn(2, 3, 40), 5, 9
    masks = []
    for number in (1, splits):
        monkeypatch.setattr(on_cuda, "_splits", lambda *_, number=number: number)
        with core.use(emulated_core), use_backend("cuda"):
            masks.append(select_tokens(*arguments))
    assert torch.equal(*masks)


@pytest.mark.parametrize(("B", "N", "splits"), [(164, 128, 1), (64, 128, 2), (20, 128, 8), (1, 128, 12), (1, 5, 1)])
def test_a_sample_is_shared_where_there_are_fewer_than_two_blocks_for_each_multiprocessor(B, N, splits):
    assert on_cuda._splits(82, B, 3, N) == splits


def test_no_samples_give_an_empty_mask(backend):
    mask = select_tokens(torch.empty(0, 3, 8, 4), torch.empty(0, 3, 4), torch.empty(0, 3, 4), 1, 1)
    assert mask.shape == (0, 3, 8)


def test_is_the_same_to_the_bit_whatever_the_schedule(backend):
    arguments = torch.randn(1, 3, 33, 40), torch.randn(1, 3, 40), torch.randn(1, 3, 40)
    masks = []
    for seed in (1, 2, 3):
        backend.reseed(seed)
        masks.append(select_tokens(*arguments, 5, 9))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_no_gradient_passes(backend):
    tokens = torch.randn(1, 2, 4, 3, requires_grad=True)
    assert not select_tokens(tokens, torch.randn(1, 2, 3), torch.randn(1, 2, 3), 2, 2).requires_grad


def test_autocast_does_not_round_the_scores_that_choose_tokens():
    torch.manual_seed(0)
    tokens, cls = torch.randn(64, 3, 128, 64).bfloat16(), torch.randn(64, 3, 64).bfloat16()
    inter_query = torch.zeros_like(cls)
    with torch.autocast("cpu", torch.bfloat16):
        mask = select_tokens(tokens, cls, inter_query, 40, 1)
    assert torch.equal(mask, select_tokens(tokens, cls, inter_query, 40, 1))


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
