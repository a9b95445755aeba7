"""How fast are retrieval metrics and re-ranking beside the authors' evaluation of the same features?

python benchmarks/metrics.py --upstream PATH --precision fp32 bf16
python benchmarks/metrics.py --large 10000 1000000

The features are synthetic and come in batches, as a model hands them over. Ours are in each precision; the authors'
metrics take the same numbers in fp32. On RGBNT201 the query and the gallery are one set. The authors' metrics take it
twice; ours take it once, because our evaluation runs each triplet once. Re-ranking gets two sets: in a set given twice
each item ties with its copy, and the authors' sort leaves the order of ties open. On a CPU both sides profit from the
memory that our evaluation has the process keep. `--large` measures the time and the peak memory of a large search,
once, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from harness.common import (
    PRECISIONS,
    WrongResultError,
    add_common_arguments,
    environment,
    interleave,
    percentiles,
    resident_MiB,
    run,
    set_up,
    speedup,
)
from harness.upstream import UpstreamEvaluation, temporary_working_directory

from signal_reid.evaluation import FeatureSet, Metrics, RerankingParameters, retrieval_metrics
from signal_reid.runtime.allocator import keep_freed_memory

RERANKING = RerankingParameters(k1=50, k2=15, lambda_value=0.3)
CAMERAS, PER_IDENTITY = 4, 28
BATCH = 128
"""Triplets in a batch of the authors' evaluation."""
TOLERANCE, RERANKING_TOLERANCE = 1e-5, 1e-3
LARGE_DIMENSION, LARGE_PER_IDENTITY = 128, 100


@dataclass
class Task:
    """One thing to time: ours gives metrics, the authors' mAP and CMC."""

    name: str
    precision: str
    ours: Callable[[], Metrics]
    theirs: Callable[[], tuple[float, np.ndarray]] | None
    expected: Callable[[], tuple[float, np.ndarray]]
    tolerance: float = TOLERANCE


def make_set(items: int, dimension: int, identities: int, seed: int, spread: float = 6.0) -> FeatureSet:
    """Features around a random centre for each identity; cameras and scenes at random."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(identities, dimension, generator=torch.Generator().manual_seed(0))
    features = torch.randn(items, dimension, generator=generator).mul_(spread)
    identity = torch.arange(items) % identities
    for rows in torch.arange(items).split(2**16):  # little memory beside the features
        features[rows] += centres[identity[rows]]
    cameras, scenes = torch.randint(0, CAMERAS, (2, items), generator=generator)
    return FeatureSet(features, identity, cameras, scenes)


def definition(query: FeatureSet, gallery: FeatureSet, attribute: str) -> tuple[float, np.ndarray]:
    """mAP and CMC in fp64, query by query: the oracle when there is no checkout."""
    a, b = (torch.nn.functional.normalize(items.features.double(), dim=1) for items in (query, gallery))
    distances = torch.cdist(a, b)
    precisions, curves = [], []
    for i in range(len(query)):
        same = gallery.identities == query.identities[i]
        kept = ~(same & (getattr(gallery, attribute) == getattr(query, attribute)[i]))
        found = same[kept][distances[i][kept].argsort(stable=True)].double()
        if found.any():
            precisions.append((found.cumsum(0) / torch.arange(1, len(found) + 1) * found).sum() / found.sum())
            curves.append(np.arange(50) >= int(found.argmax()))
    return float(torch.stack(precisions).mean()), np.mean(curves, axis=0)


def batches_of(items: FeatureSet, device: torch.device, dtype: torch.dtype = torch.float32) -> list[tuple[Any, ...]]:
    """Batches (features, identities, cameras, scenes, names) as the authors' loop passes them on."""
    parts = (items.features.to(device, dtype), items.identities, items.cameras, items.scenes)
    names = [f"{i:06d}.jpg" for i in range(len(items))]
    rows = [slice(start, start + BATCH) for start in range(0, len(items), BATCH)]
    return [(parts[0][r], *(part[r].numpy() for part in parts[1:]), names[r]) for r in rows]


def our_metrics(
    query: Sequence[Sequence[Any]],
    gallery: Sequence[Sequence[Any]] | None,
    protocol: str,
    reranking: RerankingParameters | None = None,
) -> Metrics:
    """From the batches of a query and a gallery set, or of one set that is both."""
    items = _join(query)
    return retrieval_metrics(items, items if gallery is None else _join(gallery), protocol, reranking=reranking)


def _join(batches: Sequence[Sequence[Any]]) -> FeatureSet:
    features = torch.cat([batch[0] for batch in batches])
    attributes = (torch.from_numpy(np.concatenate([batch[i] for batch in batches])) for i in (1, 2, 3))
    return FeatureSet(features, *(attribute.to(features.device) for attribute in attributes))


