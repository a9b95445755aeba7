"""How long does an index take to answer one query, and how much memory?

python benchmarks/search.py --items 100000 --dimension 3072 --kinds exact ivf
python benchmarks/search.py --items 1000000 --dimension 512

The features are synthetic: 20 items around each of some centres, in fp16, written a part at a time. Half of the queries
are like an item, half like none. Each kind is measured in a process of its own, after its index was loaded. The time of
the processor tells what a query costs where other programs share the machine; the best round tells what it takes alone.
Each answer of the exact index is held against products in fp64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness.common import WrongResultError, percentiles, resident_MiB, run

from signal_reid.search import Description, Entry, Index
from signal_reid.search.exact import exact_scores
from signal_reid.search.neighbours import KINDS

PER_CENTRE, SPREAD, TOP = 20, 0.8, 10
PART = 1000
CHECKED = 4
"""Queries whose answer is computed once more in fp64."""


def features(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """The features in parts; the same for each kind."""
    generator = torch.Generator().manual_seed(args.seed)
    centres = torch.randn(-(-args.items // PER_CENTRE), args.dimension, generator=generator)
    for start in range(0, args.items, PART):
        rows = torch.arange(start, min(start + PART, args.items))
        noise = torch.randn(len(rows), args.dimension, generator=generator)
        yield centres[rows // PER_CENTRE] + SPREAD * noise


def build(args: argparse.Namespace, directory: Path) -> Index:
    kind = args.kinds[0]
    index = Index.create(directory / kind, Description("", ("RGB",), args.dimension, "fp16", kind))
    index.add([Entry(f"{row:09d}.jpg", (None,)) for row in range(args.items)], features(args))
    return index


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """One kind, whose index `build` wrote in another process."""
    kind = args.kinds[0]
    index = Index(directory / kind)
    start = time.process_time()
    index.load()
    loading = time.process_time() - start
    queries = make_queries(index, args)
    wall, processor = [], []
    for number in range(args.runs):
        query = queries[number % len(queries)][None]
        began = time.perf_counter(), time.process_time()
        index.search(query, TOP)
        wall.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    peak = resident_MiB("VmHWM")
    return {
        "kind": kind,
        "items": args.items,
        "dimension": args.dimension,
        "load_processor_s": round(loading, 2),
        "best_ms": round(1e3 * min(wall), 2),
        **percentiles(wall),
        "processor_p50_ms": percentiles(processor)["p50_ms"],
        "peak_MiB": peak,
        "found_share": check(index, queries[:CHECKED], kind),
    }


def make_queries(index: Index, args: argparse.Namespace) -> torch.Tensor:
    """(40, d): half like an item, half like none."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    near = torch.stack([feature.float() for (_, _, feature), _ in zip(index.rows(), range(20), strict=False)])
    far = torch.randn(20, args.dimension, generator=generator)
    near = near + SPREAD * torch.randn(20, args.dimension, generator=generator) / args.dimension**0.5
    return torch.stack([near, far], 1).flatten(0, 1)


def check(index: Index, queries: torch.Tensor, kind: str) -> float:
    """The share of the nearest by definition that the index found.

    Raises:
        WrongResultError: the exact index missed one.
    """
    queries = torch.nn.functional.normalize(queries, dim=1)
    blocks = [block for part in index.description.parts for _, block in index._segment(part).blocks()]
    found = 0
    for query, hits in zip(queries, index.search(queries, TOP), strict=True):
        scores = torch.cat([exact_scores(query, block) for block in blocks])
        nearest = scores.sort(descending=True, stable=True).indices[:TOP].tolist()
        found += len(set(nearest) & {hit.row for hit in hits})
        if kind == "exact" and nearest != [hit.row for hit in hits]:
            raise WrongResultError("the exact index does not find what products in fp64 find")
    return found / (TOP * len(queries))


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each kind; building and measuring are processes of their own, so that each has its own peak."""
    settings = ["--items", str(args.items), "--dimension", str(args.dimension), "--runs", str(args.runs)]
    settings += ["--seed", str(args.seed), *(["--threads", str(args.threads)] if args.threads else [])]
    with tempfile.TemporaryDirectory() as directory:
        for kind in args.kinds:
            for task in ("build", "measure"):
                command = [sys.executable, __file__, *settings, "--kinds", kind, "--task", task, directory]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    raise RuntimeError(f"{kind}: {reason}")
                last = json.loads(done.stdout)
                if task == "build":
                    built = last
            yield {**last, "build_peak_MiB": built["peak_MiB"]}


def task(args: argparse.Namespace) -> int:
    name, directory = args.task
    if args.threads:
        torch.set_num_threads(args.threads)
    if name == "build":
        build(args, Path(directory))
    print(json.dumps({"peak_MiB": resident_MiB("VmHWM")} if name == "build" else measure(args, Path(directory))))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000, help="in the index (default 100,000)")
    parser.add_argument("--dimension", type=int, default=3072, help="numbers of a feature (default 3,072)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["exact"], help="of index (default exact)")
    parser.add_argument("--runs", type=int, default=120, help="queries that are timed (default 120)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--seed", type=int, default=1, help="seed of features and queries (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write the rows into this file")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.device = "cpu"
    return task(args) if args.task else run(rows, args, "Search of an index")


if __name__ == "__main__":
    sys.exit(main())
