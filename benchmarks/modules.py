"""How fast are SIM, GAM and LAM, forward and backward, beside the authors' modules with the same weights and inputs?

python benchmarks/modules.py --upstream PATH

It also says, without a GPU, what each module launches and moves, what must be moved at least, and what that predicts
for several cards, beside plain PyTorch and the authors' code: see `harness/module_costs.py` and `harness/roofline.py`.

Values and gradients are checked against the authors' modules, or against ours in fp64 without `--upstream`, before
anything is timed. The check does not depend on how a processor rounds: see `check_temperature`, `redraw_near_ties`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness.common import (
    PRECISIONS,
    WrongResultError,
    add_common_arguments,
    check_close,
    environment,
    interleave,
    percentiles,
    run,
    set_up,
    speedup,
)
from harness.counting import profiled_launches
from harness.module_costs import NAMES, module_costs
from harness.roofline import readable
from harness.upstream import Upstream
from torch import Tensor, nn

from signal_reid.methods.signal.global_alignment import GlobalAlignment
from signal_reid.methods.signal.local_alignment import LocalAlignment
from signal_reid.methods.signal.selective_interaction import SelectiveInteraction, TokenSelection
from signal_reid.upstream.parameters import authors_to_ours, ours_to_authors

CHANNELS, MODALITIES, GRID, K_INTRA = 512, 3, (16, 8), 80
VALUE_TOLERANCE, GRADIENT_TOLERANCE, LOW_TOLERANCE = 1e-4, 1e-3, 5e-2
TEMPERATURE, TEMPERATURE_DRAWS = "global_alignment.temperature", 5
"""A parameter that is one number, and the inputs over which the error of its gradient is taken in the middle."""
LEAST_GAP = 1e-5
"""Between a score that is kept and one that is not; rounding in fp32 moves a score by less."""
PUBLISHED = "upstream fp32"


@dataclass
class Side:
    """One implementation.

    Attributes:
        modules: holds every parameter, by our names or the authors'.
        tokens, cls: what the ViT hands over, as leaves: (B, M, N, C) and (B, M, C), or a part of them per modality.
        forward: scalar result of each of `NAMES`.
    """

    modules: nn.Module
    tokens: tuple[Tensor, ...]
    cls: tuple[Tensor, ...]
    forward: Mapping[str, Callable[[], Tensor]]

    def run(self, name: str, precision: str) -> Tensor:
        """Forward and backward of one module; gradients stay in the leaves and the parameters."""
        self.modules.zero_grad()
        for leaf in (*self.tokens, *self.cls):
            leaf.grad = None
        with torch.autocast(self.tokens[0].device.type, PRECISIONS[precision], enabled=precision != "fp32"):
            value = self.forward[name]()
        value.backward()
        return value.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the parameters by name, and of `tokens` and `cls`."""
        grads = {name: p.grad for name, p in self.modules.named_parameters() if p.grad is not None}
        for name, leaves in (("tokens", self.tokens), ("cls", self.cls)):
            parts = [leaf.grad for leaf in leaves if leaf.grad is not None]
            if parts:
                grads[name] = parts[0] if len(parts) == 1 else torch.stack(parts, 1)
        return grads


def score_gaps(selection: TokenSelection, encoded: Tensor) -> Tensor:
    """(B, M, 1 + N, C) -> (B,): the least distance of a selection's last kept score to the next one."""
    exact, encoded = copy.deepcopy(selection).double(), encoded.double()
    tokens, cls = encoded[:, :, 1:], encoded[:, :, 0]
    within = torch.einsum("bmc,bmnc->bmn", cls, tokens)
    across = torch.einsum("bmc,bknc->bmkn", exact.query(cls) @ exact.key.weight, tokens)
    for m in range(MODALITIES):
        across[:, m, m] = -torch.inf  # a modality chooses among the others' tokens
    gaps = []
    for scores, k in ((within, K_INTRA), (across.flatten(2), 2 * K_INTRA)):  # (B, M, candidates)
        best = scores.topk(k + 1).values
        gaps.append(best[..., k - 1] - best[..., k])
    return torch.stack(gaps).amin((0, 2)) / CHANNELS**0.5


