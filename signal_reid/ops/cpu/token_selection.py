"""Top-k token selection with scores one modality at a time: M small copies cost a CPU less than a large one."""

import torch
from torch import Tensor

from signal_reid.ops.reference import token_selection as reference


def select_tokens(tokens: Tensor, intra_query: Tensor, inter_query: Tensor, k_intra: int, k_inter: int) -> Tensor:
    """Union of the tokens that any class token ranks among its best; see `signal_reid.ops.select_tokens`."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    queries = reference.queries_of_each_map(intra_query, inter_query)
    with torch.autocast(tokens.device.type, enabled=False):  # it would round the scores
        pairs = zip(queries.unbind(1), tokens.unbind(1), strict=True)
        scores = torch.stack([q.to(wide) @ x.to(wide).mT for q, x in pairs], 1)  # (B, M, 1 + M, N)
    return reference.keep_best(scores, k_intra, k_inter)
