"""What does each operator cost on each backend: launches, bytes, predicted and measured time, dispatch?

python benchmarks/ops.py --upstream PATH --precision fp32 bf16 --backend all

A row is one pass of one operator by plain PyTorch (reference), by the same compiled, by Triton or by the native core
(cuda). Launches, bytes and predictions need no GPU: what is counted and what a prediction says stands in
`harness/counting.py` and `harness/roofline.py`. On a GPU a row also has its time, and its launches are those that the
profiler saw; a row that cannot be timed says why. The overhead of dispatch is measured on the CPU, by calls that reach
the native core with nothing to do: they pass Python, the library operator, `autograd.Function` and the binding, and
start no kernel.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from harness.common import (
    PRECISIONS,
    WrongResultError,
    add_common_arguments,
    check_close,
    environment,
    run,
    set_up,
)
from harness.counting import Count, StandIn, as_on_a_gpu, bytes_of, count, profiled_launches, without_values
from harness.device_timing import device_times
from harness.op_steps import MODULES, STEPS, Step, not_measured
from harness.roofline import CARDS, Card, costs, readable
from torch import Tensor

from signal_reid import ops
from signal_reid.ops import triton
from signal_reid.ops.backend import serves
from signal_reid.ops.cuda import core

FILLING = {
    "select_tokens": 512,
    "gramian_volume": 2048,
    "gramian_contrastive_loss": 2048,
    "deformable_sample": 512,
    "predict_offsets": 512,
    "pairwise_mse_loss": 512,
    "attend_masked": 512,
}
"""Batches that occupy any card; the activation does so at the usual batch."""
COMPILED = "compiled reference"
SIDES = ("reference", COMPILED, "triton", "cuda")
TOLERANCE = 1e-4


def in_double(arguments: Sequence[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in arguments]


def results(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def check(step: Step, backend: str, precision: str) -> None:
    """Compare every result with the fp64 oracle: to 1e-4 in fp32, else to twice the error of plain PyTorch.

    Raises:
        harness.common.WrongResultError: it is further away.
    """
    exact = results(step.plain(*in_double(step.arguments)))
    plain = results(step.plain(*step.arguments))
    ours = results(served_by(backend, step))
    for got, of_plain, expected in zip(ours, plain, exact, strict=True):
        name = f"{step.op} {step.direction} by {backend} in {precision}"
        tolerance = 0.0 if got.dtype == torch.bool else TOLERANCE
        if got.dtype in (torch.float16, torch.bfloat16):
            tolerance = 2 * check_close(f"{name}, plain PyTorch", of_plain, expected, 0.1)
        check_close(name, got, expected, tolerance)


def compile_ahead(args: argparse.Namespace) -> None:
    """Fill the caches of the compilers, an operator a process: compilers take most of the time, and a core each."""
    options = ["--precision", *args.precision, "--batch", str(args.batch), "--seed", str(args.seed)]
    options += ["--device", args.device, "--backend", args.backend, "--runs", "1", "--warmup", "0"]
    options += ["--filling" if args.filling else "--no-filling", "--compiled" if args.compiled else "--no-compiled"]
    command = [sys.executable, __file__, *options]
    running = [
        subprocess.Popen([*command, "--ops", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in args.ops
    ]
    for process in running:
        process.wait()  # what fails there fails again, and is reported, where it is measured


def microseconds(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    values = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return {f"p{p}_us": round(1e6 * v, 3) for p, v in zip((20, 50, 80), values.tolist(), strict=True)}


def time_on_device(
    step: Step, sides: Sequence[str], compiled: bool, args: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Percentiles of each side, and how many times longer plain PyTorch takes, eager and if asked for compiled."""
    calls: dict[str, Callable[[], object]] = {"reference": partial(step.plain, *step.arguments)}
    if compiled:
        torch.compiler.reset()  # past a few recompilations of one function PyTorch goes on without compiling
        calls[COMPILED] = partial(torch.compile(lambda *x: step.plain(*x), dynamic=False), *step.arguments)
    for backend in sides:
        if backend not in ("reference", COMPILED):
            calls[backend] = partial(served_by, backend, step)
    times = device_times(calls, args.runs, args.warmup, device)
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    rows: dict[str, dict[str, Any]] = {side: microseconds(seconds) for side, seconds in times.items()}
    for side, row in rows.items():
        row["eager_ratio"] = round(medians["reference"] / medians[side], 3)
        if compiled:
            row["compiled_ratio"] = round(medians[COMPILED] / medians[side], 3)
    return rows


