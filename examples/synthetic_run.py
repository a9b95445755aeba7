"""Trains, evaluates and exports on a synthetic data set, through the same functions as the program.

Usage: python examples/synthetic_run.py [DIRECTORY]
"""

import sys
import tempfile
from pathlib import Path

import signal_reid
from signal_reid.data.synthetic import synthesize
from signal_reid.program import export

directory = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
sizes = {"train_identities": 6, "test_identities": 4, "images_per_identity": 4}
root = synthesize("rgbnt201", directory / "data", **sizes, image_size=(64, 64))

settings = {"data.root": root, "data.batch_size": 16, "schedule.epochs": 1, "output": directory / "run"}
config = signal_reid.load_config("demo", [f"{key}={value}" for key, value in settings.items()])
result = signal_reid.train(config)
print(f"best mAP {result.best_mAP:.1%} in epoch {result.best_epoch}")

weights = directory / "run" / "best.safetensors"
print(signal_reid.evaluate(weights).metrics)
print(export(weights, directory / "Signal.pth", naming="authors"))