@torch.no_grad()
def redraw_near_ties(selection: TokenSelection, encoded: Tensor, generator: torch.Generator) -> None:
    """Replace, in place, the samples of which rounding would decide what is selected.

    Two processors, or our formula and the authors', then select the same tokens. Of 64 random samples some have scores
    on either side of the last kept one that differ by 1e-7 to 1e-5, while fp32 rounds scores by up to 1e-6.
    """
    while len(rows := (score_gaps(selection, encoded) < LEAST_GAP).nonzero().flatten()):
        encoded[rows] = torch.randn((len(rows), *encoded.shape[1:]), generator=generator).to(encoded)


def our_side(encoded: Tensor, probe: Tensor, precision: str = "fp32") -> Side:
    """Our modules on the ViT's output (B, M, 1 + N, C); SIM's is summed with the weights of the probe (B, M * C).

    In low precision the ViT hands its tokens over in that precision; the parameters are in that of `encoded`.
    """
    modules = nn.ModuleDict(
        {
            "selective_interaction": SelectiveInteraction(CHANNELS, K_INTRA),
            "global_alignment": GlobalAlignment(),
            "local_alignment": LocalAlignment(CHANNELS, MODALITIES, GRID),
        }
    ).to(encoded)
    encoded = encoded if precision == "fp32" else encoded.to(PRECISIONS[precision])
    tokens, cls = (part.detach().requires_grad_() for part in (encoded[:, :, 1:], encoded[:, :, 0]))
    sim, gam, lam = modules.values()
    forward = {"SIM": lambda: (sim(tokens, cls) * probe).sum(), "GAM": lambda: gam(tokens), "LAM": lambda: lam(tokens)}
    return Side(modules, (tokens,), (cls,), forward)


def upstream_side(upstream: Upstream, encoded: Tensor, probe: Tensor, precision: str = "fp32") -> Side:
    """The authors' modules, on the output of one run of the ViT per modality, as their model calls them."""
    modules = nn.ModuleDict({"SIM": upstream.selective_interaction(K_INTRA), "AlignM": upstream.alignment(GRID)})
    modules.to(encoded)
    encoded = encoded if precision == "fp32" else encoded.to(PRECISIONS[precision])
    outputs = [part.clone() for part in encoded.unbind(1)]  # each (B, 1 + N, C)
    tokens = tuple(output[:, 1:].requires_grad_() for output in outputs)
    cls = tuple(output[:, 0].requires_grad_() for output in outputs)
    sim, alignment = modules.values()
    forward = {
        "SIM": lambda: (sim(*tokens, *cls) * probe).sum(),
        "GAM": lambda: alignment.Cls_Align(*tokens),
        "LAM": lambda: alignment.patch_Align(*tokens),
    }
    return Side(modules, tokens, cls, forward)


def with_weights(side: Side, weights: Mapping[str, Tensor]) -> Side:
    """The same side with these weights, by the names of its implementation."""
    side.modules.load_state_dict(weights)
    return side


def check(ours: Mapping[str, Side], oracle: Side) -> None:
    """Compare the value and every gradient of each module in fp32, its value alone in other precisions.

    The gradient of the temperature is left to `check_temperature`.
    """
    for name in NAMES:
        expected = oracle.run(name, "fp32")
        expected_gradients = authors_to_ours(oracle.gradients())
        for precision, side in ours.items():
            exact = precision == "fp32"
            value = side.run(name, precision)
            check_close(f"{name} in {precision}", value, expected, VALUE_TOLERANCE if exact else LOW_TOLERANCE)
            gradients = side.gradients() if exact else {}
            for key in gradients.keys() - {TEMPERATURE}:
                what = f"{name}'s gradient of {key}"
                check_close(what, gradients[key], expected_gradients[key], GRADIENT_TOLERANCE)


