"""Contrastive loss on gramian volumes by the native core: two launches (forward three above a batch of 256)."""

import torch
from torch import Tensor

from signal_reid.ops.cuda import core
from signal_reid.ops.layout import with_unit_last_stride


def forward(features: Tensor, temperature: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B, M, C) and (), fp32 -> the loss (), its derivative by the temperature (), statistics (4, B)."""
    features = with_unit_last_stride(features)
    B = features.shape[0]
    loss, slope, statistics, workspace = (
        torch.empty(shape, dtype=features.dtype, device=features.device)
        for shape in ((), (), (4, B), core.native().gramian_loss_workspace(B=B))
    )
    fields = {
        "temperature": temperature.data_ptr(),
        "loss": loss.data_ptr(),
        "slope": slope.data_ptr(),
        "statistics": statistics.data_ptr(),
        "workspace": workspace.data_ptr(),
    }
    core.launch("gramian_loss", features, fields | _features(features, label_smoothing))
    if B == 0:
        loss.fill_(torch.nan), slope.fill_(torch.nan)  # means over nothing
    return loss, slope, statistics


def backward(
    features: Tensor, grad: Tensor, temperature: Tensor, slope: Tensor, statistics: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the features (B, M, C) and of the temperature (), given that of the loss and what `forward` gave."""
    features = with_unit_last_stride(features)
    B, M, C = features.shape
    if features.numel() == 0:
        return features.new_zeros(B, M, C), grad * slope
    size = core.native().gramian_volume_workspace(P=B, Q=B, C=C, k=M - 1)
    grad_features, grad_temperature, workspace = (
        torch.empty(shape, dtype=features.dtype, device=features.device) for shape in ((B, M, C), (), size)
    )
    fields = {
        "grad": grad.data_ptr(),
        "temperature": temperature.data_ptr(),
        "slope": slope.data_ptr(),
        "statistics": statistics.data_ptr(),
        "grad_features": grad_features.data_ptr(),
        "grad_temperature": grad_temperature.data_ptr(),
        "workspace": workspace.data_ptr(),
    }
    core.launch("gramian_loss_backward", features, fields | _features(features, label_smoothing))
    return grad_features, grad_temperature


def _features(features: Tensor, label_smoothing: float) -> dict[str, int | float]:
    """The fields that both launchers have."""
    B, M, C = features.shape
    return {
        "features": features.data_ptr(),
        "B": B,
        "M": M,
        "C": C,
        "stride_b": features.stride(0),
        "stride_m": features.stride(1),
        "smoothing": label_smoothing,
    }
