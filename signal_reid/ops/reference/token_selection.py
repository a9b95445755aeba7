"""Top-k token selection within and across modalities, in plain PyTorch."""

import torch
from torch import Tensor


def select_tokens(tokens: Tensor, intra_query: Tensor, inter_query: Tensor, k_intra: int, k_inter: int) -> Tensor:
    """Union of the tokens that any class token ranks among its best; see `signal_reid.ops.select_tokens`.

    The score of a token is its inner product with the query, in fp32 or wider; a positive scale or a constant added to
    a query's scores would not change their order, so the formula's 1/sqrt(C), softmax and key bias are left out.
    """
    with torch.autocast(tokens.device.type, enabled=False):  # it would round the scores
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        scores = queries_of_each_map(intra_query, inter_query).to(wide.dtype) @ wide.mT  # (B, M, 1 + M, N)
    return keep_best(scores, k_intra, k_inter)


def queries_of_each_map(intra_query: Tensor, inter_query: Tensor) -> Tensor:
    """(B, M, C) twice -> (B, M, 1 + M, C): all that a modality's tokens are scored by, their own query first."""
    M = intra_query.shape[1]
    return torch.cat([intra_query.unsqueeze(2), inter_query.unsqueeze(1).expand(-1, M, -1, -1)], dim=2)


def keep_best(scores: Tensor, k_intra: int, k_inter: int) -> Tensor:
    """Scores (B, M, 1 + M, N) by `queries_of_each_map` -> mask (B, M, N)."""
    B, M, _, N = scores.shape
    mask = _top_k(scores[:, :, 0], k_intra)  # (B, M, N)
    across = scores[:, :, 1:].transpose(1, 2)  # (B, querying modality, M, N)
    for m in range(M):  # slices, as a list of indices would wait for the device
        others = torch.cat([across[:, m, :m], across[:, m, m + 1 :]], dim=1)
        kept = _top_k(others.flatten(1), k_inter).view(B, M - 1, N)
        mask[:, :m] |= kept[:, :m]
        mask[:, m + 1 :] |= kept[:, m:]
    return mask


def _top_k(scores: Tensor, k: int) -> Tensor:
    """Mask of the k largest of the last dimension; ties go to the lower index, NaN counts as largest."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :k], True)
