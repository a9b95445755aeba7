"""How much faster is a training step on several processes, and what do they exchange?

python benchmarks/scaling.py --processes 1 2 --batch 16 --layers 2      # on the CPU, one thread each, by gloo
python benchmarks/scaling.py --processes 1 2 4 8 --precision bf16       # a GPU each, by NCCL
python benchmarks/scaling.py --precision bf16 --links 20 200            # on one GPU: what more of them would give

The batch is that of all processes together, so that the steps are one and the same; the loss and the gradient's norm of
the first step are held against one process's before anything is timed. A step is forward, backward and optimizer, from
when all processes begin until the last one ends. Bytes are counted where they are handed to PyTorch's collectives;
`sent_MB` is what a process of a ring sends of them. `exchange_ms` is an all-reduce of as many bytes as the gradients
have, alone. From it follows what the efficiency should be where nothing hides it (`if_after`), and where the backward,
two thirds of a step, does (`if_beside`), which is the model of the table in docs/cluster.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness.common import PRECISIONS, WrongResultError, environment, percentiles, run, synchronize
from harness.models import IDENTITIES_AND_CAMERAS, add_model_arguments, configuration, spread_weights
from torch import Tensor

import signal_reid
from signal_reid.runtime.device import Precision, choose_device
from signal_reid.runtime.distributed import Processes, join_processes
from signal_reid.training import make_optimizer
from signal_reid.training.step import TrainingStep

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
"""The largest error of the loss and the gradient's norm, relative to one process's."""
BACKWARD = 2 / 3
"""Share of a step that the exchange of gradients can hide behind."""
PREDICTED = (2, 4, 8)
"""Processes that a prediction is made for with `--links`."""
MB, GB = 1e6, 1e9


class Shared:
    """This process's part of a training step.

    Args:
        args: the options.
        precision: of the matrix products.
        processes: that share the step.
    """

    def __init__(self, args: argparse.Namespace, precision: str, processes: Processes):
        self.processes, self.device = processes, choose_device(args.device, processes)
        self.config = signal_reid.load_config(
            configuration(args).model_dump(),
            ["training.compile=false", "data.instances=2", f"data.batch_size={args.batch}"],
        )
        model = signal_reid.build_model(self.config, *IDENTITIES_AND_CAMERAS[args.config])
        spread_weights(model, args.seed)
        self.model = model.to(self.device).train()
        self.inputs = self._inputs(args)
        self.precision = Precision(precision, self.device)
        self.counted = self._count()
        self.scaler = self.precision.scaler()
        self.training = TrainingStep(self.model, self.config, self.precision, self.scaler, processes=processes)
        self.optimizer = make_optimizer(self.model, self.config.optimizer)

    def _inputs(self, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
        """This process's rows of a batch of seeded noise with two images of each identity."""
        generator = torch.Generator().manual_seed(args.seed)
        images = torch.randn(
            args.batch, self.config.model.modalities, 3, *self.config.data.image_size, generator=generator
        )
        identities, num_cameras = IDENTITIES_AND_CAMERAS[args.config]
        cameras = torch.randint(0, num_cameras, (args.batch,), generator=generator)
        labels = torch.arange(args.batch) // 2 % identities
        each = args.batch // self.processes.size
        own = slice(self.processes.rank * each, (self.processes.rank + 1) * each)
        return images[own].to(self.device), cameras[own].to(self.device), labels[own].to(self.device)

    def _count(self) -> dict[str, int]:
        """Bytes that a step hands to the collectives: gradients, what the losses need of all samples, buffers."""
        if self.processes.size == 1:
            return {"gradient": 0, "gathered": 0, "buffer": 0}
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        model = copy.deepcopy(self.model)
        step = TrainingStep(model, self.config, self.precision, self.precision.scaler(), processes=self.processes)
        assert step._shared is not None
        gradients: list[int] = []
        gathered: list[int] = []
        gather = dist.all_gather

        def reduce(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            gradients.append(bucket.buffer().nbytes)
            return allreduce_hook(group, bucket)

        def counting(results: list[Tensor], part: Tensor) -> Any:
            gathered.append(sum(result.nbytes for result in results))
            return gather(results, part)

        # Without annotations: PyTorch refuses those that are texts.
        step._shared._parallel.register_comm_hook(dist.group.WORLD, lambda group, bucket: reduce(group, bucket))
        dist.all_gather = counting
        try:
            step.backward(step.forward(*self.inputs)["total"])
        finally:
            dist.all_gather = gather
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        return {"gradient": sum(gradients), "gathered": sum(gathered), "buffer": buffers}

    def first_step(self) -> dict[str, float]:
        """What is held against one process's."""
        total = self.training.forward(*self.inputs)["total"]
        self.training.backward(total)
        scale = self.scaler.get_scale()
        norms = [parameter.grad.norm() for parameter in self.model.parameters() if parameter.grad is not None]
        return {"loss": total.item(), "gradient_norm": torch.stack(norms).norm().item() / scale}

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.training.backward(self.training.forward(*self.inputs)["total"])
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def exchange(self) -> Callable[[], None]:
        """An all-reduce of as many bytes as the gradients have."""
        numbers = torch.zeros(self.counted["gradient"] // 4, device=self.device)
        return lambda: dist.all_reduce(numbers)

    def seconds(self, work: Callable[[], object], args: argparse.Namespace) -> list[float]:
        """Seconds of each round, until the last process is done."""
        times = []
        for number in range(args.warmup + args.runs):
            self.processes.wait()
            synchronize(self.device)
            start = time.perf_counter()
            work()
            synchronize(self.device)
            if number >= args.warmup:
                times.append(time.perf_counter() - start)
        return [max(each) for each in zip(*self.processes.exchange(times), strict=True)]


def measure(args: argparse.Namespace, processes: Processes) -> list[dict[str, Any]]:
    """What these processes take for a step, by precision; the same in each process."""
    rows = []
    for precision in args.precision:
        shared = Shared(args, precision, processes)
        row: dict[str, Any] = {"precision": precision, **shared.first_step(), "counted": shared.counted}
        row["seconds"] = shared.seconds(shared.step, args)
        if processes.size > 1:
            row["exchange_seconds"] = shared.seconds(shared.exchange(), args)
        row["device"] = environment(shared.device)["device"]
        rows.append(row)
    return rows


def sent_bytes(counted: dict[str, int], size: int) -> float:
    """What each of several processes sends in a ring: an all-reduce, an all-gather, and buffers handed on."""
    ring = (size - 1) / size
    return 2 * ring * counted["gradient"] + ring * counted["gathered"] + counted["buffer"] * (size > 1)


def efficiencies(alone: float, size: int, exchange: float) -> dict[str, float]:
    """What follows from one process's seconds and those of the exchange, behind the backward or beside it."""
    part = alone / size
    beside = (1 - BACKWARD) * part + max(BACKWARD * part, exchange)
    return {"if_after": round(part / (part + exchange), 3), "if_beside": round(part / beside, 3)}


def row_of(args: argparse.Namespace, size: int, result: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """What is reported of a number of processes.

    Raises:
        WrongResultError: its first step is not one process's.
    """
    precision, counted = result["precision"], result["counted"]
    for name in ("loss", "gradient_norm"):
        error = abs(result[name] - alone[name]) / abs(alone[name])
        if not error <= TOLERANCES[precision]:
            raise WrongResultError(f"{name} of {size} processes in {precision}: relative error {error:.1e}")
    times, before = percentiles(result["seconds"]), percentiles(alone["seconds"])["p50_ms"]
    row = {"config": args.config, "precision": precision, "device": result["device"], "processes": size}
    row |= {"batch": args.batch, "per_process": args.batch // size, **times}
    row["samples_per_s"] = round(1e3 * args.batch / times["p50_ms"], 2)
    row["efficiency"] = round(before / (size * times["p50_ms"]), 3)
    row |= {f"{name}_MB": round(count / MB, 3) for name, count in counted.items()}
    row["sent_MB"] = round(sent_bytes(counted, size) / MB, 3)
    if size > 1:
        exchange = percentiles(result["exchange_seconds"])["p50_ms"]
        row |= {"exchange_ms": exchange, **efficiencies(before, size, exchange)}
    return row


def predictions(args: argparse.Namespace, alone: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Efficiencies with links of known speed, from one process's time and the gradients' bytes."""
    with torch.device("meta"):
        model = signal_reid.build_model(configuration(args), *IDENTITIES_AND_CAMERAS[args.config])
    gradient = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    before = percentiles(alone["seconds"])["p50_ms"]
    for link in args.links:
        for size in PREDICTED:
            sent = sent_bytes({"gradient": gradient, "gathered": 0, "buffer": 0}, size)
            row = {"config": args.config, "precision": alone["precision"], "link_GB_per_s": link, "processes": size}
            yield row | {"batch": args.batch, **efficiencies(before, size, 1e3 * sent / (link * GB))}


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Start each number of processes in turn, one process first."""
    check(args)
    torch.set_num_threads(args.threads)  # as the rows' environment says
    alone: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for size in sorted({1, *args.processes}):
            results = start(args, size, Path(directory) / "results.json")
            alone = alone or results
            for result, single in zip(results, alone, strict=True):
                yield row_of(args, size, result, single)
    for single in alone:
        yield from predictions(args, single)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: an option.
    """
    for name, values, least in (
        ("processes", args.processes, 1),
        ("runs", [args.runs], 1),
        ("threads", [args.threads], 1),
    ):
        if min(values) < least:
            raise ValueError(f"--{name} must be at least {least}, got {min(values)}")
    uneven = [size for size in args.processes if args.batch % size]
    if uneven or args.batch < 4:
        raise ValueError(f"--batch must be at least 4 and a multiple of --processes {args.processes}, got {args.batch}")
    cards = torch.cuda.device_count()
    if args.device == "cuda" and max(args.processes) > cards:
        raise ValueError(f"--processes: each needs a GPU of its own, and this PyTorch sees {cards}")


def start(args: argparse.Namespace, size: int, path: Path) -> list[dict[str, Any]]:
    """What so many processes measure, which torchrun starts."""
    settings = ["--config", args.config, "--layers", str(args.layers), "--batch", str(args.batch)]
    settings += ["--precision", *args.precision, "--device", args.device, "--seed", str(args.seed)]
    settings += ["--runs", str(args.runs), "--warmup", str(args.warmup), "--threads", str(args.threads)]
    settings += ["--set", *args.set] if args.set else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *settings, "--task", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = re.findall(r"^(?:\[rank\d+\]: ?)?[\w.]*Error: (.*)", done.stderr, re.MULTILINE)
        raise RuntimeError(f"{size} processes: {(said or ['no message'])[0]}")
    results: list[dict[str, Any]] = json.loads(path.read_text())
    return results


def task(args: argparse.Namespace) -> int:
    """What a process does that `start` started."""
    torch.set_num_threads(args.threads)
    with join_processes() as processes:
        results = measure(args, processes)
        if processes.first:
            Path(args.task).write_text(json.dumps(results))
    return 0


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Times, bytes and predictions apart."""
    measured = [row for row in rows if "p50_ms" in row]
    common = {"config", "precision", "processes"}
    amounts = {key for row in measured for key in row if key.endswith("_MB")} | {"exchange_ms"}

    def part(unwanted: set[str]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in unwanted} for row in measured]

    return {
        "A training step on several processes": part({*amounts, "device"}),
        "What it exchanges": part({key for row in measured for key in row} - amounts - common),
        "Efficiency predicted from one process's time": [row for row in rows if "p50_ms" not in row],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--config", choices=IDENTITIES_AND_CAMERAS, default="rgbnt201", help="default rgbnt201")
    add_model_arguments(parser)
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="numbers of processes; 1 always runs")
    parser.add_argument("--batch", type=int, default=64, help="triplets of all processes together (default 64)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="default fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default 1)")
    parser.add_argument("--links", type=float, nargs="+", default=[], metavar="GB_PER_S", help="links to predict with")
    parser.add_argument("--runs", type=int, default=5, help="steps that are timed (default 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps that run before them (default 2)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and inputs (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write the rows into this file")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    return task(args) if args.task else run(rows, args, "A training step on several processes", tables)


if __name__ == "__main__":
    sys.exit(main())
