r"""Contrastive loss on the gramian volumes of unit vectors, in plain PyTorch.

With x_mi the feature of modality m of sample i, u_mi = x_mi / max(|x_mi|, 1e-12), V_ij the volume of (u_0i, u_1j, ..)
and logits -V_ij / tau, the loss is the mean of the cross-entropies of all rows and all columns with smoothed targets
y_ij = (1 - s) [i = j] + s / B. Softmax ignores a shift, so a line (a row or a column) is taken from its least volume:

    e_j = (V_j - min V) / tau,    S = sum_j exp(-e_j),    p_j = exp(-e_j) / S
    loss of a line = log S + sum_j y_j e_j

whose terms are non-negative. Without that shift rounding would take the digits of the temperature's gradient: the
part that all volumes have in common, 0.997 for random features, is multiplied by 1 / tau^2 and cancels only in exact
arithmetic.

Backward:

    dloss/dV_ij = (2 y_ij - p_ij - p'_ij) / (2 B tau),    p of the row, p' of the column
    dloss/dtau  = mean over the lines of (sum_j p_j e_j - sum_j y_j e_j) / tau
    dloss/dx    = (G - (G . u) u) / |x|,    G = dloss/du; G / 1e-12 where |x| < 1e-12

`reference/gramian.py` has dV/du.
"""

import torch
from torch import Tensor

from signal_reid.ops.reference import gramian

SHORTEST = 1e-12


def forward(features: Tensor, temperature: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B, M, C) in fp32 or fp64 and () -> the loss (), its derivative by the temperature (), statistics (4, B).

    The statistics are, of each row, its least volume and 1 / S; then the same of each column.
    """
    volumes = _volumes(features)
    losses, slopes, statistics = [], [], []
    for lines in (volumes, volumes.T):
        least = lines.amin(1) if lines.numel() else lines.sum(1)
        excess = (lines - least[:, None]) / temperature
        exponentials = (-excess).exp()
        total = exponentials.sum(1)
        target = (1 - label_smoothing) * excess.diagonal() + label_smoothing * excess.mean(1)
        losses.append(total.log() + target)
        slopes.append(((excess * exponentials).sum(1) / total - target) / temperature)
        statistics += [least, 1 / total]
    return torch.cat(losses).mean(), torch.cat(slopes).mean(), torch.stack(statistics)


def backward(
    features: Tensor, grad: Tensor, temperature: Tensor, slope: Tensor, statistics: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the features (B, M, C) and of the temperature (), given that of the loss and what `forward` gave."""
    volumes, B = _volumes(features), features.shape[0]
    of_rows, of_columns = statistics[:2, :, None], statistics[2:, None, :]
    row_softmax = ((of_rows[0] - volumes) / temperature).exp() * of_rows[1]
    column_softmax = ((of_columns[0] - volumes) / temperature).exp() * of_columns[1]
    targets = (1 - label_smoothing) * torch.eye(B, dtype=volumes.dtype, device=volumes.device)
    targets += label_smoothing / max(1, B)
    of_volumes = grad * (2 * targets - row_softmax - column_softmax) / (2 * max(1, B) * temperature)
    anchor, *others = _units(features).unbind(1)
    of_units = torch.stack(gramian.backward(of_volumes, anchor, tuple(others)), 1)
    return _through_normalisation(of_units, features), grad * slope


def _volumes(features: Tensor) -> Tensor:
    anchor, *others = _units(features).unbind(1)
    return gramian.forward(anchor, tuple(others))


def _units(features: Tensor) -> Tensor:
    return features / _lengths(features)


def _lengths(features: Tensor) -> Tensor:
    """(B, M, 1), no less than 1e-12; a power of two brings what is large into the range of its square."""
    power = torch.where((features.abs() > 2.0**50).any(2, keepdim=True), 2.0**-80, 1.0)
    return (torch.linalg.vector_norm(features * power, dim=2, keepdim=True) / power).clamp_min(SHORTEST)


def _through_normalisation(grad: Tensor, features: Tensor) -> Tensor:
    lengths, units = _lengths(features), _units(features)
    along = (grad * units).sum(2, keepdim=True)
    return torch.where(lengths > SHORTEST, grad - along * units, grad) / lengths
