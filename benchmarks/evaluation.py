"""How fast is a whole evaluation, the model's features and their metrics, beside the authors' with the same weights?

python benchmarks/evaluation.py --upstream PATH --precision fp32 bf16

The images are synthetic and in memory: our side gets bytes, the authors' side images that are normalised already. The
query and the gallery are one set, as on RGBNT201: the authors' loop runs it twice, ours runs it once. The authors' side
is timed in fp32, as they run it, and in each precision asked for. On a CPU our evaluation has its process keep freed
memory. The authors' side therefore runs in another process, where memory is handled as they have it, unless
`--same-process` lets both sides profit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from harness.common import (
    PRECISIONS,
    OwnProcess,
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
from harness.models import IDENTITIES_AND_CAMERAS, add_model_arguments, configuration, spread_weights, upstream_model
from harness.upstream import CONFIGS, Upstream, UpstreamEvaluation
from torch import Tensor, nn

import signal_reid
from signal_reid.data import Augmentation, Batch
from signal_reid.evaluation import FeatureSet, Metrics, extract_features, retrieval_metrics
from signal_reid.runtime.allocator import keep_freed_memory

TOLERANCE, LOW_TOLERANCE = 1e-4, 0.1
"""Largest error of features in fp32, and in lower precision, where some tokens are selected differently."""
NEAR_TIES = 1e-2
"""Largest difference of mAP between features that agree: those of noise are often at nearly equal distances."""

FEWEST = 64
"""Triplets; the authors' metrics need 50 that a query may be matched with."""


