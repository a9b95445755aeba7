"""Drop-in PyTorch operators; `dispatch` picks the backend that serves them."""

from signal_reid.ops.activation import quick_gelu
from signal_reid.ops.deformable_sampling import deformable_sample
from signal_reid.ops.dispatch import BackendError, current_backend, use_backend
from signal_reid.ops.gramian import gramian_contrastive_loss, gramian_volume
from signal_reid.ops.residual_norm import add_layer_norm
from signal_reid.ops.token_selection import select_tokens

__all__ = [
    "BackendError",
    "add_layer_norm",
    "current_backend",
    "deformable_sample",
    "gramian_contrastive_loss",
    "gramian_volume",
    "quick_gelu",
    "select_tokens",
    "use_backend",
]
