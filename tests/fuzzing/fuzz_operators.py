"""Arguments of the public operators: refused in one line that names an argument, or the reference's results."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from damage import NUMBERS, Try

from signal_reid import ops


def operator_arguments() -> dict[str, tuple[Callable[..., object], dict[str, object]]]:
    """Every public operator with arguments that it takes, by their names."""
    normal = partial(torch.randn)
    mask = torch.rand(2, 3, 6) < 0.5
    parameters = {"bias": normal(2, 6), "window": normal(2, 6, 4, 4), "window_bias": normal(2, 6), "out": normal(2, 6)}
    queries = {"intra_query": normal(2, 2, 4), "inter_query": normal(2, 2, 4), "k_intra": 2, "k_inter": 3}
    affine = {"weight": normal(8), "bias": normal(8), "eps": 1e-5, "out_dtype": None}
    projections = {"weight": normal(24, 8), "bias": normal(24), "heads": 2}
    return {
        "select_tokens": (ops.select_tokens, {"tokens": normal(2, 2, 5, 4), **queries}),
        "gramian_volume": (ops.gramian_volume, {"anchor": normal(3, 8), "others": [normal(4, 8), normal(4, 8)]}),
        "gramian_contrastive_loss": (
            ops.gramian_contrastive_loss,
            {"features": normal(4, 3, 8), "temperature": 0.07, "label_smoothing": 0.1},
        ),
        "deformable_sample": (
            ops.deformable_sample,
            {"tokens": normal(2, 40, 6), "offsets": normal(2, 2, 3), "grid_size": (8, 5), "offset_range": 2.0},
        ),
        "quick_gelu": (ops.quick_gelu, {"x": normal(3, 5)}),
        "add_layer_norm": (ops.add_layer_norm, {"x": normal(2, 3, 8), "branch": normal(2, 3, 8), **affine}),
        "attend": (ops.attend, {"qkv": normal(3, 2, 2, 5, 4)}),
        "mean_tokens": (ops.mean_tokens, {"tokens": normal(2, 3, 6, 8)}),
        "attend_masked": (
            ops.attend_masked,
            {"queries": normal(2, 4, 8), "tokens": normal(2, 3, 6, 8), "mask": mask},
        ),
        "cross_attend": (
            ops.cross_attend,
            {"queries": normal(2, 3, 8), "tokens": normal(2, 3, 6, 8), "mask": mask, **projections},
        ),
        "convolve_windows": (ops.convolve_windows, {"x": normal(2, 9, 8, 6), "window": normal(6, 4, 4)}),
        "predict_offsets": (
            ops.predict_offsets,
            {"hidden": normal(2, 3, 40, 6), "grid_size": (8, 5), **parameters},
        ),
        "pairwise_mse_loss": (ops.pairwise_mse_loss, {"maps": normal(3, 4, 5)}),
        "sort_rows": (ops.sort_rows, {"values": normal(3, 5)}),
    }


def with_tensor_changed(x: torch.Tensor, draw: random.Random) -> object:
    """Another shape, dtype, layout, device or content of a tensor, or no tensor at all."""
    how = draw.randrange(12)
    axis = draw.randrange(x.ndim)
    if how == 0:
        return draw.choice((None, 3, 0.5, True, "x", [1.0], (), {}, b"", np.ones(tuple(x.shape), np.float32), [x]))
    if how == 1:
        others = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)
        return x.to(draw.choice(others))
    if how == 2:
        return draw.choice((x[0], x[None], x.flatten(), x.new_zeros(()), x.unsqueeze(-1), x.movedim(axis, 0)))
    if how == 3:
        return x.narrow(axis, 0, draw.choice((0, 1, x.shape[axis] - 1)))
    if how == 4:
        return torch.cat([x, x.narrow(axis, 0, 1)], axis)
    if how == 5:
        last = max(axis, 1) if x.ndim > 1 else 0  # so many maps would be a loop of as many turns
        huge = [2**24 if i == last else size for i, size in enumerate(x.shape)]
        return draw.choice((x.to("meta"), torch.empty(huge, device="meta")))
    if how == 6:
        return draw.choice((x.to_sparse(), x.expand(x.shape), x[:1].expand(x.shape), torch.nn.Parameter(x.float())))
    if how == 7:
        return torch.stack([x, x], -1)[..., 0]
    if how == 8:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == 9 and x.is_floating_point():
        return x.masked_fill(torch.rand(x.shape) < 0.3, draw.choice((float("nan"), float("inf"), -30.0, 1e-40, 0.0)))
    if how == 10 and x.is_floating_point():
        return x * draw.choice((0.0, 30.0, 1e-4, -1.0))
    return x.detach().clone().requires_grad_() if x.is_floating_point() else ~x


def with_argument(given: dict[str, object], draw: random.Random) -> dict[str, object]:
    """Arguments of which one or two are changed."""
    changed = dict(given)
    for name in draw.sample(list(given), min(len(given), draw.choice((0, 1, 1, 1, 2)))):
        value = given[name]
        if isinstance(value, torch.Tensor):
            changed[name] = with_tensor_changed(value, draw)
        elif isinstance(value, list):
            others = [with_tensor_changed(other, draw) if draw.random() < 0.7 else other for other in value]
            changed[name] = draw.choice((others, others[:1], [], others * 3))
        else:
            numbers = (*NUMBERS, 0.5, -2.0, 1e-30, float("nan"), float("inf"), -float("inf"))
            others = (None, True, "2", "", [2], torch.tensor(2), torch.tensor(0.5), torch.ones(2), (8, 5), (40, 1))
            pairs = ((8,), (8, 5, 1), (-8, -5), (8.0, 5.0), ("8", "5"), (0, 40), (2**62, 4), torch.float16, torch.int64)
            changed[name] = draw.choice((*numbers, *others, *pairs))
    return changed


def operators(_: Path) -> Try:
    """Arguments of the public operators: refused in a line that names one of them, or the reference's results."""

    def once(draw: random.Random) -> None:
        torch.manual_seed(draw.randrange(2**31))
        cases = operator_arguments()
        name = draw.choice(list(cases))
        operator, given = cases[name]
        given = with_argument(given, draw)
        results = []
        for backend in ("auto", "reference"):
            with ops.use_backend(backend), torch.set_grad_enabled(True):
                results.append(outcome_of(operator, given))
        ours, exact = results
        if isinstance(ours, str) or isinstance(exact, str):
            for line in results:
                assert isinstance(line, str), f"{name}: {results}"
                assert any(argument in line for argument in given), f"{name}: names no argument: {line}"
                assert len(line.splitlines()) == 1, line
                assert len(line) < 500, line
            return
        dtypes = {value.dtype for value in given.values() if isinstance(value, torch.Tensor)}
        for one, other in zip(ours, exact, strict=True):
            check_near(name, one, other, dtypes)

    return once


