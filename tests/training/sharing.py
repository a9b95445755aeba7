"""What each of several processes does for `test_sharing.py`, all in one start; leaves its results in a file.

torchrun starts it: sharing.py DIRECTORY, which holds the configurations that `test_sharing.py` wrote. Without torchrun
it is the one process that the others are compared with.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console

from signal_reid.config import load_config
from signal_reid.data import augmentation
from signal_reid.runtime.distributed import join_processes
from signal_reid.training.interruption import TrainingStopped
from signal_reid.training.loop import train
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.step import TrainingStep


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


def main():
    directory = Path(sys.argv[1])
    with join_processes() as processes:
        results = {}
        for path in sorted(directory.glob("*.yml")):
            size = processes.size
            config = load_config(path, [f"output={directory / f'{path.stem}-{size}'}"])
            results[path.stem] = trained(config, processes)
        torch.save(results, directory / f"{processes.size}-{processes.rank}.pt")


if __name__ == "__main__":
    main()
