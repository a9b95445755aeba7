"""The native CUDA kernels: one file per operator, `core` loads and calls the compiled module."""

from torch import Tensor

from signal_reid.ops.cuda import core


def unavailable_reason(start: bool = False) -> str | None:
    """Why no tensor can be served here, in plain words; None when the kernels can run."""
    return core.unavailable_reason(start)


def reason_against(tensor: Tensor) -> str | None:
    """Why this tensor cannot be served, in plain words; None when it can. Only its own GPU is asked."""
    if not tensor.is_cuda and not core.on_host():
        return core.reason_against_build() or "the tensor is not on a GPU"
    reason = core.reason_against_device(max(tensor.get_device(), 0))
    if reason is not None:
        return reason
    if tensor.dtype not in core.DTYPE_TAGS:
        return f"the kernels take float32, float16 and bfloat16, not {tensor.dtype}"
    return None
