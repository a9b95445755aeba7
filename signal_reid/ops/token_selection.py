"""Top-k token selection within and across modalities."""

import torch
from torch import Tensor

from signal_reid.ops import library  # noqa: F401 - defines torch.ops.signal_reid
from signal_reid.ops.checks import check_floating, check_range, check_same
from signal_reid.ops.layout import as_autocast_promotes


@torch.no_grad()
def select_tokens(tokens: Tensor, intra_query: Tensor, inter_query: Tensor, k_intra: int, k_inter: int) -> Tensor:
    """Mark the patch tokens that survive selection; no gradient passes through it.

    Modality m keeps the `k_intra` of its own tokens with the largest `intra_query[:, m] . token`, and the `k_inter` of
    the other modalities' (M - 1) N tokens with the largest `inter_query[:, m] . token`. A token survives if any of
    these kept it. Ties go to the lower index; NaN counts as largest, as in `torch.topk`.

    Args:
        tokens: (B, M, N, C) patch tokens, fp32, fp16, bf16 or fp64, M >= 2; any strides but a unit last one.
        intra_query: (B, M, C) of the same dtype, the class tokens. Under autocast dtypes may differ; the widest serves.
        inter_query: (B, M, C), the class tokens projected by `W_k^T W_q`, so that no token needs projecting.
        k_intra: tokens kept per modality by its own query, in 1..N.
        k_inter: tokens kept per modality among the others', in 1..(M - 1) N.

    Returns:
        (B, M, N) bool, true where the token survives.

    Raises:
        ValueError: a shape, dtype, device or k outside of these.

    Source: Signal (AAAI 2026), selective interaction module.
    """
    check_floating("tokens", tokens, "(B, M, N, C)", 4)
    B, M, N, C = tokens.shape
    if M < 2:
        raise ValueError(f"tokens must hold at least 2 modalities (B, M, N, C), got shape {tuple(tokens.shape)}")
    tokens, intra_query, inter_query = as_autocast_promotes(tokens, intra_query, inter_query)
    for name, query in (("intra_query", intra_query), ("inter_query", inter_query)):
        check_same(name, query, "tokens", tokens, (B, M, C))
    check_range("k_intra", k_intra, N, "N")
    check_range("k_inter", k_inter, (M - 1) * N, "(M - 1) N")
    return torch.ops.signal_reid.select_tokens(tokens, intra_query, inter_query, k_intra, k_inter)