def make_batches(config: signal_reid.Config, args: argparse.Namespace) -> list[Batch]:
    """Seeded noise; four images of each identity, one after the other."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.items, config.model.modalities, 3, *config.data.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(args.items) // 4
    cameras = torch.randint(0, IDENTITIES_AND_CAMERAS[args.config][1], (args.items,), generator=generator)
    scenes, indices = torch.full((args.items,), -1), torch.arange(args.items)
    parts = (values.split(args.batch) for values in (images, labels, cameras, scenes, indices))
    return [Batch(*part) for part in zip(*parts, strict=True)]


@dataclass
class Ours:
    """Our evaluation: each triplet once through the model."""

    model: nn.Module
    batches: Sequence[Batch]
    device: torch.device
    normalize: Callable[[Tensor], Tensor]

    def features(self, precision: str) -> FeatureSet:
        return extract_features(self.model, self.batches, self.device, precision, self.normalize)

    def run(self, precision: str) -> Metrics:
        return self.measure(self.features(precision))

    def measure(self, items: FeatureSet) -> Metrics:
        return retrieval_metrics(items, items, "camera")

    def first(self, count: int) -> Ours:
        """The same of fewer batches."""
        return replace(self, batches=self.batches[:count])


@dataclass
class Theirs:
    """The authors' loop over queries and gallery, and their metrics."""

    model: nn.Module
    metrics: UpstreamEvaluation
    batches: Sequence[tuple[dict[str, Tensor], Batch]]
    device: torch.device
    stage: str

    def forward(self, precision: str, count: int | None = None) -> list[tuple[Any, ...]]:
        """Batches (features, identities, cameras, scenes, names) of one pass, or the first of them."""
        results = []
        for host_images, batch in self.batches[:count]:
            with torch.no_grad(), torch.autocast(self.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
                images = {name: part.to(self.device) for name, part in host_images.items()}
                features = self.model(
                    images, cam_label=batch.cameras.to(self.device), view_label=None, training=False, sge=self.stage
                )
            results.append(
                (features.float(), batch.labels.numpy(), batch.cameras.numpy(), None, ["name"] * len(features))
            )
        return results

    def run(self, precision: str) -> tuple[float, Any]:
        return self.measure(self.forward(precision), self.forward(precision))

    def measure(self, query: list[tuple[Any, ...]], gallery: list[tuple[Any, ...]]) -> tuple[float, Any]:
        return self.metrics.camera(query + gallery, sum(len(part[0]) for part in query), reranking=False)


def our_side(args: argparse.Namespace, device: torch.device) -> Ours:
    config = configuration(args)
    model = signal_reid.build_model(config, *IDENTITIES_AND_CAMERAS[args.config])
    spread_weights(model, args.seed)
    return Ours(model.to(device).eval(), make_batches(config, args), device, Augmentation(config.data).normalize)


def upstream_side(ours: Ours, args: argparse.Namespace) -> Theirs:
    """Theirs with our weights and images."""
    upstream = Upstream(args.upstream)
    normalised = [ours.normalize(batch.images).unbind(1) for batch in ours.batches]
    images = [
        dict(zip(("RGB", "NI", "TI"), (part.contiguous() for part in parts), strict=True)) for parts in normalised
    ]
    return Theirs(
        upstream_model(upstream, ours.model, args).to(ours.device).eval(),
        UpstreamEvaluation(args.upstream),
        list(zip(images, ours.batches, strict=True)),
        ours.device,
        upstream.config(args.config).MODEL.stageName,
    )


def own_upstream_side(args: argparse.Namespace) -> Theirs:
    """Theirs in a process where nothing is set for ours."""
    return upstream_side(our_side(args, set_up(args)), args)


def check(ours: Ours, theirs: Theirs | OwnProcess | None, precisions: Sequence[str]) -> None:
    """Compare features and mAP of the first batches with the authors' in fp32, and other precisions with our fp32."""
    count = -(-FEWEST // len(ours.batches[0].images))
    ours = ours.first(count)
    items = ours.features("fp32")
    expected = items.features
    if theirs is not None:
        results = theirs.forward("fp32", count)
        check_close("features", expected, torch.cat([part[0] for part in results]), TOLERANCE)
        difference = abs(ours.measure(items).mAP - theirs.measure(results, results)[0])
        if not difference <= NEAR_TIES:
            raise WrongResultError(f"mAP differs by {difference:.1e}, above {NEAR_TIES:.0e}; no time is reported")
    for precision in {*precisions} - {"fp32"}:
        check_close(f"features in {precision}", ours.features(precision).features, expected, LOW_TOLERANCE)


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, then measure."""
    device = set_up(args)
    if args.items < FEWEST:
        raise ValueError(f"--items must be at least {FEWEST}, got {args.items}")
    if device.type == "cpu":
        keep_freed_memory()
    ours = our_side(args, device)
    theirs: Theirs | OwnProcess | None = None
    if args.upstream:
        alone = device.type == "cpu" and not args.same_process
        theirs = OwnProcess(own_upstream_side, args) if alone else upstream_side(ours, args)
    check(ours, theirs, args.precision)

    rows: dict[str, Callable[[], object]] = {}
    if theirs is not None:
        names = dict.fromkeys(["fp32", *args.upstream_precision])
        rows = {f"upstream {name}": partial(theirs.run, name) for name in names}
    rows |= {f"ours {name}": partial(ours.run, name) for name in args.precision}
    seconds = interleave(rows, args.runs, args.warmup, device)
    table = []
    for label in rows:
        side, precision = label.split()
        row = {"evaluation": label, "config": args.config, "items": args.items, "batch": args.batch}
        row |= {"layers": args.layers, **({"settings": " ".join(args.set)} if args.set else {})}
        row |= {"device": environment(device)["device"], **percentiles(seconds[label])}
        if side == "ours" and theirs is not None:
            row["speedup"] = round(speedup(seconds["upstream fp32"], seconds[label]), 3)
            if precision in ("fp32", *args.upstream_precision):
                row["same_precision"] = round(speedup(seconds[f"upstream {precision}"], seconds[label]), 3)
        table.append(row)
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, batch=128, runs=3)
    parser.add_argument("--config", choices=[name for name in CONFIGS if name != "msvr310"], default="rgbnt201")
    add_model_arguments(parser)
    parser.add_argument("--items", type=int, default=836, help="triplets in either set (default 836, as RGBNT201)")
    parser.add_argument("--same-process", action="store_true", help="run both sides in one process, as on a GPU")
    parser.add_argument(
        "--upstream-precision",
        nargs="*",
        choices=PRECISIONS,
        help="precisions of the authors' side besides fp32 (default: those of ours)",
    )
    args = parser.parse_args(arguments)
    args.upstream_precision = args.precision if args.upstream_precision is None else args.upstream_precision
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    return run(benchmark, args, f"whole evaluation, {args.config}, {args.items} triplets, {args.layers} layers")


if __name__ == "__main__":
    sys.exit(main())
