"""What each of several processes does for `test_distributed.py`, all in one start; leaves its results in a file.

torchrun starts it: sharing.py DIRECTORY, which holds the configurations and weights that `test_distributed.py` wrote.
"""

import contextlib
import io
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from signal_reid.cli import main as run_program
from signal_reid.cli.app import console
from signal_reid.config import load_config
from signal_reid.data import decoding, open_dataset, packing
from signal_reid.evaluation import FeatureSet, RerankingParameters, retrieval_metrics
from signal_reid.evaluation.evaluator import Evaluator, Extractor
from signal_reid.runtime.distributed import ALONE, join_processes
from signal_reid.search import Description, Entry, Index, Retriever, entries_of

CPU = torch.device("cpu")
GATHERED = {
    "fp32": lambda rank: torch.randn(2 * rank + 1, 3),
    "bf16, some without rows": lambda rank: torch.randn(4, 5).bfloat16() if rank == 1 else None,
    "int64, of length 0": lambda rank: torch.arange(3 * (1 - rank % 2)),
    "bool": lambda rank: torch.rand(rank + 1, 2) < 0.5,
    "transposed": lambda rank: torch.randn(4, 3).t(),
    "nothing": lambda rank: None,
}
MEASURED = {
    "one chunk": {},
    "a query a chunk": {"chunk_bytes": 1},
    "some queries a chunk": {"chunk_bytes": 8000},
    "scenes": {"chunk_bytes": 1, "protocol": "scene"},
    "not normalised": {"chunk_bytes": 1, "normalize": False},
    "re-ranked": {"chunk_bytes": 1, "reranking": RerankingParameters(k1=6, k2=3)},
}
EVALUATED = {
    "even": ("rgbnt201", "evaluation.batch_size=2"),
    "uneven": ("rgbnt201", "evaluation.batch_size=5"),
    "more processes than batches": ("rgbnt201", "evaluation.batch_size=128"),
    "query and gallery apart, scenes": ("msvr310", "evaluation.batch_size=4"),
    "loaded by workers": ("rgbnt201", "evaluation.batch_size=2", "data.workers=1"),
    "in bf16": ("rgbnt201", "evaluation.batch_size=5", "evaluation.precision=bf16"),
    "kept in memory": ("rgbnt201", "evaluation.batch_size=2", "data.cache=ram"),
    "packed": ("rgbnt201", "evaluation.batch_size=2", "data.cache=packed"),
    "re-ranked": (
        "msvr310",
        "evaluation.batch_size=4",
        *(f"evaluation.{s}" for s in ("reranking=true", "k1=4", "k2=2")),
    ),
}


class Pixels(torch.nn.Module):
    """Features that any rounding would show in."""

    def __init__(self, spoilt=None):
        super().__init__()
        self.weight = torch.randn(3 * 3 * 8 * 8, 16, generator=torch.Generator().manual_seed(5))
        self.spoilt = spoilt

    def forward(self, images, cameras):
        features = images[..., ::8, ::8].flatten(1) @ self.weight
        return features if self.spoilt is None else features.masked_fill((images == self.spoilt).all(), torch.nan)


def random_set(size, seed):
    """Whole numbers, so that equal distances abound."""
    draw = torch.Generator().manual_seed(seed)
    identities, cameras, scenes = (torch.randint(0, high, (size,), generator=draw) for high in (6, 3, 4))
    return FeatureSet(torch.randint(0, 3, (size, 4), generator=draw).float(), identities, cameras, scenes)


def numbers(metrics):
    return metrics.mAP, metrics.minp, metrics.num_valid_queries, metrics.cmc, metrics.average_precision


def gathered(processes):
    """What each case gives, and what this process put in."""
    results = {}
    for name, make in GATHERED.items():
        rows = make(processes.rank)
        results[name] = rows, processes.gather(rows, CPU)
    return results


def measured(processes):
    """Each case, of two sets and of one, shared and not; one query leaves processes without a chunk."""
    query, gallery = random_set(37, 1), random_set(53, 2)
    results = {
        "one query": [
            numbers(retrieval_metrics(query[:1], gallery, chunk_bytes=1, processes=p)) for p in (ALONE, processes)
        ]
    }
    for name, arguments in MEASURED.items():
        for kind, sets in (("two sets", (query, gallery)), ("one set", (gallery, gallery))):
            both = [numbers(retrieval_metrics(*sets, **arguments, processes=p)) for p in (ALONE, processes)]
            results[f"{name}, {kind}"] = both
    return results


def evaluated(processes, directory):
    """Each case, shared and not, and the files that this process decoded for its share."""
    results = {}
    for name, (layout, *overrides) in EVALUATED.items():
        config = load_config(directory / f"{layout}.yml", overrides)
        dataset = open_dataset(layout, config.data.root)
        both, files = [], []
        for p in (processes, ALONE):
            with recorded(decoding, "develop") as decoded:
                evaluation = Evaluator(config, dataset, CPU, processes=p).run(Pixels())
            both.append((evaluation.query.features, evaluation.gallery.features, numbers(evaluation.metrics)))
            files.append([str(path) for path, *_ in decoded])
        results[name] = {"shared": both[0], "alone": both[1], "decoded": files[0], "decoded alone": files[1]}
    return results


