"""How many training triplets per second and core does our loader deliver, and how many does the authors'?

python benchmarks/dataloading.py --upstream PATH

The data set is synthetic, in RGBNT201's layout, or the real one with `--data`. One thread of this process loads
everything, unless `--workers` asks for processes too. The authors' loader augments what it loads, on the CPU; our
loader hands over bytes that the device augments. Both are timed with augmentation and without. On a CPU both profit
from the memory that our training has the process keep. The authors' loader uses torchvision where it is installed, and
the stand-ins of `harness.torchvision_transforms` elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from harness.common import (
    WrongResultError,
    add_common_arguments,
    environment,
    interleave,
    percentiles,
    run,
    set_up,
)
from harness.upstream import UpstreamLoading
from torch import Tensor

import signal_reid
from signal_reid.data import (
    Augmentation,
    TrainLoader,
    augmentation_generator,
    decode,
    make_train_loader,
    open_dataset,
    open_packed,
    pack,
    prefetch,
)
from signal_reid.data.synthetic import synthesize
from signal_reid.runtime.allocator import keep_freed_memory

SIZE = (256, 128)
CHECK_SIZE = (160, 96)
"""Other than the files' own, so that the check sees the resampling."""
CACHES = ("none", "ram", "packed")
TOLERANCE = 1e-6
AUGMENTED = ", with augmentation"
THEIR_PLACE = Path("512", "data", "RGBNT201")


def configuration(root: Path, args: argparse.Namespace, cache: str, workers: int) -> signal_reid.Config:
    """RGBNT201's, with the options of the command line."""
    data = {"root": root, "batch_size": args.batch, "instances": args.instances, "cache": cache, "workers": workers}
    overrides = [f"data.{name}={value}" for name, value in data.items()]
    return signal_reid.load_config("rgbnt201", ["schedule.epochs=1", *overrides])  # nothing is loaded ahead of a round


def make_data(args: argparse.Namespace, directory: Path) -> Path:
    """The root of the data set, which lies where the authors' class looks for it below `directory`."""
    place = directory / THEIR_PLACE
    place.parent.mkdir(parents=True)
    if args.data:
        place.symlink_to(open_dataset("rgbnt201", args.data).root.resolve())
        return place
    counts = {"train_identities": args.identities, "test_identities": 2, "images_per_identity": args.images}
    return synthesize("rgbnt201", place, **counts, seed=args.seed)


def our_loaders(root: Path, args: argparse.Namespace, device: torch.device, directory: Path) -> dict[str, TrainLoader]:
    """A loader of the training split for every cache and number of workers, by the label of its row."""
    dataset = open_dataset("rgbnt201", root)
    config = configuration(root, args, "packed", 0)
    packed = open_packed(config, pack("rgbnt201", root, config, directory / "triplets.packed"))
    return {
        label(cache, workers): make_train_loader(configuration(root, args, cache, workers), dataset, device, packed)
        for workers in args.workers
        for cache in CACHES
    }


def label(name: str, workers: int) -> str:
    return f"{name}, {workers} workers" if workers else name


def epoch(loader: Iterable[Any]) -> int:
    """Load everything once and count the triplets."""
    return sum(len(batch[1]) for batch in loader)


def our_epoch(loader: TrainLoader, augmentation: Augmentation | None, device: torch.device) -> int:
    """Load an epoch to the device, augment it there if asked to, and count the triplets."""
    loader.set_epoch(1)
    triplets = 0
    for step, batch in enumerate(prefetch(loader, device)):
        if augmentation is not None:
            augmentation.augment(batch.images, augmentation_generator(1, 1, step))
        triplets += len(batch.labels)
    return triplets


def check_caches(loaders: Mapping[str, TrainLoader]) -> None:
    """All loaders give the same batches, to the byte.

    Raises:
        WrongResultError: they do not.
    """
    for loader in loaders.values():
        loader.set_epoch(1)
    for batches in zip(*loaders.values(), strict=True):
        for name, batch in zip(loaders, batches, strict=True):
            if not all(torch.equal(a, b) for a, b in zip(batch, batches[0], strict=True)):
                raise WrongResultError(f"{name}: batches are not those of decoding; no time is reported")


