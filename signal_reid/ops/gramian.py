"""Pairwise gramian volume and the contrastive loss on top of it."""

import math
from typing import Any

import torch
from torch import Tensor

from signal_reid.ops import dispatch, library  # noqa: F401 - library defines torch.ops.signal_reid
from signal_reid.ops.checks import (
    check_floating,
    check_number,
    check_same,
    check_tensor,
    formula_wanted,
    in_transform,
    known_value,
    needs_gradient,
    refuse_second_derivative,
)
from signal_reid.ops.layout import as_autocast_promotes, without_autocast
from signal_reid.ops.reference import gramian as reference
from signal_reid.ops.transforms import sample_by_sample


def gramian_volume(anchor: Tensor, *others: Tensor) -> Tensor:
    """Volume of the parallelotope spanned by anchor i and row j of each of the others, for every pair (i, j).

    `V_ij = sqrt |det Gram(anchor_i, others_1j, .., others_kj)|`, computed in fp32 (fp64 for fp64 input), autocast off.
    The gradient is analytic, bounded and finite at V = 0; it is not differentiable twice, nor in forward mode.
    torch.func's vmap, grad and vjp take it, vmap sample by sample.

    Args:
        anchor: (P, C), fp32, fp16, bf16 or fp64. Where a norm is beyond 1e19 its square overflows fp32, and the volume
            is inf or NaN.
        others: 1 to 4 tensors (Q, C) of the anchor's dtype and device; under autocast of any dtypes.

    Returns:
        (P, Q) fp32 (fp64 for fp64 input), non-negative.

    Raises:
        ValueError: a shape, dtype, device or number of tensors outside of these.

    Source: Cicchetti et al., Gramian Multimodal Representation Learning and Alignment (ICLR 2025), eq. 4.
    """
    check_floating("anchor", anchor, "(P, C)", 2)
    if not 1 <= len(others) <= 4:
        raise ValueError(f"others must be 1 to 4 tensors (Q, C), got {len(others)}")
    check_tensor("others[0]", others[0])
    anchor, *promoted = as_autocast_promotes(anchor, *others)
    others = tuple(promoted)
    shape = (others[0].shape[0] if others[0].ndim else 0, anchor.shape[1])
    for index, other in enumerate(others):
        check_same(f"others[{index}]", other, "anchor", anchor, shape)
    wide = torch.promote_types(anchor.dtype, torch.float32)
    with without_autocast(anchor):
        vectors = [vector.to(wide) for vector in (anchor, *others)]
        if torch.compiler.is_compiling():  # which takes no tensor twice
            vectors = [vector.view_as(vector) for vector in vectors]
        if in_transform():
            return _TransformedVolume.apply(*vectors)
        if needs_gradient(*vectors):
            return _GramianVolume.apply(*vectors)
        return torch.ops.signal_reid.gramian_volume(vectors[0], vectors[1:])


def gramian_contrastive_loss(features: Tensor, temperature: Tensor | float, label_smoothing: float = 0.1) -> Tensor:
    """Symmetric cross-entropy over volumes: the modalities of one sample should span less than those of two.

    Features are L2-normalised; logits are `-V / temperature` with the first modality as anchor; the targets are the
    diagonal, of rows and of columns. The kernels take a batch in two launches forward and two backward, and the
    temperature is never read by the host. Under torch.compile, and where no kernel of ours serves and the reference was
    not chosen, this is `gramian_volume` between PyTorch's operators.

    Args:
        features: (B, M, C), one feature per sample and modality, B >= 1, M = 2 to 5, C >= 1; of any norm, but for
            the kernels, which square it in fp32: beyond 1e19 their loss is NaN.
        temperature: number or scalar tensor, positive and finite. A tensor is not checked on a GPU, as that would wait
            for the device, nor while it is learned: what a step makes of it shows in the loss, on every device alike.
        label_smoothing: in [0, 1).

    Returns:
        () fp32, the mean of the row-wise and the column-wise cross-entropy.

    Raises:
        ValueError: a shape, dtype or number outside of these.
        BackendError: a backend was chosen that cannot serve.

    Source: Signal (AAAI 2026), global alignment module.
    """
    check_floating("features", features, "(B, M, C)", 3)
    B, M, C = features.shape
    if not 2 <= M <= 5:
        raise ValueError(f"features must hold 2 to 5 modalities (B, M, C), got shape {tuple(features.shape)}")
    if B == 0 or C == 0:
        raise ValueError(f"features must be (B, M, C) with B and C at least 1, got shape {tuple(features.shape)}")
    _check_temperature(temperature)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    wide = torch.promote_types(features.dtype, torch.float32)
    with without_autocast(features):
        features = features.to(wide)
        if formula_wanted() or dispatch.left_to_pytorch("gramian_loss", features):
            return _loss_by_pytorch(features, temperature, label_smoothing)
        scalar = _scalar(temperature, features)
        if needs_gradient(features, scalar):
            return _GramianLoss.apply(features, scalar, label_smoothing)
        return torch.ops.signal_reid.gramian_loss(features, scalar, label_smoothing)[0]


