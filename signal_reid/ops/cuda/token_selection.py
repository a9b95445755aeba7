"""Top-k token selection by the native core: one launch, and a second where samples are few and are shared by blocks."""

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.dispatch import BackendError
from signal_reid.ops.layout import with_unit_last_stride

TOKENS_PER_BLOCK = 32  # that its warps score at a time, as in csrc/token_selection.cu
# Measured on an H200: fewer blocks than two for each multiprocessor leave bandwidth unused (batch 64 takes 1.3 to 1.4
# times as long with one block a sample), more gain nothing that pays for the second launch.
BLOCKS_PER_MULTIPROCESSOR = 2


def select_tokens(tokens: Tensor, intra_query: Tensor, inter_query: Tensor, k_intra: int, k_inter: int) -> Tensor:
    """Union of the tokens that any class token ranks among its best; see `signal_reid.ops.select_tokens`.

    Raises:
        BackendError: the scores of one sample, M^2 N floats, and its 2M queries exceed the GPU's shared memory, or
            there are 2^31 samples or more.
    """
    _check(tokens)
    B, M, N, C = tokens.shape
    tokens, intra_query, inter_query = map(with_unit_last_stride, (tokens, intra_query, inter_query))
    mask = torch.empty((B, M, N), dtype=torch.bool, device=tokens.device)
    splits = _splits(core.multiprocessors(tokens.get_device()), B, M, N)
    scores = torch.empty((B, M, M, N), dtype=torch.int32, device=tokens.device) if splits > 1 else None
    tokens_stride_b, tokens_stride_m, tokens_stride_n, _ = tokens.stride()
    intra_stride_b, intra_stride_m, _ = intra_query.stride()
    inter_stride_b, inter_stride_m, _ = inter_query.stride()
    fields = {
        "tokens": tokens.data_ptr(),
        "intra_query": intra_query.data_ptr(),
        "inter_query": inter_query.data_ptr(),
        "mask": mask.data_ptr(),
        "scores": core.address(scores),
        "B": B,
        "M": M,
        "N": N,
        "C": C,
        "splits": splits,
        "tokens_stride_b": tokens_stride_b,
        "tokens_stride_m": tokens_stride_m,
        "tokens_stride_n": tokens_stride_n,
        "intra_stride_b": intra_stride_b,
        "intra_stride_m": intra_stride_m,
        "inter_stride_b": inter_stride_b,
        "inter_stride_m": inter_stride_m,
        "k_intra": k_intra,
        "k_inter": k_inter,
        "dtype": core.dtype_tag(tokens),
    }
    core.launch("select_tokens", tokens, fields)
    return mask


def _splits(multiprocessors: int, B: int, M: int, N: int) -> int:
    """Blocks per sample: as many as fill the multiprocessors, and have tokens for every warp."""
    return max(1, min(BLOCKS_PER_MULTIPROCESSOR * multiprocessors // max(B, 1), M * N // TOKENS_PER_BLOCK))


def _check(tokens: Tensor) -> None:
    B, M, N, C = tokens.shape
    if B == 0:
        return
    needed, available = _shared_bytes(core.native(), tokens.get_device(), M, N, C, tokens.dtype)
    if needed > available:
        raise BackendError(
            f"backend cuda cannot select among tokens of shape {tuple(tokens.shape)}: the scores and queries of one "
            f"sample take {needed} bytes of shared memory, the GPU has {available}; use backend triton or reference"
        )
    if B > core.MOST_BLOCKS:
        raise BackendError(
            f"backend cuda cannot select among tokens of shape {tuple(tokens.shape)}: at most {core.MOST_BLOCKS} "
            "samples; divide the batch or use backend reference"
        )


@lru_cache(maxsize=64)
def _shared_bytes(native: ModuleType, device: int, M: int, N: int, C: int, dtype: torch.dtype) -> tuple[int, int]:
    """What one sample takes, and what a block may have on the device (-1 for the host)."""
    needed = native.select_tokens_shared_bytes(M=M, N=N, C=C, dtype=core.DTYPE_TAGS[dtype])
    return needed, native.shared_bytes_per_block(max(device, 0))
