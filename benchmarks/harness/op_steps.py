"""The steps of the operators that are measured: inputs of the published shapes, plain PyTorch beside, and the cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from signal_reid import ops
from signal_reid.ops import gramian as loss_operator
from signal_reid.ops.backend import OPERATORS
from signal_reid.ops.reference import (
    activation,
    attention,
    cross_attention,
    deformable_sampling,
    gramian,
    masked_attention,
    offset_head,
    pairwise_error,
    token_mean,
    token_selection,
    window_convolution,
)

from .counting import bytes_of, kept_tokens

MODALITIES, GRID, CHANNELS, K_INTRA, SAMPLED, WIDTH, HIDDEN = 3, (16, 8), 512, 80, (4, 2), 768, 3072
TOKENS = GRID[0] * GRID[1]
HEADS, TEMPERATURE = 8, 0.07
LIBRARY = torch.ops.signal_reid


@dataclass(frozen=True)
class Step:
    """One pass of one operator.

    Attributes:
        ours: the function as a user calls it, or the backward that autograd calls.
        plain: the same in plain PyTorch.
        arguments: of either.
        moved: bytes, every input read once and every result written once.
        operations: fp32 additions and multiplications.
        public: the differentiable function of `inputs`.
    """

    op: str
    direction: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: tuple[Any, ...]
    moved: int
    operations: int
    public: Callable[..., Any]
    inputs: tuple[Tensor, ...]


Make = Callable[..., Tensor]
STEPS: dict[str, Callable[[int, Make], list[Step]]] = {}
"""What makes the steps of a public operator, given a batch and what makes a random tensor of a shape."""
MODULES: dict[str, str] = {}
"""The public operator of each module of `OPERATORS` that is measured."""
NOT_MEASURED = {
    "sorting": "evaluation sorts in the memory of the host",
}


def steps_of(module: str, public: str) -> Callable[[Callable[[int, Make], list[Step]]], Callable[..., list[Step]]]:
    """Enter the function below as that of an operator: its module in `OPERATORS`, and its public name."""

    def enter(make_steps: Callable[[int, Make], list[Step]]) -> Callable[[int, Make], list[Step]]:
        MODULES[module] = public
        STEPS[public] = make_steps
        return make_steps

    return enter


def not_measured() -> dict[str, str]:
    """Operators without steps, and why."""
    return {module: NOT_MEASURED.get(module, "it has no steps here") for module in OPERATORS if module not in MODULES}


@steps_of("token_selection", "select_tokens")
def selection_steps(batch: int, make: Make) -> list[Step]:
    # Quarters have exact scores in every dtype, so the mask is the oracle's to the bit.
    quarters = [
        (4 * make(*shape)).round() / 4
        for shape in ((batch, MODALITIES, TOKENS, CHANNELS), *[(batch, MODALITIES, CHANNELS)] * 2)
    ]
    arguments = (*quarters, K_INTRA, 2 * K_INTRA)
    moved = bytes_of(*quarters) + batch * MODALITIES * TOKENS
    operations = 2 * batch * MODALITIES**2 * TOKENS * CHANNELS
    call = ops.select_tokens
    return [
        Step("select_tokens", "forward", call, token_selection.select_tokens, arguments, moved, operations, call, ())
    ]


def volume_operations(rows: int, columns: int, others: int) -> int:
    """Projections of every pair, and every column orthonormalised with each vector projected twice."""
    pairs = 2 * rows * columns * others * CHANNELS + 2 * rows * CHANNELS
    return pairs + columns * CHANNELS * (4 * others * (others - 1) + 2 * others)


@steps_of("gramian", "gramian_volume")
def volume_steps(batch: int, make: Make) -> list[Step]:
    anchor, *others = (make(batch, CHANNELS).float() for _ in range(MODALITIES))
    grad = make(batch, batch).float()
    operations = volume_operations(batch, batch, len(others))
    read = bytes_of(anchor, *others)
    forward = Step(
        "gramian_volume",
        "forward",
        ops.gramian_volume,
        lambda anchor, *others: gramian.forward(anchor, others),
        (anchor, *others),
        read + bytes_of(grad),
        operations,
        ops.gramian_volume,
        (anchor, *others),
    )
    backward = replace(
        forward,
        direction="backward",
        ours=lambda grad, anchor, *others: LIBRARY.gramian_volume_backward(grad, anchor, others),
        plain=lambda grad, anchor, *others: gramian.backward(grad, anchor, others),
        arguments=(grad, anchor, *others),
        moved=bytes_of(grad) + 2 * read,
        operations=3 * operations,
    )
    return [forward, backward]


def plain_loss(features: Tensor) -> Tensor:
    """`gramian_contrastive_loss` without an operator of ours."""
    wide = torch.promote_types(features.dtype, torch.float32)
    anchor, *others = F.normalize(features.to(wide), dim=-1).unbind(1)
    logits = -gramian.forward(anchor, tuple(others)) / TEMPERATURE
    targets = torch.arange(len(logits), device=logits.device)
    losses = [F.cross_entropy(x, targets, label_smoothing=0.1) for x in (logits, logits.T)]
    return (losses[0] + losses[1]) / 2


def with_gradient(loss: Callable[[Tensor], Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient."""
    features = features.detach().requires_grad_()
    value = loss(features)
    return value.detach(), torch.autograd.grad(value, features)[0]


