"""One's own images from a manifest: all modalities, two of them, RGB alone: python examples/own_images.py [DIRECTORY]

The model of all modalities is then asked with thermal queries alone, in a gallery that has everything. Each line that
is printed is a command, such as `signal-reid data check manifest made/manifest.csv`.
"""

import shlex
import sys
from pathlib import Path

from signal_reid.cli import program

TINY = shlex.split("""
    model.backbone.layers=1 model.backbone.width=48 model.backbone.heads=3 model.backbone.patch_size=8
    model.backbone.stride=8 model.backbone.output_dim=32 model.k_intra=20 data.image_size=[64,64] data.batch_size=8
    data.instances=2 data.workers=0 schedule.epochs=1 schedule.warmup_epochs=0 training.compile=false
""")  # a model that takes a second; leave these settings out for the real one
BASELINE = shlex.split("model.selective_interaction=false model.global_alignment=false model.local_alignment=false")
FEW = shlex.split("--train-identities 6 --test-identities 4 --images-per-identity 4 --height 64 --width 64")

directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
images, three, two, one = (directory / name for name in ("images", "three", "two", "one"))
manifest = images / "manifest.csv"


def signal_reid(*arguments: object) -> None:
    print("signal-reid", *arguments)
    program(args=[str(argument) for argument in arguments], standalone_mode=False)


signal_reid("data", "synthesize", "manifest", images, *FEW)
signal_reid("data", "check", "manifest", manifest, "--modalities", "RGB,TI")
train = ("train", "--config", "manifest", f"data.root={manifest}", *TINY)
signal_reid(*train, f"output={three}")
signal_reid("eval", "--weights", three / "last.safetensors", "--missing", "query=RGB,NI")
signal_reid(*train, "data.modalities=[RGB,TI]", f"output={two}")
signal_reid("eval", "--weights", two / "last.safetensors")
signal_reid(*train, "data.modalities=[RGB]", *BASELINE, f"output={one}")  # SIM, GAM and LAM relate modalities
