"""Groups of processes for `test_sharing.py`: started once, it forks them, so that PyTorch is imported once for all.

sharing.py DIRECTORY equal|ends, where `test_sharing.py` wrote the configurations; every process leaves its results
there. All groups find each other by one store that outlives them, as torchrun's restarts do.
"""

import argparse
import contextlib
import itertools
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # PyTorch's optimizers would import it in every process, which takes seconds
from rich.console import Console
from torch.distributed import TCPStore

from signal_reid.cli import main as signal_reid_program
from signal_reid.config import load_config
from signal_reid.data import augmentation
from signal_reid.data.loading import TripletDataset
from signal_reid.evaluation.evaluator import Extractor
from signal_reid.runtime.distributed import join_processes
from signal_reid.runtime.errors import InputError
from signal_reid.training import setup
from signal_reid.training.interruption import TrainingStopped
from signal_reid.training.loop import train
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.step import TrainingStep

PARENT = os.getpid()


class Recorded:
    """What a training saw and computed: rows of samples, augmented images, gradients' norms, weights."""

    def __init__(self):
        self.images, self.labels, self.norms = [], [], []

    def __enter__(self):
        self._augment, self._backward = augmentation.Augmentation.augment, TrainingStep.backward
        self._forward = TrainingStep.forward

        def augment(this, *arguments):
            images = self._augment(this, *arguments)
            self.images.append(images[:, :, :, ::8, ::8].clone())
            return images

        def forward(this, images, cameras, labels):
            self.labels.append(labels.clone())
            return self._forward(this, images, cameras, labels)

        def backward(this, total):
            self._backward(this, total)
            squares = [p.grad.double().square().sum() for p in this.model.parameters() if p.grad is not None]
            self.norms.append(torch.stack(squares).sum().sqrt().item())

        augmentation.Augmentation.augment, TrainingStep.backward = augment, backward
        TrainingStep.forward = forward
        return self

    def __exit__(self, *_):
        augmentation.Augmentation.augment, TrainingStep.backward = self._augment, self._backward
        TrainingStep.forward = self._forward


def trained(config, processes, **options):
    """What a training left in this process, and the rows that it wrote."""
    with Recorded() as recorded:
        try:
            model = train(config, console=Console(quiet=True), processes=processes, **options).model
            weights = {name: value.clone() for name, value in model.state_dict().items()}
        except TrainingStopped:
            weights = {}
    processes.wait()
    rows = RunDirectory(config.output).rows()
    return {**vars(recorded), "rows": rows, "weights": weights}


def equal_cases(directory):
    """Each configuration; two are stopped within an epoch, to be resumed by another number of processes."""
    with join_processes() as processes:
        results = {}
        for path in sorted(directory.glob("*.yml" if processes.size < 4 else "*[0-9].yml")):
            output = directory / f"{path.stem}-{processes.size}"
            results[path.stem] = trained(load_config(path, [f"output={output}"]), processes)
        if processes.size < 4:
            shared = directory / f"stopped-by-{processes.size}"
            config = load_config(directory / "rgbnt201.yml", [f"output={shared}"])
            asked = iter([0] * 4 + [int(processes.rank == processes.size - 1)] * 9)  # one process alone is asked
            results["stopped"] = trained(config, processes, asked=lambda: signal.SIGUSR1 * next(asked))
        if processes.size == 2:
            results["scaling"] = scaling_measured(processes)
        torch.save(results, directory / f"{processes.size}-{processes.rank}.pt")


