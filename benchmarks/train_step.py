"""How fast is a training step, from forward to optimizer, beside the authors' step, and how much memory does it take?

python benchmarks/train_step.py --config rgbnt201 --batch 8 --precision fp32 bf16 --upstream PATH

Both sides have the same weights and inputs. The inputs are synthetic, fixed and already on the device. The authors'
step is timed as they run it (fp16 with a gradient scaler on CUDA, fp32 elsewhere) and, to be fair, in each precision
asked for. The peak memory of each row is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    synchronize,
)
from harness.models import IDENTITIES_AND_CAMERAS, add_model_arguments, configuration, spread_weights, upstream_model
from harness.upstream import CONFIGS, Upstream
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import signal_reid
from signal_reid.runtime.allocator import keep_freed_memory
from signal_reid.runtime.device import Precision
from signal_reid.training import make_optimizer, total_loss
from signal_reid.training.step import TrainingStep
from signal_reid.training.throughput import peak_flops, training_flops

INSTANCES = 2
ALONE = [f"model.{name}=false" for name in ("selective_interaction", "global_alignment", "local_alignment")]
OPTIONS = {
    "compiled": ["training.compile=true"],
    "graphs": ["training.compile=true", "training.cuda_graphs=true"],
    "checkpointing": ["training.gradient_checkpointing=true"],
    "accumulation": ["training.accumulation=4"],
    "backbone": ALONE,
    "compiled-backbone": ["training.compile=true", *ALONE],
}
"""Further rows of ours; those of the backbone are without SIM, GAM and LAM, to see their share."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE, LOW_TOLERANCE = 1e-4, 1e-3, 5e-2


@dataclass
class Side:
    """One implementation: its model, its optimizer, and forward and backward of the total loss in a precision."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    gradients: Callable[[str, torch.amp.GradScaler], Tensor]

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device)
        self.no_scaler = torch.amp.GradScaler(device, enabled=False)

    def step(self, precision: str) -> Tensor:
        """One training step; the loss is not read."""
        scaler = self.scaler if precision == "fp16" else self.no_scaler
        self.optimizer.zero_grad()
        loss = self.gradients(precision, scaler)
        scaler.step(self.optimizer)
        scaler.update()
        return loss.detach()

    def gradient_norm(self) -> Tensor:
        norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        return torch.stack(norms).norm()


@dataclass
class Inputs:
    """A fixed batch: images (B, M, 3, H, W), cameras (B,), labels (B,)."""

    images: Tensor
    cameras: Tensor
    labels: Tensor

    def first(self, count: int) -> Inputs:
        return Inputs(self.images[:count], self.cameras[:count], self.labels[:count])


def make_inputs(config: signal_reid.Config, args: argparse.Namespace, device: torch.device) -> Inputs:
    """Seeded noise; as many images of each identity, two where there are enough identities."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch, config.model.modalities, 3, *config.data.image_size)
    images = torch.randn(shape, generator=generator)
    num_identities, num_cameras = IDENTITIES_AND_CAMERAS[args.config]
    cameras = torch.randint(0, num_cameras, (args.batch,), generator=generator)
    labels = torch.arange(args.batch) // instances(args.batch, num_identities)
    return Inputs(images.to(device), cameras.to(device), labels.to(device))


