"""Cross-attention around Triton's masked attention.

The other products are PyTorch's on a GPU too, so the form is that of a CPU.
"""

from signal_reid.ops.cpu.cross_attention import backward, forward, to_keep

__all__ = ["backward", "forward", "to_keep"]