def check_temperature(alignment: GlobalAlignment, tokens_shape: Sequence[int], seed: int) -> None:
    """Compare the gradient of GAM's temperature in fp32 with that of the same module in fp64.

    It is not compared with the authors' gradient, whose digits in fp32 depend on how a CPU's kernels round: a softmax's
    gradient sums to zero only up to rounding, and what is left is multiplied by the volumes' common part and by
    1 / temperature^2, which makes 2e-3 of the gradient at batch 64 and 2e-2 at batch 256. Nor can the authors' code be
    asked for more digits: it computes the determinant in fp32 whatever the input. The median over several inputs is
    taken because for some of them this one number is near zero and its relative error therefore large.

    Raises:
        WrongResultError: the median error exceeds the tolerance of gradients.
    """
    exact = copy.deepcopy(alignment).double()
    errors = []
    for draw in range(TEMPERATURE_DRAWS):
        tokens = torch.randn(tokens_shape, generator=torch.Generator().manual_seed(seed + draw))
        tokens = tokens.to(alignment.temperature)
        gradient, expected = (
            torch.autograd.grad(module(tokens.to(module.temperature)), module.temperature)[0].double()
            for module in (alignment, exact)
        )
        errors.append(((gradient - expected) / expected).abs())
    error = torch.stack(errors).median().item()
    if not error <= GRADIENT_TOLERANCE:
        raise WrongResultError(
            f"GAM's gradient of {TEMPERATURE}: median relative error {error:.2e} is above {GRADIENT_TOLERANCE:.0e}; "
            "no time is reported"
        )


def measure(
    sides: Mapping[str, tuple[Side, str]], args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Rows for each module and for sums of them; `sides` maps a label to an implementation and its precision.

    Ours has the speedup over the authors' modules in fp32 and over theirs in the same precision.
    """
    times, where = {}, environment(device)["device"]
    for group in (*((name,) for name in NAMES), ("GAM", "LAM"), NAMES):
        for name in (name for name in group if name not in times):
            steps = {label: partial(side.run, name, precision) for label, (side, precision) in sides.items()}
            times[name] = interleave(steps, args.runs, args.warmup, device, queued=True)
        seconds = {label: [sum(run) for run in zip(*(times[m][label] for m in group), strict=True)] for label in sides}
        for label in sides:
            row = {"modules": " + ".join(group), "implementation": label, "batch": args.batch, "device": where}
            row |= percentiles(seconds[label])
            if device.type == "cuda":
                side, precision = sides[label]
                row["launches"] = sum(profiled_launches(partial(side.run, name, precision)) for name in group)
            if label.startswith("ours") and PUBLISHED in sides:
                row["speedup"] = round(speedup(seconds[PUBLISHED], seconds[label]), 3)
                row["same_precision"] = round(speedup(seconds[label.replace("ours", "upstream")], seconds[label]), 3)
            yield row


def benchmark(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check, then measure."""
    device = set_up(args)
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch, MODALITIES, 1 + GRID[0] * GRID[1], CHANNELS)
    encoded = torch.randn(shape, generator=generator).to(device)
    probe = torch.randn(args.batch, MODALITIES * CHANNELS, generator=generator).to(device)
    torch.manual_seed(args.seed)
    first = our_side(encoded, probe)
    redraw_near_ties(first.modules["selective_interaction"].selection, encoded, generator)

    weights = first.modules.state_dict()
    ours = {precision: with_weights(our_side(encoded, probe, precision), weights) for precision in args.precision}
    theirs = {}
    upstream = Upstream(args.upstream) if args.upstream is not None else None
    if upstream is not None:
        authors_weights = ours_to_authors(weights)
        for precision in dict.fromkeys(["fp32", *args.precision]):
            side = upstream_side(upstream, encoded, probe, precision)
            theirs[f"upstream {precision}"] = with_weights(side, authors_weights), precision
    oracle = theirs[PUBLISHED][0] if theirs else with_weights(our_side(encoded.double(), probe.double()), weights)
    check(ours, oracle)
    if "fp32" in ours:
        check_temperature(ours["fp32"].modules["global_alignment"], ours["fp32"].tokens[0].shape, args.seed)
    sides = theirs | {f"ours {precision}": (side, precision) for precision, side in ours.items()}
    yield from measure(sides, args, device)
    precisions = {precision: PRECISIONS[precision] for precision in args.precision}
    yield from module_costs(args.batch, precisions, upstream)


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What was measured; what was counted and what it predicts."""
    return {
        "modules, forward and backward": [row for row in rows if "modules" in row],
        "counted, and predicted as floor → estimate": [readable(row) for row in rows if "module" in row],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, batch=64, runs=11)
    args = parser.parse_args(arguments)
    return run(benchmark, args, "modules", tables)


if __name__ == "__main__":
    sys.exit(main())