def _loss_by_pytorch(features: Tensor, temperature: Tensor | float, label_smoothing: float) -> Tensor:
    anchor, *others = reference.normalise(features).unbind(1)
    volumes = gramian_volume(anchor, *others)  # (B, B)
    # Softmax ignores a shift; without this one rounding takes the digits of the temperature's gradient.
    logits = (volumes - volumes.detach().mean()) / -temperature
    log_probabilities = logits.log_softmax(1) + logits.log_softmax(0)
    # A smoothed cross-entropy is -(1 - smoothing) of its target's log-probability - smoothing of their mean.
    return -0.5 * torch.lerp(log_probabilities.mean(), log_probabilities.diagonal().mean(), 1 - label_smoothing)


def _scalar(number: Tensor | float, like: Tensor) -> Tensor:
    """A number as a tensor () in the dtype and on the device of `like`, where it most often is already."""
    if isinstance(number, Tensor):
        return number.reshape(()).to(like.device, like.dtype)
    return torch.full((), number, dtype=like.dtype, device=like.device)


def _check_temperature(temperature: Tensor | float) -> None:
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature)
    elif temperature.numel() != 1 or temperature.is_complex():
        given = f"shape {tuple(temperature.shape)}, {temperature.dtype}"
        raise ValueError(f"temperature must be a number or a scalar tensor, got {given}")
    learned = isinstance(temperature, Tensor) and needs_gradient(temperature)
    value = None if learned else known_value(temperature)
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {value}")


class _GramianVolume(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(anchor, *others)
        return torch.ops.signal_reid.gramian_volume(anchor, others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        refuse_second_derivative("gramian_volume", grad)
        anchor, *others = ctx.saved_tensors
        return tuple(torch.ops.signal_reid.gramian_volume_backward(grad, anchor, others))


class _GramianLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, temperature: Tensor, label_smoothing: float) -> Tensor:
        loss, slope, statistics = torch.ops.signal_reid.gramian_loss(features, temperature, label_smoothing)
        ctx.save_for_backward(features, temperature, slope, statistics)
        ctx.label_smoothing = label_smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_second_derivative("gramian_contrastive_loss", grad)
        features, *others = ctx.saved_tensors
        return *torch.ops.signal_reid.gramian_loss_backward(features, grad, *others, ctx.label_smoothing), None


class _TransformedVolume(torch.autograd.Function):
    """The volume as transforms take it: `setup_context` would cost every other call 15 us."""

    @staticmethod
    def forward(*vectors: Tensor) -> Tensor:
        return torch.ops.signal_reid.gramian_volume(vectors[0], vectors[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return _TransformedVolumeGradients.apply(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError("gramian_volume has no derivative in forward mode; use torch.func.vjp, jacrev or backward")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *vectors: Tensor) -> tuple[Tensor, int]:
        return sample_by_sample(_TransformedVolume.apply, info.batch_size, in_dims, vectors)


class _TransformedVolumeGradients(torch.autograd.Function):
    """Its gradients, which torch.func always asks to be differentiable: they refuse when they are differentiated."""

    @staticmethod
    def forward(grad: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.signal_reid.gramian_volume_backward(grad, vectors[0], vectors[1:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("gramian_volume is not differentiable twice")

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[tuple[Tensor, ...], int]:
        return sample_by_sample(_TransformedVolumeGradients.apply, info.batch_size, in_dims, arguments)