def check_pixels(upstream: UpstreamLoading, root: Path, directory: Path, args: argparse.Namespace) -> None:
    """Without augmentation, the authors' training and evaluation images are ours, to rounding.

    Raises:
        WrongResultError: they are not.
    """
    dataset = open_dataset("rgbnt201", root)
    train, evaluation = upstream.loaders(directory, args.batch, args.instances, CHECK_SIZE, augment=False)
    normalize = Augmentation(configuration(root, args, "none", 0).data).normalize
    for split, loader, interpolation in ((dataset.train, train, "bicubic"), (dataset.query, evaluation, "bilinear")):
        samples = {sample.sources[0].path.name: sample for sample in split}
        for images, *_, names in islice(loader, 1):
            for i, name in enumerate(names):
                theirs = torch.stack([images[modality][i] for modality in ("RGB", "NI", "TI")])
                _compare(name, normalize(decode(samples[name], CHECK_SIZE, interpolation)), theirs)


def _compare(name: str, ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).abs().max().item()
    if not error <= TOLERANCE:
        raise WrongResultError(f"{name}: pixels differ by {error:.1e}; no time is reported")


def make_steps(
    ours: Mapping[str, TrainLoader], theirs: Mapping[tuple[str, str], Any], device: torch.device
) -> dict[tuple[str, str], Callable[[], int]]:
    """(implementation, cache and workers) -> a function that loads an epoch and returns its number of triplets."""
    steps: dict[tuple[str, str], Callable[[], int]] = {key: partial(epoch, loader) for key, loader in theirs.items()}
    augmentation = Augmentation(signal_reid.load_config("rgbnt201").data)
    for name, loader in ours.items():
        steps["ours", name] = partial(our_epoch, loader, None, device)
        steps["ours" + AUGMENTED, name] = partial(our_epoch, loader, augmentation, device)
    return steps


def measure(
    steps: Mapping[tuple[str, str], Callable[[], int]], args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Rows with triplets/s; the rate per core where nothing but this thread loads."""
    counts: dict[Any, int] = {}

    def counting(key: tuple[str, str]) -> None:
        counts[key] = steps[key]()

    times = interleave({key: partial(counting, key) for key in steps}, args.runs, args.warmup, device)
    rates = {key: [counts[key] / seconds for seconds in times[key]] for key in steps}
    rows = []
    for key in steps:
        name, cache = key
        workers = int(cache.split(", ")[1].split()[0]) if "," in cache else 0
        row = {"loader": name, "cache": cache.split(", ")[0], "workers": workers, "batch": args.batch}
        row |= {"device": environment(device)["device"], "triplets": counts[key], **percentiles(times[key])}
        row["triplets_per_s"] = round(statistics.median(rates[key]), 1)
        as_they_run_it = ("upstream" + AUGMENTED, label("none", workers))
        same_work = (name.replace("ours", "upstream"), label("none", workers))
        for column, theirs in (("speedup", as_they_run_it), ("same_work", same_work)):
            if theirs in rates and name.startswith("ours"):
                ratios = [a / b for a, b in zip(rates[key], rates[theirs], strict=True)]
                row[column] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, then measure."""
    args.threads = args.threads or 1
    device = set_up(args)
    if device.type == "cpu":
        keep_freed_memory()
    if args.batch % args.instances:
        raise ValueError(f"--batch must be a multiple of --instances ({args.instances}), got {args.batch}")
    if min(args.workers) < 0:
        raise ValueError(f"--workers must not be negative, got {min(args.workers)}")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        root = make_data(args, directory)
        ours = our_loaders(root, args, device, directory)
        check_caches(ours)
        theirs: dict[tuple[str, str], Any] = {}
        if args.upstream:
            upstream = UpstreamLoading(args.upstream)
            check_pixels(upstream, root, directory, args)
            for workers, augment in product(args.workers, (True, False)):
                loader, _ = upstream.loaders(directory, args.batch, args.instances, SIZE, workers, augment)
                theirs["upstream" + AUGMENTED * augment, label("none", workers)] = loader
        return measure(make_steps(ours, theirs, device), args, device)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, batch=64, runs=7)
    parser.add_argument("--data", metavar="PATH", help="the directory of RGBNT201 (default: a synthetic one)")
    parser.add_argument("--identities", type=int, default=16, help="identities to synthesize for training (default 16)")
    parser.add_argument("--images", type=int, default=16, help="triplets of each synthetic identity (default 16)")
    parser.add_argument("--instances", type=int, default=8, help="triplets of an identity in a batch (default 8)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="loading processes; 0 loads in this one")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    return run(benchmark, args, f"loading, batch {args.batch}")


if __name__ == "__main__":
    sys.exit(main())