def scaling_measured(processes):
    """What benchmarks/scaling.py reports of a toy."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import scaling

    toy = ["model.backbone.width=48", "model.backbone.heads=3", "model.backbone.output_dim=32"]
    options = {"config": "rgbnt201", "layers": 1, "batch": 4, "runs": 1, "warmup": 0, "seed": 1, "device": "cpu"}
    args = argparse.Namespace(**options, precision=["fp32"], set=toy)
    return scaling.measure(args, processes)


def resumed(directory, run):
    """A run that other processes were stopped or killed in goes on."""
    with join_processes() as processes:
        config = load_config(directory / "rgbnt201.yml", [f"output={directory / run}"])
        result = trained(config, processes, resume=True)
        torch.save(result, directory / f"resumed-{run}-{processes.rank}.pt")


DEATHS = {
    "loading": (1, TripletDataset, "__getitems__", 3),
    "forward": (1, TrainingStep, "forward", 2),
    "backward": (1, TrainingStep, "backward", 6),
    "evaluation": (1, Extractor, "run", 1),
    "writing": (0, os, "replace", 4),
}
"""Which process is killed as it calls what for the which time."""


def dying(directory, stage, how=signal.SIGKILL, *settings):
    """Train as the program does; one process dies on the way."""
    rank, owner, name, count = DEATHS[stage]
    called, function = itertools.count(1), getattr(owner, name)

    def or_die(*arguments):
        if int(os.environ["RANK"]) == rank and next(called) == count:
            os.kill(os.getpid(), how)
        return function(*arguments)

    setattr(owner, name, or_die)
    run_program(directory, f"{stage}-{how.name}", *settings)


def failing(directory):
    """One process meets a mistake of the user's."""

    def fail(*_):
        raise InputError("nothing to be learned here")

    if os.environ["RANK"] == "1":
        TrainingStep.forward = fail
    run_program(directory, "failing")


def run_program(directory, name, *settings):
    settings = [f"output={directory / name}", *settings]
    sys.argv = ["signal-reid", "train", "--config", str(directory / "rgbnt201.yml"), "--resume", "auto", *settings]
    signal_reid_program()


def group(directory, size, name, function, *arguments):
    """Fork processes that know each other, and wait for them; exit codes and what they said."""
    said = directory / f"{name}.txt"
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ.update({key: str(value) for key, value in numbers.items()})
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            run_child(function, directory, *arguments)
        pids.append(pid)
    started, codes = time.monotonic(), {}
    while len(codes) < size:  # the process that keeps the store stays
        pid, status = os.waitpid(-1, 0)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if len(codes) == size - 1 and name == "hanging":  # a stopped process ends by nothing else
            os.kill(pids[1], signal.SIGKILL)
    return [codes[pid] for pid in pids], said.read_text(), time.monotonic() - started


def run_child(function, *arguments):
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(ValueError, OSError):
        sys.stderr.flush()
    os._exit(code)


def keep_store():
    """Fork a process that keeps the store, as its threads must not be there when others are forked."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        os.close(ours)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(theirs, str(store.port).encode())
        while os.getppid() == PARENT:
            time.sleep(0.5)
        os._exit(0)
    port = os.read(ours, 8).decode()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")


def main():
    directory, part, ended = Path(sys.argv[1]), sys.argv[2], {}
    keep_store()
    if part == "equal":
        setup.peak_flops = lambda precision: (1e12, "not measured")  # which takes a second
        for size in (1, 2, 4):
            ended[f"equal, {size}"] = group(directory, size, f"equal-{size}", equal_cases)
        for before, size in ((2, 1), (1, 2)):
            ended[f"resumed, {before}"] = group(directory, size, f"resumed-{before}", resumed, f"stopped-by-{before}")
        ended["killed"] = group(directory, 2, "killed", dying, "backward")
        ended["restarted"] = group(directory, 2, "restarted", resumed, "backward-SIGKILL")
    else:
        short = ("schedule.epochs=2", "evaluation.every=1")
        for stage in DEATHS:
            ended[stage] = group(directory, 2, stage, dying, stage, signal.SIGKILL, *short)
            ended[f"{stage}, again"] = group(directory, 2, f"{stage}-again", run_program, f"{stage}-SIGKILL", *short)
        slow = ("training.timeout_minutes=0.2", *short)
        ended["hanging"] = group(directory, 2, "hanging", dying, "forward", signal.SIGSTOP, *slow)
        ended["failing"] = group(directory, 2, "failing", failing)
    torch.save(ended, directory / "ended.pt")


if __name__ == "__main__":
    main()
