"""What SIM, GAM and LAM launch and move forward and backward: ours on a GPU, ours in plain PyTorch, and the authors'.

Plain PyTorch ("eager") is the reference: every operator as its formula, in PyTorch's own operators.

What must move: forward every input and parameter is read once and the result is written; backward they are read once
more (GAM's gradient needs no token) and every gradient is written. An expanded gradient counts as what it is a view of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from signal_reid.methods.signal.global_alignment import GlobalAlignment
from signal_reid.methods.signal.local_alignment import LocalAlignment
from signal_reid.methods.signal.selective_interaction import SelectiveInteraction
from signal_reid.ops import use_backend

from .counting import Count, as_on_a_gpu, bytes_of, count, without_values
from .op_steps import CHANNELS, GRID, K_INTRA, MODALITIES
from .roofline import costs
from .upstream import Upstream

NAMES = ("SIM", "GAM", "LAM")
STEPS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Passes:
    """What forward and backward did, with the result of the one and the gradients of the other."""

    counts: tuple[Count, Count]
    result: Tensor
    gradients: Sequence[Tensor]


@dataclass(frozen=True)
class Subject:
    """A module with its inputs.

    Attributes:
        forward: the call.
        inputs: that require a gradient.
        module: holds the parameters.
    """

    forward: Callable[[], Tensor]
    inputs: Sequence[Tensor]
    module: nn.Module

    def passes(self, precision: torch.dtype) -> Passes:
        """One forward under autocast where the precision is low, and its backward."""
        results: list[Tensor] = []
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            forward = count(lambda: results.append(self.forward()))
        leaves = [*self.inputs, *(p for p in self.module.parameters() if p.requires_grad)]
        grad, gradients = torch.ones_like(results[0]), []
        backward = count(lambda: gradients.extend(torch.autograd.grad(results[0], leaves, grad, allow_unused=True)))
        return Passes((forward, backward), results[0], [x for x in gradients if x is not None])


def our_subjects(batch: int, precision: torch.dtype) -> dict[str, Subject]:
    """On what the ViT hands over in this precision."""
    encoded = torch.empty(batch, MODALITIES, 1 + GRID[0] * GRID[1], CHANNELS, dtype=precision)
    tokens, cls = encoded[:, :, 1:].requires_grad_(), encoded[:, :, 0].requires_grad_()
    sim, gam, lam = (
        SelectiveInteraction(CHANNELS, K_INTRA),
        GlobalAlignment(),
        LocalAlignment(CHANNELS, MODALITIES, GRID),
    )
    return {
        "SIM": Subject(partial(sim, tokens, cls), (tokens, cls), sim),
        "GAM": Subject(partial(gam, tokens), (tokens,), gam),
        "LAM": Subject(partial(lam, tokens), (tokens,), lam),
    }


def authors_subjects(upstream: Upstream, batch: int, precision: torch.dtype) -> dict[str, Subject]:
    """On real numbers, for which their code asks."""
    encoded = torch.randn(MODALITIES, batch, 1 + GRID[0] * GRID[1], CHANNELS).to(precision).unbind(0)
    tokens = [x[:, 1:].requires_grad_() for x in encoded]
    cls = [x[:, 0].requires_grad_() for x in encoded]
    sim, alignment = upstream.selective_interaction(K_INTRA), upstream.alignment(GRID)
    return {
        "SIM": Subject(partial(sim, *tokens, *cls), (*tokens, *cls), sim),
        "GAM": Subject(partial(alignment.Cls_Align, *tokens), tokens, alignment),
        "LAM": Subject(partial(alignment.patch_Align, *tokens), tokens, alignment),
    }


def must_move(name: str, subject: Subject, passes: Passes) -> tuple[int, int]:
    """Bytes forward and backward."""
    parameters = [p for key, p in subject.module.named_parameters() if "selection.value" not in key]  # takes no part
    forward = bytes_of(*subject.inputs, *parameters, passes.result)
    read = bytes_of(*subject.inputs, *(p for p in parameters if p.requires_grad)) if name != "GAM" else 0
    return forward, read + bytes_of(passes.result, *passes.gradients)


def module_costs(
    batch: int, precisions: Mapping[str, torch.dtype], upstream: Upstream | None
) -> Iterator[dict[str, Any]]:
    """Rows for each module and for their sum, forward and backward, of each implementation in each precision."""
    for label, precision in precisions.items():
        counted: dict[str, dict[str, Passes]] = {}
        least: dict[str, tuple[int, int]] = {}
        with without_values():
            for side, serving in (("ours", as_on_a_gpu()), ("eager", use_backend("reference"))):
                subjects = our_subjects(batch, precision)
                with serving:
                    counted[side] = {name: subject.passes(precision) for name, subject in subjects.items()}
                least = least or {name: must_move(name, subjects[name], counted[side][name]) for name in NAMES}
        if upstream is not None:
            subjects = authors_subjects(upstream, batch, precision)
            counted["upstream"] = {name: subject.passes(precision) for name, subject in subjects.items()}
        for names in (*((name,) for name in NAMES), NAMES):
            for step in STEPS if len(names) > 1 else STEPS[:2]:
                for side, passes in counted.items():
                    yield _row(f"{side} {label}", batch, names, step, passes, least)


def _row(
    label: str,
    batch: int,
    names: Sequence[str],
    step: str,
    passes: Mapping[str, Passes],
    least: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """One row, of one step or of both."""
    which = [i for i, name in enumerate(STEPS[:2]) if step in (name, STEPS[2])]
    found = sum((passes[name].counts[i] for name in names for i in which), Count())
    head = {
        "module": names[0] if len(names) == 1 else "all three",
        "step": step,
        "implementation": label,
        "batch": batch,
    }
    return head | costs(found, sum(least[name][i] for name in names for i in which)) | {"syncs": found.syncs}
