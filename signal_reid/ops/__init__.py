"""Drop-in PyTorch operators; `dispatch` picks the backend that serves them, `backend` says what a backend is."""

from signal_reid.ops.activation import quick_gelu
from signal_reid.ops.attention import attend
from signal_reid.ops.cross_attention import cross_attend
from signal_reid.ops.deformable_sampling import deformable_sample
from signal_reid.ops.dispatch import BackendError, current_backend, use_backend
from signal_reid.ops.gramian import gramian_contrastive_loss, gramian_volume
from signal_reid.ops.masked_attention import attend_masked
from signal_reid.ops.offset_head import predict_offsets
from signal_reid.ops.pairwise_error import pairwise_mse_loss
from signal_reid.ops.residual_norm import add_layer_norm
from signal_reid.ops.sorting import sort_rows
from signal_reid.ops.token_mean import mean_tokens
from signal_reid.ops.token_selection import select_tokens
from signal_reid.ops.window_convolution import convolve_windows

__all__ = [
    "BackendError",
    "add_layer_norm",
    "attend",
    "attend_masked",
    "convolve_windows",
    "cross_attend",
    "current_backend",
    "deformable_sample",
    "gramian_contrastive_loss",
    "gramian_volume",
    "mean_tokens",
    "pairwise_mse_loss",
    "predict_offsets",
    "quick_gelu",
    "select_tokens",
    "sort_rows",
    "use_backend",
]
