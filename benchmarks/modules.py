"""Times SIM, GAM and LAM, forward and backward, against the authors' modules with the same weights and inputs.

python benchmarks/modules.py --upstream PATH
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness.common import (
    PRECISIONS,
    add_common_arguments,
    check_close,
    environment,
    interleave,
    percentiles,
    run,
    set_up,
    speedup,
)
from harness.upstream import Upstream
from torch import Tensor, nn

from signal_reid.methods.signal.global_alignment import GlobalAlignment
from signal_reid.methods.signal.local_alignment import LocalAlignment
from signal_reid.methods.signal.selective_interaction import SelectiveInteraction
from signal_reid.upstream.parameters import authors_to_ours

CHANNELS, MODALITIES, GRID, K_INTRA = 512, 3, (16, 8), 80
VALUE_TOLERANCE, GRADIENT_TOLERANCE, LOW_TOLERANCE = 1e-4, 1e-3, 5e-2
NAMES = ("SIM", "GAM", "LAM")
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
        """Of the parameters by name, and of `tokens` and `cls`."""
        grads = {name: p.grad for name, p in self.modules.named_parameters() if p.grad is not None}
        for name, leaves in (("tokens", self.tokens), ("cls", self.cls)):
            parts = [leaf.grad for leaf in leaves if leaf.grad is not None]
            if parts:
                grads[name] = parts[0] if len(parts) == 1 else torch.stack(parts, 1)
        return grads


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


def in_double(side: Side, encoded: Tensor, probe: Tensor) -> Side:
    """The oracle when there is no checkout: our modules in fp64."""
    oracle = our_side(encoded.double(), probe.double())
    oracle.modules.load_state_dict(side.modules.state_dict())
    return oracle


def check(ours: Mapping[str, Side], oracle: Side) -> None:
    """Compare the value and every gradient of each module in fp32, its value alone in other precisions."""
    for name in NAMES:
        expected = oracle.run(name, "fp32")
        expected_gradients = authors_to_ours(oracle.gradients())
        for precision, side in ours.items():
            exact = precision == "fp32"
            value = side.run(name, precision)
            check_close(f"{name} in {precision}", value, expected, VALUE_TOLERANCE if exact else LOW_TOLERANCE)
            for key, gradient in side.gradients().items() if exact else ():
                what = f"{name}'s gradient of {key}"
                check_close(what, gradient, expected_gradients[key], GRADIENT_TOLERANCE)


def measure(
    sides: Mapping[str, tuple[Side, str]], args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Rows for each module and for sums of them; `sides` maps a label to an implementation and its precision.

    Ours has the speedup over the authors' modules in fp32 and over theirs in the same precision.
    """
    times = {}
    for name in NAMES:
        steps = {label: partial(side.run, name, precision) for label, (side, precision) in sides.items()}
        times[name] = interleave(steps, args.runs, args.warmup, device)
    where, rows = environment(device)["device"], []
    for group in (*((name,) for name in NAMES), ("GAM", "LAM"), NAMES):
        seconds = {label: [sum(run) for run in zip(*(times[m][label] for m in group), strict=True)] for label in sides}
        for label in sides:
            row = {"modules": " + ".join(group), "implementation": label, "batch": args.batch, "device": where}
            row |= percentiles(seconds[label])
            if label.startswith("ours") and PUBLISHED in sides:
                row["speedup"] = round(speedup(seconds[PUBLISHED], seconds[label]), 3)
                row["same_precision"] = round(speedup(seconds[label.replace("ours", "upstream")], seconds[label]), 3)
            rows.append(row)
    return rows


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, then measure."""
    device = set_up(args)
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch, MODALITIES, 1 + GRID[0] * GRID[1], CHANNELS)
    encoded = torch.randn(shape, generator=generator).to(device)
    probe = torch.randn(args.batch, MODALITIES * CHANNELS, generator=generator).to(device)
    torch.manual_seed(args.seed)
    ours = {precision: our_side(encoded, probe, precision) for precision in args.precision}
    sides = {f"ours {precision}": (side, precision) for precision, side in ours.items()}
    if args.upstream is None:
        first = next(iter(ours.values()))
        weights, oracle = first.modules.state_dict(), in_double(first, encoded, probe)
    else:
        oracle = upstream_side(Upstream(args.upstream), encoded, probe)
        weights = authors_to_ours(oracle.modules.state_dict())
        theirs = {PUBLISHED: (oracle, "fp32")}
        for precision in (precision for precision in args.precision if precision != "fp32"):
            side = upstream_side(Upstream(args.upstream), encoded, probe, precision)
            side.modules.load_state_dict(oracle.modules.state_dict())
            theirs[f"upstream {precision}"] = side, precision
        sides = theirs | sides
    for side in ours.values():
        side.modules.load_state_dict(weights)
    check(ours, oracle)
    return measure(sides, args, device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, batch=64, runs=11)
    args = parser.parse_args(arguments)
    return run(benchmark, args, f"modules, batch {args.batch}")


if __name__ == "__main__":
    sys.exit(main())
