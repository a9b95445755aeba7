"""Top-k token selection by the native core, in one launch."""

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.dispatch import BackendError
from signal_reid.ops.layout import with_unit_last_stride


def select_tokens(tokens: Tensor, intra_query: Tensor, inter_query: Tensor, k_intra: int, k_inter: int) -> Tensor:
    """Union of the tokens that any class token ranks among its best; see `signal_reid.ops.select_tokens`.

    Raises:
        BackendError: the scores of one sample, M^2 N floats, and its 2M queries exceed the GPU's shared memory.
    """
    B, M, N, C = tokens.shape
    tokens, intra_query, inter_query = map(with_unit_last_stride, (tokens, intra_query, inter_query))
    mask = torch.empty((B, M, N), dtype=torch.bool, device=tokens.device)
    try:
        core.launch(
            "select_tokens",
            tokens,
            tokens.data_ptr(),
            intra_query.data_ptr(),
            inter_query.data_ptr(),
            mask.data_ptr(),
            B,
            M,
            N,
            C,
            *tokens.stride()[:3],
            *intra_query.stride()[:2],
            *inter_query.stride()[:2],
            k_intra,
            k_inter,
            core.dtype_tag(tokens),
        )
    except RuntimeError as error:
        if "invalid argument" not in str(error):
            raise
        raise BackendError(
            f"backend cuda cannot select among tokens of shape {tuple(tokens.shape)}: the scores and queries of one "
            "sample must fit into the GPU's shared memory; use backend triton or reference"
        ) from error
    return mask