def instances(batch: int, identities: int) -> int:
    """Images of each identity in a batch: the authors' triplet loss takes batches that have the same number of each."""
    return next(n for n in range(INSTANCES, batch + 1) if batch % n == 0 and batch // n <= identities)


def our_side(
    config: signal_reid.Config, inputs: Inputs, args: argparse.Namespace, overrides: Sequence[str] = ()
) -> Side:
    """Our model, step and optimizer; eager unless the overrides say otherwise."""
    config = signal_reid.load_config(config.model_dump(), ["training.compile=false", *overrides])
    model = signal_reid.build_model(config, *IDENTITIES_AND_CAMERAS[args.config])
    spread_weights(model, args.seed)
    model.to(inputs.images.device).train()
    model.backbone.checkpointing = config.training.gradient_checkpointing
    steps: dict[str, TrainingStep] = {}

    def gradients(precision: str, scaler: torch.amp.GradScaler) -> Tensor:
        if precision not in steps:
            steps[precision] = TrainingStep(model, config, Precision(precision, inputs.images.device), scaler)
        total = steps[precision].forward(inputs.images, inputs.cameras, inputs.labels)["total"]
        steps[precision].backward(total)
        return total

    return Side(model, keep_weights(make_optimizer(model, config.optimizer)), gradients)


def upstream_side(upstream: Upstream, ours: nn.Module, inputs: Inputs, args: argparse.Namespace) -> Side:
    """The authors' model, loss and optimizer, with our model's weights."""
    config = upstream.config(args.config)
    model = upstream_model(upstream, ours, args).to(inputs.images.device).train()
    images = dict(zip(("RGB", "NI", "TI"), (part.contiguous() for part in inputs.images.unbind(1)), strict=True))
    identities, _ = IDENTITIES_AND_CAMERAS[args.config]
    total = upstream.loss_function(config, identities)

    def gradients(precision: str, scaler: torch.amp.GradScaler) -> Tensor:
        with torch.autocast(inputs.images.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
            outputs = model(images, cam_label=inputs.cameras, training=True, sge=config.MODEL.stageName)
            loss = total(outputs, inputs.labels, inputs.cameras)
        scaler.scale(loss).backward()
        return loss

    return Side(model, keep_weights(upstream.make_optimizer(config, model, identities)), gradients)


def keep_weights(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Learn at rate zero: the optimizer does all of its work and every step computes the same."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def check(
    ours: Side,
    theirs: Side | None,
    optional: Mapping[str, Side],
    config: signal_reid.Config,
    inputs: Inputs,
    precisions: list[str],
) -> None:
    """Compare loss and gradient with the authors', or the loss with our own in fp64; everything else with our fp32."""
    expected = ours.step("fp32")
    gradient = ours.gradient_norm()
    if theirs is not None:
        check_close("loss", expected, theirs.step("fp32"), LOSS_TOLERANCE)
        check_close("gradient norm", gradient, theirs.gradient_norm(), GRADIENT_TOLERANCE)
    else:
        double = copy.deepcopy(ours.model).double()
        with torch.no_grad():
            encoded = double.encode(inputs.images.double(), inputs.cameras)
            exact = total_loss(double.losses(encoded, inputs.labels), config)
        check_close("loss", expected, exact, LOSS_TOLERANCE)
    for precision in precisions:
        tolerance = LOSS_TOLERANCE if precision == "fp32" else LOW_TOLERANCE
        check_close(f"loss in {precision}", ours.step(precision), expected, tolerance)
        for option, side in optional.items():
            loss = side.step(precision)  # compiles
            if "backbone" not in option:
                check_close(f"loss in {precision}, {option}", loss, expected, tolerance)


def peak_memory(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Peak memory of a step in MiB: of the device's allocator, or the resident set of this process on a CPU.

    Returns:
        `peak_MiB`, and `step_MiB`, what the step took above weights and optimizer state; empty where the system does
        not tell.
    """
    for _ in range(2):
        step()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
        if not clear.exists():
            return {}
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")  # resets VmHWM
        before = _kibibytes(status, "VmRSS") * 1024
        step()
        peak = _kibibytes(status, "VmHWM") * 1024
    return {"peak_MiB": round(peak / 2**20, 1), "step_MiB": round((peak - before) / 2**20, 1)}


def _kibibytes(status: Path, key: str) -> int:
    return int(re.search(rf"^{key}:\s+(\d+) kB", status.read_text(), re.MULTILINE)[1])


def peak_in_subprocess(label: str, args: argparse.Namespace) -> dict[str, float]:
    """`peak_memory` of one row, in a process that holds nothing else."""
    options = {"config": args.config, "batch": args.batch, "device": args.device, "layers": args.layers}
    options |= {"seed": args.seed, "threads": torch.get_num_threads(), "peak-of": label}
    if args.upstream:
        options["upstream"] = args.upstream
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    command += ["--set", *args.set] if args.set else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory of {label}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def peak_of(label: str, args: argparse.Namespace) -> dict[str, float]:
    """What the subprocess runs: build one side and measure its step."""
    device = set_up_training(args)
    config = configuration(args)
    inputs = make_inputs(config, args, device)
    side = our_side(config, inputs, args)
    name, precision, *option = label.split()
    if name == "upstream":
        side = upstream_side(Upstream(args.upstream), side.model, inputs, args)
    elif option:
        side = our_side(config, inputs, args, OPTIONS[option[0]])
    for parameter in side.model.parameters():
        parameter.grad = None

    def step() -> None:
        side.step(precision)
        side.optimizer.zero_grad()

    return peak_memory(step, device)


def set_up_training(args: argparse.Namespace) -> torch.device:
    """Apply the options, and on a CPU what our training does to the process; the authors' step has it too."""
    device = set_up(args)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def benchmark(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check, then measure."""
    device = set_up_training(args)
    check_batches(args)
    config = configuration(args)
    inputs = make_inputs(config, args, device)
    if args.check_batch is not None:
        few = inputs.first(args.check_batch)
        check(*sides(config, few, args), config, few, args.precision)
    timed = sides(config, inputs, args)
    if args.check_batch is None:
        check(*timed, config, inputs, args.precision)
    yield from measure(*timed, args, device)


def measure(
    ours: Side, theirs: Side | None, optional: Mapping[str, Side], args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Time all sides in turn, then give the rows, each with its peak memory."""
    published = f"upstream {'fp16' if device.type == 'cuda' else 'fp32'}"
    rows = {f"ours {precision}": partial(ours.step, precision) for precision in args.precision}
    for option, side in optional.items():
        rows |= {f"ours {precision} {option}": partial(side.step, precision) for precision in args.precision}
    if theirs is not None:
        names = dict.fromkeys([published, *(f"upstream {precision}" for precision in args.precision)])
        rows = {name: partial(theirs.step, name.split()[1]) for name in names} | rows
    seconds = interleave(rows, args.runs, args.warmup, device)
    if args.profile:
        write_profile(args.profile, [step for label, step in rows.items() if label.startswith("ours")][-1], device)
    peaks = {name: peak_flops(Precision(name, device))[0] for name in args.precision}
    for label in rows:
        row = row_of(label, seconds, published, args, device)
        if label.split()[1] in peaks and "backbone" not in label:
            needed = args.batch * training_flops(ours.model)
            row["mfu"] = round(needed / peaks[label.split()[1]] / statistics.median(seconds[label]), 4)
        yield row | (peak_in_subprocess(label, args) if args.memory else {})


def check_batches(args: argparse.Namespace) -> None:
    """Refuse batches that cannot be measured.

    Raises:
        ValueError: it names the option.
    """
    if args.batch % INSTANCES:
        raise ValueError(f"--batch must be a multiple of {INSTANCES}, got {args.batch}")
    each = instances(args.batch, IDENTITIES_AND_CAMERAS[args.config][0])
    if args.check_batch is not None and (args.check_batch % each or not 4 <= args.check_batch <= args.batch):
        raise ValueError(
            f"--check-batch must be a multiple of {each} from 4 to --batch ({args.batch}), got {args.check_batch}"
        )
    if args.check_batch is not None and args.options:
        raise ValueError("--check-batch goes without --options: what is compiled for two sizes is another program")


def sides(
    config: signal_reid.Config, inputs: Inputs, args: argparse.Namespace
) -> tuple[Side, Side | None, dict[str, Side]]:
    """Ours, the authors' if there is a checkout, and ours with each of the options."""
    ours = our_side(config, inputs, args)
    theirs = upstream_side(Upstream(args.upstream), ours.model, inputs, args) if args.upstream else None
    return ours, theirs, {option: our_side(config, inputs, args, OPTIONS[option]) for option in args.options}


def write_profile(path: str, step: Callable[[], object], device: torch.device) -> None:
    """Trace three steps for chrome://tracing or ui.perfetto.dev, and print the operators that take the most time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiled:
        for _ in range(3):
            step()
        synchronize(device)
    profiled.export_chrome_trace(path)
    by = f"self_{device.type}_time_total"
    print(profiled.key_averages(group_by_input_shape=True).table(sort_by=by, row_limit=25, max_shapes_column_width=60))


def row_of(
    label: str, seconds: dict[str, list[float]], published: str, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """A row: percentiles, the speedup over the authors' step as published and in the same precision, and the share of
    SIM, GAM and LAM where the step without them is a row too."""
    sizes = {"config": args.config, "batch": args.batch, "layers": args.layers}
    sizes |= {"settings": " ".join(args.set)} if args.set else {}
    row = {"step": label, **sizes, "device": environment(device)["device"], **percentiles(seconds[label])}
    if published in seconds and label.startswith("ours"):
        row["speedup"] = round(speedup(seconds[published], seconds[label]), 3)
        row["same_precision"] = round(speedup(seconds[f"upstream {label.split()[1]}"], seconds[label]), 3)
    backbone = label + ("-" if label.endswith(" compiled") else " ") + "backbone"
    if backbone in seconds:
        row["modules_share"] = round(1 - speedup(seconds[backbone], seconds[label]), 4)
    return row


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, batch=8, runs=7)
    parser.add_argument("--config", choices=CONFIGS, default="rgbnt201")
    add_model_arguments(parser)
    parser.add_argument("--options", nargs="*", choices=OPTIONS, default=[], help="further rows of our step")
    parser.add_argument(
        "--check-batch", type=int, metavar="N", help="check the first N triplets only, where fp32 of all has no room"
    )
    parser.add_argument("--profile", metavar="FILE", help="write a trace of the last row of ours, print its operators")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.peak_of:
        print(json.dumps(peak_of(args.peak_of, args)))
        return 0
    return run(benchmark, args, f"training step, {args.config}, batch {args.batch}, {args.layers} layers")


if __name__ == "__main__":
    sys.exit(main())
