"""What the program is asked to do under a fault, and how its outcome is held against an undisturbed one's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from signal_reid.checkpoints.reading import read
from signal_reid.config import dump_config, load_config
from signal_reid.data.packing import PackedImages
from signal_reid.evaluation import load_features
from signal_reid.training.run_directory import RunDirectory
from signal_reid.training.training_state import is_finished, load_training_state

SETTINGS = ["model.backbone.layers=1", "model.backbone.width=48", "model.backbone.heads=3", "model.k_intra=20"]
SETTINGS += ["model.backbone.patch_size=8", "model.backbone.stride=8", "model.backbone.output_dim=32"]
SETTINGS += ["data.image_size=[64,64]", "data.batch_size=8", "data.instances=2", "data.workers=0", "data.root=data"]
SETTINGS += ["schedule.epochs=3", "schedule.warmup_epochs=1", "training.log_every=1", "output=out/run"]
SETTINGS += ["training.device=cpu"]
SIZES = ["--train-identities", "5", "--test-identities", "3", "--images-per-identity", "4", "--cameras", "2"]
SIZES += ["--height", "64", "--width", "64"]
SYNTHESIZE = ["data", "synthesize", "rgbnt201"]
PACKED = "data/signal_reid_64x64.packed"


def write_config(path: Path) -> None:
    """The configuration of every run."""
    path.write_text(dump_config(load_config("rgbnt201", SETTINGS)))


def digest(path: Path) -> str:
    """What the bytes of a file, or of all below a directory, are."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    content = hashlib.sha256()
    for file in files:
        if file.is_file():
            content.update(file.relative_to(path.parent).as_posix().encode() + b"\0" + file.read_bytes())
    return content.hexdigest()


def tensors(path: Path) -> object:
    """Names and bytes of a file's tensors; the order of safetensors' metadata differs from process to process."""
    with safe_open(path, "numpy") as file:
        return {name: hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest() for name in file.keys()}  # noqa: SIM118


def losses_and_weights(run: Path) -> object:
    """Every loss, every mAP and the weights of a finished training."""
    rows = RunDirectory(run).rows()
    losses = [(row["epoch"], row["step"], row["total"]) for row in rows if row["kind"] == "step"]
    scores = [(row["epoch"], row["mAP"]) for row in rows if row["kind"] == "eval"]
    return losses, scores, tensors(run / "last.safetensors"), tensors(run / "best.safetensors")


def page(path: Path) -> object:
    """Whether the report is there; its bytes hold times of the training that it reports on."""
    return path.read_text(encoding="utf-8").rstrip().endswith("</html>")


@dataclass(frozen=True)
class Operation:
    """A command, where it writes, and what is to have come of it.

    Attributes:
        name: in the matrix.
        arguments: of the program.
        result: what is compared with an undisturbed run, from the directory of the stage.
        needs: parts of the template that it works on, by their place in the stage.
        overrides: whether it takes settings, such as `data.workers`.
        reads_images: whether it decodes.
        reads_weights: the file of weights that it reads.
        own_directory: the directory that it works in; None where it writes one file.
    """

    name: str
    arguments: tuple[str, ...]
    result: Callable[[Path], object]
    needs: tuple[tuple[str, str], ...] = ()
    overrides: bool = True
    reads_images: bool = True
    reads_weights: str | None = None
    own_directory: str | None = None

    def next_command(self, stage: Path) -> list[str]:
        """What its user would ask for after a fault."""
        run = RunDirectory(stage / "out/run")
        if self.name in ("train", "resume") and run.checkpoint.exists():
            finished = is_finished(run, load_config(run.config))
            return ["report", "out/run"] if finished else ["train", "--resume", "out/run"]
        if self.name in ("train", "resume"):
            return ["train", "--config", "config.yml"]
        return list(self.arguments)

    def is_done(self, stage: Path) -> bool:
        """Whether all is there, so that asking again would be refused."""
        if self.name == "data synthesize":
            return (stage / "out/data").exists()
        return self.name in ("train", "resume") and (stage / "out/run/report.html").exists()


WEIGHTS = ("--weights", "weights.safetensors")
HAS_WEIGHTS = (("finished/last.safetensors", "weights.safetensors"),)

