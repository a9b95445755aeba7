"""QuickGELU: PyTorch's own CUDA kernels serve it."""

from signal_reid.ops.reference.quick_gelu import backward, forward

__all__ = ["backward", "forward"]