def served_by(backend: str, step: Step) -> Any:
    """One call of ours by a backend."""
    with ops.use_backend(backend):
        return step.ours(*step.arguments)


def measure_card(device: torch.device) -> Card:
    """Bandwidth of a copy and rates of matrix products, for a GPU that is not in the table."""
    size = 8192
    source, matrix = torch.empty(size * size * 4, device=device), torch.randn(size, size, device=device)
    target, low = torch.empty_like(source), matrix.half()
    copy, product, low_product = (
        best_seconds(step, device)
        for step in (lambda: target.copy_(source), lambda: matrix @ matrix, lambda: low @ low)
    )
    return Card(2 * bytes_of(source) / copy, 2 * size**3 / product, 2 * size**3 / low_product)


def best_seconds(step: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def native_or_stand_in() -> tuple[Any, bool]:
    """The native core, or a stand-in where it is not built; which of both."""
    try:
        return StandIn(core.native()), True
    except ImportError:
        return StandIn(), False


def dispatch_overhead(step: Step, calls: int = 100, repeats: int = 15) -> float:
    """Median microseconds of a call without a kernel, recorded for a backward, or of the backward.

    The tensors lie on the CPU and are empty, for which the launchers return at once.
    """
    leaves = [x.detach().requires_grad_() for x in step.inputs]
    call: Callable[[], object] = partial(step.public, *(leaves or step.arguments))
    if step.direction != "forward":
        outputs = results(step.public(*leaves))
        call = partial(torch.autograd.grad, outputs, leaves, [torch.ones_like(x) for x in outputs], retain_graph=True)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(times[1:])


def overheads(names: Sequence[str], precision: str) -> dict[tuple[str, str], dict[str, float]]:
    """The times of every step, under the name of its column."""
    native, bound = native_or_stand_in()
    column = "dispatch_us" if bound else "dispatch_without_binding_us"
    make = partial(torch.zeros, dtype=PRECISIONS[precision])
    found = {}
    with core.use(native), ops.use_backend("cuda"):
        for name in names:
            for step in STEPS[name](0, make):
                found[step.op, step.direction] = {column: round(dispatch_overhead(step), 2)}
    return found


def reason_against(side: str, device: torch.device) -> str | None:
    """Why a side is not timed on this device; None when it is."""
    if side == "triton" and triton.INTERPRETING:
        return "TRITON_INTERPRET=1: the interpreter is not timed"
    reason = ops.dispatch.unavailable_reason("reference" if side == COMPILED else side)
    if reason is None and device.type != "cuda":
        reason = "times are taken on a GPU"
    return reason


def benchmark(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the operators.

    Raises:
        ValueError: options that do not do, such as a backend that cannot serve here.
        harness.common.WrongResultError: after all rows, a result was not that of the oracle, or a side did not run.
    """
    device = set_up(args)
    if args.compile_ahead:
        compile_ahead(args)
    cards = dict(CARDS)
    if device.type == "cuda" and not any(name in environment(device)["device"] for name in CARDS):
        cards["here"] = measure_card(device)
    failures = []
    try:
        for precision in args.precision:
            for row in operator_rows(args, precision, cards, device):
                failures += [row["failed"]] if "failed" in row else []
                yield row
    except ops.BackendError as error:
        raise ValueError(str(error)) from None
    if failures:
        raise WrongResultError("; ".join(failures))


def operator_rows(
    args: argparse.Namespace, precision: str, cards: dict[str, Card], device: torch.device
) -> Iterator[dict[str, Any]]:
    overhead = overheads(args.ops, precision)
    for name in args.ops:
        filling = [FILLING[name]] if name in FILLING and args.filling else []
        for batch in (args.batch, *filling):
            generator = torch.Generator().manual_seed(args.seed)

            def make(*shape: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, PRECISIONS[precision])

            found = counts(name, batch, precision)
            for step in STEPS[name](batch, make):
                usual = batch == args.batch
                head = {"op": name, "step": step.direction, "precision": precision, "batch": batch}
                compiled = usual and args.compiled  # a compiler takes a while, other sizes go without
                for row in step_rows(step, compiled, args, precision, device):
                    own = overhead[step.op, step.direction] if usual and row["backend"] == "cuda" else {}
                    counted = found.get((step.direction, row["backend"]))
                    cost = costs(counted, step.moved, cards) if counted is not None else {}
                    yield head | {"backend": row["backend"]} | cost | row | own


def counts(name: str, batch: int, precision: str) -> dict[tuple[str, str], Count]:
    """What plain PyTorch and the native core do, by step and side; of other sides nothing is known beforehand."""
    found = {}
    with without_values():
        make = partial(without_numbers, PRECISIONS[precision])
        with ops.use_backend("reference"):
            for step in STEPS[name](batch, make):
                found[step.direction, "reference"] = count(partial(step.plain, *step.arguments))
        with as_on_a_gpu():
            for step in STEPS[name](batch, make):
                found[step.direction, "cuda"] = count(partial(step.ours, *step.arguments))
    return found


def without_numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def call_of(step: Step, side: str) -> Callable[[], object]:
    """A side's step, run as it is, not compiled."""
    if side in ("reference", COMPILED):
        return partial(step.plain, *step.arguments)
    return partial(served_by, side, step)


def sides_of(step: Step, compiled: bool, wanted: str) -> list[str]:
    """The backends that have the operator, and plain PyTorch, compiled too or not."""
    if wanted != "all":
        return [wanted]
    module = next(module for module, public in MODULES.items() if public == step.op)
    return [
        side
        for side in SIDES
        if side == "reference" or (side == COMPILED and compiled) or (side != COMPILED and serves(side, module))
    ]


def step_rows(
    step: Step, compiled: bool, args: argparse.Namespace, precision: str, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Check, then one row for each side: its times, or why there are none; one that fails stops no other."""
    sides = sides_of(step, compiled, args.backend)
    reasons = {side: reason_against(side, device) for side in sides}
    failed = {}
    for side in sides if args.backend != "all" else ["reference", *(s for s in sides if reasons[s] is None)]:
        try:
            check(step, "reference" if side == COMPILED else side, precision)
        except ops.BackendError as error:
            if args.backend != "all":
                raise
            reasons[side] = str(error)
        except RuntimeError as error:
            if side == "reference":
                raise
            reasons[side] = failed[side] = f"{step.op} {step.direction} by {side}: {str(error).splitlines()[0]}"
    timed = [side for side in sides if reasons[side] is None]
    times = time_on_device(step, timed, compiled, args, device) if timed else {}
    for side in sides:
        row: dict[str, Any] = {"backend": side}
        if device.type == "cuda" and side in timed and side != COMPILED:
            row["launches"] = profiled_launches(call_of(step, side))
        row |= times[side] if side in timed else {"not timed": reasons[side]}
        yield row | ({"failed": failed[side]} if side in failed else {})


TIMES = ("p20_us", "p50_us", "p80_us", "eager_ratio", "compiled_ratio", "dispatch_us", "dispatch_without_binding_us")
NAMES = ("op", "step", "precision", "batch", "backend")


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What was counted and what it predicts; what was measured; why something was not timed, and what is left out."""
    left_out = [{"operator": module, "not measured": why} for module, why in not_measured().items()]
    reasons = dict.fromkeys((row["backend"], row["not timed"]) for row in rows if "not timed" in row)
    return {
        "counted, and predicted as floor → estimate": [
            readable({name: value for name, value in row.items() if name not in (*TIMES, "not timed", "failed")})
            for row in rows
            if "MB" in row
        ],
        "measured": [
            {name: row[name] for name in (*NAMES, *TIMES) if name in row}
            for row in rows
            if any(name in row for name in TIMES)
        ],
        "not timed": [{"backend": backend, "not timed": why} for backend, why in reasons],
        "left out": left_out,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, batch=64, runs=51)
    parser.add_argument("--ops", nargs="+", choices=STEPS, default=list(STEPS), help="those to measure (default: all)")
    parser.add_argument(
        "--backend",
        choices=("all", "reference", "triton", "cuda"),
        default="all",
        help="those to measure (default: all)",
    )
    parser.add_argument(
        "--filling",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="also sizes that occupy any card (default: on a GPU)",
    )
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also plain PyTorch compiled, at the usual batch (default: yes)",
    )
    parser.add_argument(
        "--compile-ahead",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="first compile all that is measured, in one process for each operator",
    )
    return run(benchmark, parser.parse_args(arguments), "operators", tables)


if __name__ == "__main__":
    sys.exit(main())