@contextlib.contextmanager
def recorded(module, name):
    """The arguments of a function's calls inside the block."""
    function, calls = getattr(module, name), []
    setattr(module, name, lambda *arguments: calls.append(arguments) or function(*arguments))
    try:
        yield calls
    finally:
        setattr(module, name, function)


def repacked(processes, directory):
    """How often this process packs a file again whose dataset has changed."""
    config = load_config(directory / "rgbnt201.yml", ["evaluation.batch_size=2", "data.cache=packed"])
    dataset = open_dataset("rgbnt201", config.data.root)
    with processes.first_before_others():
        if processes.first:
            dataset.query[0].sources[0].path.touch()
    with recorded(packing, "pack") as packs:
        Evaluator(config, dataset, CPU, processes=processes).run(Pixels())
    return len(packs)


def failed(processes, directory):
    """What every process says about a mistake that one of them or all of them meet."""
    config = load_config(directory / "rgbnt201.yml", ["evaluation.batch_size=1"])
    samples = open_dataset("rgbnt201", config.data.root).query
    spoilt = decoding.decode(samples[7], config.data.image_size, decoding.EVALUATION)
    lonely = random_set(1, 3)
    prepared = Extractor(config, samples, CPU, processes=processes)
    spoil = Pixels(prepared._prepare(spoilt[None]))
    mistakes = {
        "not finite": lambda: prepared.run(spoil),
        "no matches": lambda: retrieval_metrics(lonely, lonely, processes=processes),
        "shapes": lambda: processes.gather(torch.zeros(1, processes.rank + 1), CPU),
        "no batches": lambda: Extractor(config, [], CPU, processes=processes).run(Pixels()),
    }
    messages = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def commands(directory):
    """Exit code and output of the program, one command after another."""
    weights = ["--config", directory / "rgbnt201.yml", "--weights", directory / "rgbnt201.safetensors"]
    fewer = "evaluation.batch_size=5"
    results = {
        "eval": program("eval", *weights, "--output", directory / "shared.json", fewer),
        "extract": program("extract", *weights, "--output", directory / "shared.safetensors", fewer),
        "a wrong key": program("eval", *weights, "data.rot=x"),
        "a wrong device": program("eval", *weights, "training.device=cuda:0"),
    }
    for command in ("demo", "report", "data"):
        results[command] = program(command, *(["check"] if command == "data" else []))
    results["config"] = program("config", "show", "rgbnt201")
    if os.environ.pop("WORLD_SIZE") and os.environ["RANK"] == "0":
        program("eval", *weights, "--output", directory / "alone.json", fewer)
        program("extract", *weights, "--output", directory / "alone.safetensors", fewer)
    return results


def program(*arguments):
    sys.argv = ["signal-reid", *map(str, arguments)]
    out, errors, code = io.StringIO(), io.StringIO(), 0
    console.file = errors
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            run_program()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), errors.getvalue()


def searched(processes, directory):
    """What indices find that one process built, and the processes together."""
    alone, together = directory / f"alone-{processes.rank}", directory / "together"
    for place in (alone, together):
        place.mkdir(exist_ok=True)
    return {"alone": found(ALONE, directory, alone), "together": found(processes, directory, together)}


def found(processes, directory, place):
    """What indices of images find, and of features, on one disk and on a disk for each process."""
    config = load_config(directory / "rgbnt201.yml")
    samples = entries_of(open_dataset("rgbnt201", config.data.root).gallery)
    own_disk = replace(processes, local_rank=0, local_size=1)
    hits = {}
    retriever = Retriever(
        directory / "rgbnt201.safetensors", overrides=["evaluation.batch_size=5"], processes=processes
    )
    retriever.build(place / "index", samples[:10])
    retriever.add(samples[10:])
    hits["images"] = retriever.search_many(samples[:3], top=4)
    generator = torch.Generator().manual_seed(0)
    features, queries = (torch.randn(n, 12, generator=generator) for n in (31, 6))
    features[20] = features[3]
    rows = list(range(31))
    for name, path, group in (
        ("one disk", place / "features", processes),
        ("a disk each", place / f"features-{processes.rank}", own_disk),
    ):
        if group.local_rank == 0:
            Index.create(path, Description("made", ("RGB",), 12))
        processes.wait()
        index = Index(path)
        for some in (rows[:17], rows[17:]):
            share = group.share(some, 4)
            index.add([Entry(str(row), (None,)) for row in share], [features[share]] if share else [], group)
        hits[name] = index.search(queries, 7, group)
        index.load(group)
        hits[f"{name}, loaded"] = index.search(queries, 7, group)
    return hits


def main():
    directory = Path(sys.argv[1])
    with join_processes() as processes:
        torch.manual_seed(processes.rank)
        with join_processes() as again:
            within = again.rank, again.size
        results = {
            "joined": (processes.rank, processes.size, *within, torch.get_num_threads()),
            "gathered": gathered(processes),
            "measured": measured(processes),
            "evaluated": evaluated(processes, directory),
            "repacked": repacked(processes, directory),
            "searched": searched(processes, directory),
            "failed": failed(processes, directory),
        }
    results["left"] = torch.distributed.is_initialized()
    results["commands"] = commands(directory)
    torch.save(results, directory / f"{processes.rank}.pt")


if __name__ == "__main__":
    main()