OPERATIONS = [
    Operation(
        "train",
        ("train", "--config", "config.yml"),
        lambda stage: losses_and_weights(stage / "out/run"),
        own_directory="out/run",
    ),
    Operation(
        "resume",
        ("train", "--resume", "out/run"),
        lambda stage: losses_and_weights(stage / "out/run"),
        (("half", "out/run"),),
        reads_weights="out/run/checkpoint.pt",
        own_directory="out/run",
    ),
    Operation(
        "eval",
        ("eval", *WEIGHTS, "--output", "out/numbers.json"),
        lambda stage: digest(stage / "out/numbers.json"),
        HAS_WEIGHTS,
        reads_weights="weights.safetensors",
    ),
    Operation(
        "extract",
        ("extract", *WEIGHTS, "--output", "out/features.safetensors"),
        lambda stage: tensors(stage / "out/features.safetensors"),
        HAS_WEIGHTS,
        reads_weights="weights.safetensors",
    ),
    Operation(
        "export",
        ("export", *WEIGHTS, "--output", "out/exported.safetensors"),
        lambda stage: tensors(stage / "out/exported.safetensors"),
        HAS_WEIGHTS,
        reads_images=False,
        reads_weights="weights.safetensors",
    ),
    Operation(
        "data pack",
        ("data", "pack", "--config", "config.yml", "--output", "out/images.packed"),
        lambda stage: digest(stage / "out/images.packed"),
    ),
    Operation(
        "data synthesize",
        (*SYNTHESIZE, "out/data", *SIZES),
        lambda stage: digest(stage / "out/data"),
        overrides=False,
        reads_images=False,
        own_directory="out/data",
    ),
    Operation(
        "report",
        ("report", "out/run"),
        lambda stage: page(stage / "out/run/report.html"),
        (("finished", "out/run"),),
        reads_weights="out/run/last.safetensors",
        own_directory="out/run",
    ),
    Operation(
        "show",
        ("show", "tokens", *WEIGHTS, "--output", "out/picture.svg"),
        lambda stage: digest(stage / "out/picture.svg"),
        HAS_WEIGHTS,
        reads_weights="weights.safetensors",
    ),
]


def set_stage(stage: Path, template: Path, operation: Operation) -> None:
    """Everything that the operation works on, afresh; an `out` that is a disk of its own stays mounted."""
    for path in list(stage.iterdir()) if stage.exists() else []:
        for inner in path.iterdir() if path.name == "out" else [path]:
            shutil.rmtree(inner) if inner.is_dir() else inner.unlink()
    (stage / "out").mkdir(parents=True, exist_ok=True)
    shutil.copytree(template / "data", stage / "data")
    shutil.copy2(template / "config.yml", stage / "config.yml")
    for source, place in operation.needs:
        copy = shutil.copytree if (template / source).is_dir() else shutil.copy2
        copy(template / source, stage / place)


def unfinished(directory: Path) -> list[str]:
    """What is left of writing, and of locks."""
    return [
        path.name
        for path in directory.rglob("*")
        if path.name.endswith(".tmp") or path.name in (".partial", "run.lock")
    ]


def read_all(stage: Path) -> None:
    """Read every file that an operation left; what is half written does not pass."""
    readers: dict[str, Callable[[Path], object]] = {
        ".pt": load_training_state,
        ".json": lambda path: json.loads(path.read_bytes()),
        ".jsonl": lambda path: RunDirectory(path.parent).rows(),
        ".yml": load_config,
        ".packed": lambda path: _read_packed(path, stage),
        ".html": lambda path: _ends(path, "</html>"),
        ".svg": lambda path: _ends(path, "</svg>"),
        ".safetensors": lambda path: load_features(path) if path.stem == "features" else read(path),
    }
    for folder, _, names in os.walk(stage / "out"):  # which passes over what another process sweeps meanwhile
        for path in (Path(folder, name) for name in names):
            if path.suffix in readers and path.is_file():
                readers[path.suffix](path)


def _read_packed(path: Path, stage: Path) -> None:
    images = PackedImages(path, stage / "data", (64, 64))
    images.read(range(images.shape[0]))


def _ends(path: Path, with_: str) -> None:
    if not path.read_text(encoding="utf-8").rstrip().endswith(with_):
        raise AssertionError(f"{path.name} is half written")