@steps_of("gramian_loss", "gramian_contrastive_loss")
def loss_steps(batch: int, make: Make) -> list[Step]:
    features = make(batch, MODALITIES, CHANNELS).float()  # as `mean_tokens` leaves them
    temperature = torch.full((), TEMPERATURE, device=features.device)  # as the module's parameter
    ours = partial(ops.gramian_contrastive_loss, temperature=temperature)
    # What the host costs is measured on an empty batch, which launches nothing and which the public function refuses.
    public = ours if batch else lambda x: loss_operator._GramianLoss.apply(x, temperature, 0.1)
    operations = volume_operations(batch, batch, MODALITIES - 1) + 4 * features.numel() + 12 * batch * batch
    forward = Step(
        "gramian_contrastive_loss",
        "forward",
        ours,
        plain_loss,
        (features,),
        bytes_of(features),
        operations,
        public,
        (features,),
    )
    both = replace(
        forward,
        direction="forward + backward",
        ours=partial(with_gradient, ours),
        plain=partial(with_gradient, plain_loss),
        moved=3 * bytes_of(features),
        operations=4 * operations,
    )
    return [forward, both]


@steps_of("deformable_sampling", "deformable_sample")
def sampling_steps(batch: int, make: Make) -> list[Step]:
    maps, points = batch * MODALITIES, SAMPLED[0] * SAMPLED[1]
    tokens = make(maps, 1 + TOKENS, CHANNELS)[:, 1:]  # as the ViT leaves them, behind the class token
    offsets, grad = make(maps, *SAMPLED), make(maps, points, CHANNELS)
    settings = (*GRID, 2.0)
    read = bytes_of(tokens[:, : 4 * points], offsets)  # the four tokens around each point

    def call(tokens: Tensor, offsets: Tensor) -> Tensor:
        return ops.deformable_sample(tokens, offsets, GRID, 2.0)

    forward = Step(
        "deformable_sample",
        "forward",
        call,
        lambda tokens, offsets: deformable_sampling.forward(tokens, offsets, *settings),
        (tokens, offsets),
        read + bytes_of(grad),
        8 * grad.numel(),
        call,
        (tokens, offsets),
    )
    backward = replace(
        forward,
        direction="backward",
        ours=lambda grad, tokens, offsets: LIBRARY.deformable_sample_backward(grad, tokens, offsets, *settings),
        plain=lambda grad, tokens, offsets: deformable_sampling.backward(grad, tokens, offsets, *settings),
        arguments=(grad, tokens, offsets),
        moved=read + bytes_of(grad, tokens, offsets),
        operations=24 * grad.numel(),
    )
    return [forward, backward]