def make_tasks(args: argparse.Namespace, device: torch.device, precision: str) -> list[Task]:
    dtype, identities, n = PRECISIONS[precision], max(2, args.items // PER_IDENTITY), args.items
    make_side = partial(make_set, n, args.dimension, identities)
    items = _rounded(make_side(args.seed), dtype)
    ours, theirs = batches_of(items, device, dtype), batches_of(items, device)
    upstream = UpstreamEvaluation(args.upstream) if args.upstream else None

    def task(protocol: str, their_metrics: Callable[..., Any] | None) -> Task:
        expected = their_metrics or partial(definition, items, items, f"{protocol}s")
        return Task(
            f"metrics, {protocol}", precision, partial(our_metrics, ours, None, protocol), their_metrics, expected
        )

    tasks = [
        task("camera", upstream and partial(upstream.camera, theirs + theirs, n, False)),
        task("scene", upstream and partial(upstream.scene, theirs + theirs, n)),
    ]
    if upstream and args.reranking:
        others = _rounded(make_side(args.seed + 1), dtype)
        reranked = partial(our_metrics, ours, batches_of(others, device, dtype), "camera", RERANKING)
        expected = partial(upstream.camera, theirs + batches_of(others, device), n, True)
        tasks.append(Task("re-ranking, camera", precision, reranked, expected, expected, RERANKING_TOLERANCE))
    return tasks


def _rounded(items: FeatureSet, dtype: torch.dtype) -> FeatureSet:
    """The same set in fp32, its features without the digits that `dtype` has not."""
    return replace(items, features=items.features.to(dtype).float())


def check(task: Task) -> None:
    """Compare mAP and CMC, which are fractions, by their difference.

    Raises:
        WrongResultError: they differ by more than near ties in fp32 explain.
    """
    metrics, (mean_precision, cmc) = task.ours(), task.expected()
    cmc = cmc[: len(metrics.cmc)]
    error = max(abs(metrics.mAP - mean_precision), float(np.abs(metrics.cmc[: len(cmc)] - cmc).max()))
    if not error <= task.tolerance:
        raise WrongResultError(
            f"{task.name}, {task.precision}: mAP and CMC differ by up to {error:.1e}, above {task.tolerance:.0e}; "
            "no time is reported"
        )


def measure(task: Task, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of both sides."""
    steps = ({"upstream": task.theirs} if task.theirs else {}) | {"ours": task.ours}
    runs = min(args.runs, args.reranking_runs) if "re-ranking" in task.name else args.runs
    seconds = interleave(steps, runs, min(args.warmup, runs), device)
    rows = []
    for name in steps:
        row = {"task": task.name, "implementation": name, "precision": task.precision if name == "ours" else "fp32"}
        row |= {"queries": args.items, "gallery": args.items, "dimension": args.dimension}
        row |= {"device": environment(device)["device"], **percentiles(seconds[name])}
        if name == "ours" and "upstream" in seconds:
            row["speedup"] = round(speedup(seconds["upstream"], seconds["ours"]), 3)
        rows.append(row)
    return rows


def large_row(args: argparse.Namespace) -> dict[str, Any]:
    """The large search in a process of its own."""
    command = [sys.executable, __file__, "--device", args.device, "--seed", str(args.seed), "--run-large"]
    command += ["--threads", str(torch.get_num_threads()), "--large", *map(str, args.large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"--large: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)


def run_large(args: argparse.Namespace) -> dict[str, Any]:
    """What that process does: make the features, measure the metrics once."""
    device = set_up(args)
    queries, items = args.large
    identities = max(2, items // LARGE_PER_IDENTITY)
    query, gallery = (
        make_set(count, LARGE_DIMENSION, identities, args.seed + side, spread=1.0).to(device)
        for side, count in enumerate((queries, items))
    )
    start = time.perf_counter()
    metrics = retrieval_metrics(query, gallery)
    seconds = time.perf_counter() - start
    row = {"task": "metrics, camera, large", "implementation": "ours", "queries": queries, "gallery": items}
    row |= {"dimension": LARGE_DIMENSION, "device": environment(device)["device"], "p50_ms": round(1e3 * seconds, 1)}
    row |= {"mAP": round(metrics.mAP, 6), "peak_MiB": resident_MiB("VmHWM")}
    if device.type == "cuda":
        row["device_peak_MiB"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return row


def benchmark(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check everything, then measure."""
    device = set_up(args)
    if device.type == "cpu":
        keep_freed_memory()
    for name, value in (
        ("items", args.items),
        ("dimension", args.dimension),
        *(("large", n) for n in args.large or ()),
    ):
        if value < 2:
            raise ValueError(f"--{name} must be at least 2, got {value}")
    with temporary_working_directory():
        tasks = [task for precision in args.precision for task in make_tasks(args, device, precision)]
        for task in tasks:
            check(task)
        for task in tasks:
            yield from measure(task, args, device)
    if args.large:
        yield large_row(args)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, batch=BATCH, runs=11)
    parser.add_argument("--items", type=int, default=836, help="triplets in either set (default 836, as RGBNT201)")
    parser.add_argument("--dimension", type=int, default=3072, help="channels of a feature (default 3072, as Signal's)")
    parser.add_argument("--reranking", action=argparse.BooleanOptionalAction, default=True, help="time re-ranking too")
    parser.add_argument("--reranking-runs", type=int, default=3, help="timed rounds of re-ranking, at most (default 3)")
    parser.add_argument(
        "--large", type=int, nargs=2, metavar=("QUERIES", "GALLERY"), help="also measure one such search"
    )
    parser.add_argument("--run-large", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.upstream = os.path.abspath(args.upstream) if args.upstream else None
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.run_large:
        print(json.dumps(run_large(args)))
        return 0
    return run(benchmark, args, f"metrics, {args.items} x {args.items} of {args.dimension}")


if __name__ == "__main__":
    sys.exit(main())
