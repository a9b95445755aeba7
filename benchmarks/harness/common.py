"""What every benchmark does: it reads options, checks results, times steps in turn, and prints or writes rows."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .comparison import add_compare_arguments
from .device_timing import device_times

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WrongResultError(RuntimeError):
    """A result that disagrees with the one it is checked against: nothing may be timed."""


def add_common_arguments(parser: argparse.ArgumentParser, batch: int, runs: int) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--upstream", metavar="PATH", help="a checkout of the authors' code to compare with")
    parser.add_argument("--batch", type=int, default=batch, help=f"triplets (default {batch})")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="of our side (default fp32)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--runs", type=int, default=runs, help=f"rounds that are timed (default {runs})")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that run before the timed ones (default 2)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and inputs (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write the rows into this file")
    add_compare_arguments(parser)


def set_up(args: argparse.Namespace) -> torch.device:
    """Apply the options that concern the machine, and keep fp32 to fp32.

    Raises:
        ValueError: a number that is too small, or a device that is not there.
    """
    for name, least in (("batch", 4), ("runs", 1), ("warmup", 0), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this PyTorch sees no GPU")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # else the authors' convolutions would round what our products do not
    return torch.device(args.device)


def check_close(name: str, result: Tensor, expected: Tensor, tolerance: float) -> float:
    """Largest difference of two tensors over the largest magnitude expected.

    Raises:
        WrongResultError: it exceeds the tolerance, or is not a number.
    """
    result, expected = result.detach().double(), expected.detach().double()
    error = ((result - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    if not error <= tolerance:
        raise WrongResultError(f"{name}: relative error {error:.2e} is above {tolerance:.0e}; no time is reported")
    return error


def interleave(
    steps: Mapping[str, Callable[[], object]], runs: int, warmup: int, device: torch.device, queued: bool = False
) -> dict[str, list[float]]:
    """Seconds of each step in each of `runs` rounds; a round calls every step once, so that noise meets all alike.

    Every other round goes backwards, so that no step always follows the same one.

    Args:
        queued: on a GPU, the time of the device alone, for what a larger whole queues ahead of it.
    """
    if queued and device.type == "cuda":
        return device_times(steps, runs, warmup, device)
    for _ in range(warmup):
        for step in steps.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for run in range(runs):
            for name in list(steps)[:: -1 if run % 2 else 1]:
                times[name].append(_seconds(steps[name], device))
    finally:
        gc.enable()
    return times


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


class OwnProcess:
    """An object in a process of its own: its methods run there, and this process waits for what they return.

    So what is set for all of a process, as the C library's allocator is, does not reach it. What the methods take and
    return is pickled; what they raise is raised here.

    Args:
        make: a function of a module, called in the new process with `args`; it returns the object.
    """

    def __init__(self, make: Callable[..., object], *args: Any) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._pool.submit(_OwnObject.make, make, args).result()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._call, method)

    def _call(self, method: str, *args: Any) -> Any:
        return self._pool.submit(_OwnObject.call, method, args).result()


class _OwnObject:
    """The object of an `OwnProcess`, inside the new process."""

    instance: object

    @classmethod
    def make(cls, make: Callable[..., object], args: Sequence[Any]) -> None:
        cls.instance = make(*args)

    @classmethod
    def call(cls, method: str, args: Sequence[Any]) -> Any:
        return getattr(cls.instance, method)(*args)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds, linearly interpolated."""
    values = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return {f"p{p}_ms": round(1e3 * value, 4) for p, value in zip((20, 50, 80), values.tolist(), strict=True)}


def speedup(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of their time over ours."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


@cache
def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on besides the code: the device and its driver, the threads, the versions, the commit."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        **({"driver": _driver()} if cuda else {}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    """Version of the NVIDIA driver: of the kernel module, or what nvidia-smi says where that cannot be read."""
    module = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", module.read_text()) if module.is_file() else None
    if found:
        return found[1]
    lines = (_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "").split()
    return lines[0] if lines else None


def _commit() -> str | None:
    return _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"])


def _output(command: Sequence[str]) -> str | None:
    """What a program prints; none where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def resident_MiB(key: str) -> float | None:  # noqa: N802 - the unit
    """Memory of this process that is in RAM, `VmRSS` now or `VmHWM` at most so far; none where the system keeps it."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    return round(int(found[1]) / 1024, 1) if found else None


class Rows(list[dict[str, Any]]):
    """Rows that stand in a file as soon as each is measured, so that a run that is cut off leaves those it had.

    Args:
        path: the file, or none.
        device: what is measured.
    """

    def __init__(self, path: str | None, device: torch.device):
        super().__init__()
        self._path = Path(path).absolute() if path else None  # a benchmark may work in a directory of its own
        self._device = device

    def take(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add the rows one by one as they come."""
        for row in rows:
            self.append(row)
            self._write(complete=False)

    def finish(self) -> None:
        """Say in the file that these are all."""
        self._write(complete=True)

    def _write(self, complete: bool) -> None:
        if self._path is not None:
            write_json(self._path, self, self._device, complete)


def write_json(
    path: str | Path, rows: Sequence[Mapping[str, Any]], device: torch.device, complete: bool = True
) -> None:
    """Write the environment and the rows, and whether these are all; the file appears whole or not at all."""
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    with beside.open("w") as file:
        json.dump({"environment": environment(device), "complete": complete, "rows": list(rows)}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def print_table(title: str, rows: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """Print rows, one column for every key that a row has; numbers to four digits."""
    record = environment(device)
    table = Table(title=f"{title}: {record['device']}, {record['threads']} threads, torch {record['torch']}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        justify: Literal["left", "right"] = "left" if isinstance(rows[0].get(column), str) else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=None if os.environ.get("COLUMNS") else 160).print(table)


def run(
    benchmark: Callable[[argparse.Namespace], Iterable[dict[str, Any]]],
    args: argparse.Namespace,
    title: str,
    tables: Callable[[Sequence[dict[str, Any]]], Mapping[str, Sequence[Mapping[str, Any]]]] | None = None,
) -> int:
    """Measure, write each row where `--json` says as soon as it is there, print all; an error is one line.

    Args:
        tables: divides the rows into tables by their titles, where one is not enough.

    Returns:
        The exit code: 1 for a wrong result or a failure while measuring and 130 for an interrupt, both behind the rows
        so far, 2 for options or files that do not do.
    """
    device = torch.device(args.device)
    rows, status = Rows(args.json, device), 0
    try:
        rows.take(benchmark(args))
        rows.finish()
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        if not isinstance(error, RuntimeError):
            return 2
        status = 1
    except KeyboardInterrupt:
        print(f"interrupted after {len(rows)} rows", file=sys.stderr)
        status = 130
    if status and not rows:
        return status
    for heading, part in (tables(rows) if tables else {title: rows}).items():
        if part:
            print_table(heading, part, device)
    return status


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