@steps_of("offset_head", "predict_offsets")
def head_steps(batch: int, make: Make) -> list[Step]:
    """LAM's offset head behind its product, which leaves the modalities one after another."""
    hidden = make(MODALITIES, batch, TOKENS, CHANNELS)
    shapes = ((MODALITIES, CHANNELS), (MODALITIES, CHANNELS, 4, 4), *[(MODALITIES, CHANNELS)] * 2)
    parameters = [make(*shape).float() for shape in shapes]
    grad = make(MODALITIES, batch, *SAMPLED)

    def call(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return ops.predict_offsets(hidden, GRID, *parameters)

    forward = Step(
        "predict_offsets",
        "forward",
        call,
        lambda *x: offset_head.forward(*x, *GRID),
        (hidden, *parameters),
        bytes_of(hidden, *parameters, grad),
        20 * hidden.numel(),  # an activation, its product with the window, the sum
        call,
        (hidden, *parameters),
    )
    backward = replace(
        forward,
        direction="backward",
        ours=lambda *x: LIBRARY.offset_head_backward(*x, *GRID),
        plain=lambda *x: offset_head.backward(*x, *GRID),
        arguments=(grad, hidden, *parameters),
        moved=2 * bytes_of(hidden, *parameters) + bytes_of(grad),
        operations=30 * hidden.numel(),
    )
    return [forward, backward]


@steps_of("pairwise_error", "pairwise_mse_loss")
def error_steps(batch: int, make: Make) -> list[Step]:
    """LAM's loss, of the sampled maps."""
    maps = make(MODALITIES, batch, SAMPLED[0] * SAMPLED[1], CHANNELS)
    grad = torch.ones((), device=maps.device)
    forward = Step(
        "pairwise_mse_loss",
        "forward",
        ops.pairwise_mse_loss,
        pairwise_error.forward,
        (maps,),
        bytes_of(maps),
        5 * maps.numel(),
        ops.pairwise_mse_loss,
        (maps,),
    )
    backward = replace(
        forward,
        direction="backward",
        ours=LIBRARY.pairwise_error_backward,
        plain=lambda maps, grad: pairwise_error.backward(maps, grad.to(maps.dtype)),
        arguments=(maps, grad),
        moved=2 * bytes_of(maps),
        operations=5 * maps.numel(),
    )
    return [forward, backward]


@steps_of("masked_attention", "attend_masked")
def masked_attention_steps(batch: int, make: Make) -> list[Step]:
    """SIM's attention by the class tokens' queries of all heads, where 95 % of the tokens are kept."""
    queries, grad = (make(batch, HEADS * MODALITIES, CHANNELS) for _ in range(2))
    queries = queries * CHANNELS**-0.5
    tokens = make(batch, MODALITIES, 1 + TOKENS, CHANNELS)[:, :, 1:]  # as the ViT leaves them, behind the class token
    mask = make(batch, MODALITIES, TOKENS) > -1.645
    attended, kept = LIBRARY.attend_masked(queries, tokens, mask)
    read = bytes_of(queries, mask) + kept_tokens(mask) * CHANNELS * tokens.element_size()
    product = 2 * kept_tokens(mask) * HEADS * MODALITIES * CHANNELS
    forward = Step(
        "attend_masked",
        "forward",
        ops.attend_masked,
        lambda *x: masked_attention.forward(*x)[0],
        (queries, tokens, mask),
        read + bytes_of(attended),
        2 * product,
        lambda queries, tokens: ops.attend_masked(queries, tokens, mask),
        (queries, tokens),
    )
    backward = replace(
        forward,
        direction="backward",
        ours=LIBRARY.attend_masked_backward,
        plain=masked_attention.backward,
        arguments=(grad, queries, tokens, mask, attended, kept),
        moved=read + bytes_of(grad, attended, queries, tokens),
        operations=4 * product,
    )
    return [forward, backward]


@steps_of("activation", "quick_gelu")
def gelu_steps(batch: int, make: Make) -> list[Step]:
    x, grad = (make(batch * MODALITIES, 1 + TOKENS, HIDDEN) for _ in range(2))
    forward = Step(
        "quick_gelu",
        "forward",
        ops.quick_gelu,
        activation.forward,
        (x,),
        2 * bytes_of(x),
        5 * x.numel(),
        ops.quick_gelu,
        (x,),
    )
    backward = replace(
        forward,
        direction="backward",
        ours=LIBRARY.quick_gelu_backward,
        plain=activation.backward,
        arguments=(grad, x),
        moved=3 * bytes_of(x),
        operations=10 * x.numel(),
    )
    return [forward, backward]


def plain_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Addition, normalisation and the cast that the next linear layer makes under autocast."""
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias).to(branch.dtype)


def plain_norm_backward(
    autocast: bool,
    grad_normed: Tensor,
    grad_total: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, ...]:
    """What autograd makes of `plain_norm`: back through the casts, the normalisation and the addition."""
    grad, *of_weights = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(total.dtype), total, weight.shape, mean, inverse, weight, weight, [True, True, True]
    )
    grad = grad + grad_total
    return grad, *of_weights, *([grad.to(grad_normed.dtype)] if autocast else [])


def norm_backward(
    branch_dtype: torch.dtype | None, grad_normed: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    """Ours, in the order of plain PyTorch's results."""
    grad, of_weights, *copy = LIBRARY.add_layer_norm_backward(
        grad_normed, grad_total, total, weight, 1e-5, branch_dtype
    )
    return grad, *of_weights.unbind(), *copy


@steps_of("residual_norm", "add_layer_norm")
def norm_steps(batch: int, make: Make) -> list[Step]:
    shape = batch * MODALITIES, 1 + TOKENS, WIDTH
    x, grad_total = make(*shape).float(), make(*shape).float()  # the residual stream is fp32 under autocast too
    branch, grad_normed = make(*shape), make(*shape)
    weight, bias = make(WIDTH).float(), make(WIDTH).float()
    _, mean, inverse = torch.native_layer_norm(x, weight.shape, weight, bias, 1e-5)
    branch_dtype = None if branch.dtype == x.dtype else branch.dtype
    forward = Step(
        "add_layer_norm",
        "forward",
        lambda *inputs: LIBRARY.add_layer_norm(*inputs, 1e-5, branch.dtype),
        plain_norm,
        (x, branch, weight, bias),
        bytes_of(x, branch, weight, bias, x, branch),
        9 * x.numel(),
        lambda *inputs: ops.add_layer_norm(*inputs, out_dtype=branch.dtype),
        (x, branch, weight, bias),
    )
    backward = replace(
        forward,
        direction="backward",
        ours=partial(norm_backward, branch_dtype),
        plain=partial(plain_norm_backward, branch_dtype is not None),
        arguments=(grad_normed, grad_total, x, weight, mean, inverse),
        moved=bytes_of(grad_normed, grad_total, x, weight, x, weight, bias)
        + (bytes_of(branch) if branch_dtype is not None else 0),
        operations=20 * x.numel(),
    )
    return [forward, backward]


@steps_of("cross_attention", "cross_attend")
def cross_attention_steps(batch: int, make: Make) -> list[Step]:
    """SIM's attention with its projections, where 95 % of the tokens are kept."""
    encoded = make(batch, MODALITIES, 1 + TOKENS, CHANNELS)
    queries, tokens, mask = encoded[:, :, 0], encoded[:, :, 1:], make(batch, MODALITIES, TOKENS) > -1.645
    weight, bias, grad = make(3 * CHANNELS, CHANNELS) * CHANNELS**-0.5, make(3 * CHANNELS), make(*queries.shape)
    arguments = queries, tokens, mask, weight, bias, HEADS
    attended, kept = LIBRARY.cross_attend(*arguments)
    read = bytes_of(queries, mask, weight, bias) + kept_tokens(mask) * CHANNELS * tokens.element_size()
    products = 2 * queries.numel() * CHANNELS * 3 + 4 * kept_tokens(mask) * HEADS * MODALITIES * CHANNELS
    forward = Step(
        "cross_attend",
        "forward",
        ops.cross_attend,
        lambda *x: cross_attention.forward(*x)[0],
        arguments,
        read + bytes_of(attended),
        products,
        lambda queries, tokens, weight, bias: ops.cross_attend(queries, tokens, mask, weight, bias, HEADS),
        (queries, tokens, weight, bias),
    )
    backward = replace(
        forward,
        direction="backward",
        ours=LIBRARY.cross_attend_backward,
        plain=cross_attention.backward,
        arguments=(grad, *arguments, kept),
        moved=read + bytes_of(grad, queries, tokens, weight, bias),
        operations=2 * products,
    )
    return [forward, backward]


@steps_of("attention", "attend")
def attention_steps(batch: int, make: Make) -> list[Step]:
    """A layer of the ViT."""
    qkv = make(3, batch * MODALITIES, WIDTH // 64, 1 + TOKENS, 64)
    grad, (attended, p) = make(*qkv.shape[1:]), attention.forward(qkv)
    forward = Step(
        "attend",
        "forward",
        lambda qkv: LIBRARY.attend(qkv)[0],
        lambda qkv: attention.forward(qkv)[0],
        (qkv,),
        bytes_of(qkv, attended),
        4 * p.numel() * 64,
        ops.attend,
        (qkv,),
    )
    backward = replace(
        forward,
        direction="backward",
        ours=LIBRARY.attend_backward,
        plain=attention.backward,
        arguments=(grad, qkv, p),
        moved=bytes_of(grad, qkv, qkv),
        operations=8 * p.numel() * 64,
    )
    return [forward, backward]


@steps_of("token_mean", "mean_tokens")
def mean_steps(batch: int, make: Make) -> list[Step]:
    """Its gradient is a view of (B, M, C) numbers."""
    tokens = make(batch, MODALITIES, 1 + TOKENS, CHANNELS)[:, :, 1:]
    moved = bytes_of(tokens) + 4 * batch * MODALITIES * CHANNELS
    call = ops.mean_tokens
    return [Step("mean_tokens", "forward", call, token_mean.forward, (tokens,), moved, tokens.numel(), call, (tokens,))]


@steps_of("window_convolution", "convolve_windows")
def window_steps(batch: int, make: Make) -> list[Step]:
    """LAM's depthwise convolution of one modality."""
    x, window = make(batch, *GRID, CHANNELS), make(CHANNELS, 4, 4)
    grad = make(batch, GRID[0] // 4, GRID[1] // 4, CHANNELS)
    call = ops.convolve_windows
    moved = bytes_of(x, window, grad)
    forward = Step(
        "convolve_windows", "forward", call, window_convolution.forward, (x, window), moved, 2 * x.numel(), call, ()
    )
    backward = replace(
        forward,
        direction="backward",
        ours=LIBRARY.convolve_windows_backward,
        plain=window_convolution.backward,
        arguments=(grad, x, window),
        moved=moved + bytes_of(x, window),
        operations=4 * x.numel(),
    )
    return [replace(step, inputs=(x, window)) for step in (forward, backward)]
