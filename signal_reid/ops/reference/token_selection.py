"""Top-k token selection within and across modalities, in plain PyTorch."""

import torch
from torch import Tensor


def select_tokens(tokens: Tensor, intra_query: Tensor, inter_query: Tensor, k_intra: int, k_inter: int) -> Tensor:
    """Union of the tokens that any class token ranks among its best; see `signal_reid.ops.select_tokens`.

    The score of a token is its inner product with the query, in fp32 or wider; a positive scale or a constant added to
    a query's scores would not change their order, so the formula's 1/sqrt(C), softmax and key bias are left out.
    """
    B, M, N, _ = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    queries = torch.cat([intra_query.unsqueeze(2), inter_query.unsqueeze(1).expand(-1, M, -1, -1)], dim=2)
    with torch.autocast(tokens.device.type, enabled=False):  # it would round the scores
        # One modality at a time: M small copies cost a CPU less than a large one.
        pairs = zip(queries.unbind(1), tokens.unbind(1), strict=True)
        scores = torch.stack([q.to(wide) @ x.to(wide).transpose(1, 2) for q, x in pairs], 1)  # (B, M, 1 + M, N)

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