def outcome_of(operator: Callable[..., object], given: dict[str, object]) -> str | list[torch.Tensor]:
    """The results and the gradients of a call, or the line that it is refused with."""
    fresh = dict(given)
    leaves = [value for value in fresh.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    if operator is ops.sort_rows and isinstance(fresh["values"], torch.Tensor) and not leaves:
        fresh["values"] = fresh["values"].clone()
    arguments = [fresh.pop(next(iter(fresh)))]
    arguments += fresh.pop("others") if isinstance(fresh.get("others"), list) else []
    try:
        results = operator(*arguments, **fresh)
    except (ValueError, TypeError) as error:
        return str(error)
    results = list(results) if isinstance(results, tuple) else [results]
    wanted = [result for result in results if result.requires_grad and not result.is_meta]
    if leaves and wanted:
        total = torch.stack([result.double().sum() for result in wanted]).sum()
        results += [x for x in torch.autograd.grad(total, leaves, allow_unused=True) if x is not None]
    return results


def check_near(name: str, ours: torch.Tensor, exact: torch.Tensor, dtypes: set[torch.dtype]) -> None:
    """Raise where a result is not the reference's, up to the rounding of its precision."""
    assert (ours.shape, ours.dtype, ours.device) == (exact.shape, exact.dtype, exact.device), f"{name}: {ours} {exact}"
    if ours.is_meta or dtypes & {torch.float16, torch.bfloat16}:  # tests/ops judges their rounding
        return
    ours, exact = ours.detach(), exact.detach()
    if name in ("attend", "cross_attend", "add_layer_norm"):  # PyTorch lets inf and NaN spread in another way
        ours = ours.where(exact.isfinite(), exact)
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), f"{name}: {ours} is not {exact}"
        return
    if name == "predict_offsets" and exact.isnan().any():  # PyTorch's gradient is NaN beyond the last whole window, too
        return
    most = torch.finfo(ours.dtype).max / 4  # whose sums may or may not overflow
    one, other = (x.double().clamp(-most, most) for x in (ours, exact))
    finite = other[other.isfinite()].abs()
    scale = max(1.0, float(finite.max()) if len(finite) else 1.0)
    tolerance = (1e-2 if ours.dtype in (torch.float16, torch.bfloat16) else 1e-3) * scale
    near = torch.isclose(one, other, rtol=0, atol=tolerance, equal_nan=True)
    assert near.all(), f"{name}: {ours} is not {exact}"
