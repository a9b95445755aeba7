"""The offset head by the native core: one launch forward; one and a small sum backward."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.dispatch import BackendError
from signal_reid.ops.layout import with_unit_last_stride

SIDE, WINDOWS_PER_BLOCK, CHANNELS_PER_BLOCK, ENTRIES = 4, 4, 128, 19  # as in csrc/offset_head.cu
BLOCKS_PER_MULTIPROCESSOR = 3  # of the backward, at once
EMULATED_MULTIPROCESSORS = 4
MOST_OF_A_MAP = 2**28


def forward(
    hidden: Tensor, bias: Tensor, window: Tensor, window_bias: Tensor, out: Tensor, rows: int, columns: int
) -> Tensor:
    """(M, B, rows * columns, C), parameters -> (M, B, rows // 4, columns // 4); see `signal_reid.ops.predict_offsets`.

    Raises:
        BackendError: a parameter in fp64, over 2^28 tokens or channels of a map, or more windows than a launch takes.
    """
    M, B, _, _ = hidden.shape
    _check(hidden, bias, M * -(-B * (rows // SIDE) * (columns // SIDE) // WINDOWS_PER_BLOCK))
    hidden = with_unit_last_stride(hidden)
    parameters = _in_fp32(bias, window, window_bias, out)
    offsets = torch.empty((M, B, rows // SIDE, columns // SIDE), dtype=hidden.dtype, device=hidden.device)
    core.launch("offset_head", hidden, {"offsets": offsets.data_ptr(), **_fields(hidden, parameters, rows, columns)})
    return offsets


def backward(
    grad: Tensor,
    hidden: Tensor,
    bias: Tensor,
    window: Tensor,
    window_bias: Tensor,
    out: Tensor,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the hidden tokens, bias, window, window bias and projection, given `grad` (M, B, Hk, Wk).

    Raises:
        BackendError: as in `forward`.
    """
    M, B, N, C = hidden.shape
    parts = _parts(hidden, B * -(-rows // SIDE) * -(-columns // SIDE))
    _check(hidden, bias, M * parts * -(-C // CHANNELS_PER_BLOCK))
    grad, hidden = grad.to(hidden.dtype).contiguous(), with_unit_last_stride(hidden)
    parameters = _in_fp32(bias, window, window_bias, out)
    grad_hidden = torch.empty((M, B, N, C), dtype=hidden.dtype, device=hidden.device)
    make = torch.empty if parts else torch.zeros
    gradients = [make(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    shares = torch.empty((parts, M, ENTRIES, C), dtype=torch.float32, device=hidden.device)
    names = "grad_bias", "grad_window", "grad_window_bias", "grad_out"
    fields = {
        "grad": grad.data_ptr(),
        "grad_hidden": grad_hidden.data_ptr(),
        "shares": shares.data_ptr(),
        "parts": parts,
        **{name: gradient.data_ptr() for name, gradient in zip(names, gradients, strict=True)},
        **_fields(hidden, parameters, rows, columns),
    }
    core.launch("offset_head_backward", hidden, fields)
    of_bias, of_window, of_window_bias, of_out = (gradient.to(bias.dtype) for gradient in gradients)
    return grad_hidden, of_bias, of_window, of_window_bias, of_out


def _in_fp32(*parameters: Tensor) -> list[Tensor]:
    return [parameter.float().contiguous() for parameter in parameters]


def _fields(hidden: Tensor, parameters: list[Tensor], rows: int, columns: int) -> dict[str, Any]:
    """What both directions read."""
    M, B, _, C = hidden.shape
    bias, window, window_bias, out = parameters
    stride_m, stride_b, stride_n, _ = hidden.stride()
    return {
        "hidden": hidden.data_ptr(),
        "bias": bias.data_ptr(),
        "window": window.data_ptr(),
        "window_bias": window_bias.data_ptr(),
        "out": out.data_ptr(),
        "M": M,
        "B": B,
        "H": rows,
        "W": columns,
        "C": C,
        "stride_m": stride_m,
        "stride_b": stride_b,
        "stride_n": stride_n,
        "dtype": core.dtype_tag(hidden),
    }


def _parts(hidden: Tensor, cells: int) -> int:
    """As many parts of a modality's maps as a GPU takes at once, none of them without a window."""
    M, _, _, C = hidden.shape
    at_once = BLOCKS_PER_MULTIPROCESSOR * _multiprocessors(hidden.get_device())
    return min(cells, max(1, at_once // max(M * -(-C // CHANNELS_PER_BLOCK), 1)))


@lru_cache
def _multiprocessors(device: int) -> int:
    """The multiprocessors of a device, or of the emulated one where the number is -1."""
    return EMULATED_MULTIPROCESSORS if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count


def _check(hidden: Tensor, parameter: Tensor, blocks: int) -> None:
    _, _, N, C = hidden.shape
    if parameter.dtype == torch.float64:
        raise BackendError("backend cuda cannot compute with float64 parameters; use backend reference")
    if max(N, C) > MOST_OF_A_MAP or blocks > core.MOST_BLOCKS:
        raise BackendError(
            f"backend cuda cannot predict offsets from hidden tokens of shape {tuple(hidden.shape)}: a map has at most "
            f"{MOST_OF_A_MAP} tokens and channels, a launch {core.MOST_BLOCKS} blocks, here {blocks}; "
            "use backend reference"
        )
