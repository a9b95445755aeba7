"""A data set from one file outside the package: installed, it is checked, synthesized, trained on and evaluated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import signal_reid
from signal_reid.config import dump_config
from signal_reid.data.layouts import LAYOUTS

LAYOUT = '''
"""Two modalities in one directory per split: IDENTITY_CAMERA_NUMBER_MODALITY.png."""

from collections import defaultdict
from dataclasses import replace

from signal_reid.data.errors import Problem
from signal_reid.data.layouts import ImageSource, Layout, Sample, Shot, SyntheticTwin

MODALITIES = ("visible", "thermal")


def scan_split(directory):
    found = defaultdict(dict)
    for path in sorted(directory.glob("*.png")):
        name, _, modality = path.stem.rpartition("_")
        found[name][modality] = path
    for name, images in sorted(found.items()):
        if images.keys() != set(MODALITIES):
            yield Problem(directory / name, f"expected {MODALITIES}, got {sorted(images)}")
            continue
        identity, camera, _ = map(int, name.split("_"))
        yield Sample(identity, camera - 1, -1, tuple(ImageSource(images[m]) for m in MODALITIES), name)


def synthetic_files(shot: Shot, pictures):
    rgb, _, thermal = pictures
    name = f"{'fit' if shot.split == 'train' else 'hold'}/{shot.identity}_{shot.camera}_{shot.number}"
    return {f"{name}_visible.png": rgb, f"{name}_thermal.png": thermal}


LAYOUT = Layout(
    name="toy",
    modalities=MODALITIES,
    directories=("toy",),
    train="fit",
    query="hold",
    gallery="hold",
    protocol="camera",
    scan_split=scan_split,
    twin=SyntheticTwin("vehicle", most_identities=99, most_cameras=3, image_size=(64, 64), files=synthetic_files),
)
BARE = replace(LAYOUT, name="toy_bare", twin=None)
MISNAMED = LAYOUT
'''

RUN_COMMANDS = """
import contextlib, io, json, sys
from signal_reid.cli import main

results = []
for command in json.load(open(sys.argv[1])):
    sys.argv = ["signal-reid", *command]
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    results.append([code, out.getvalue(), errors.getvalue()])
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory on the path that holds the file and what an installer writes beside it."""
    site = tmp_path_factory.mktemp("site")
    (site / "toy_dataset.py").write_text(LAYOUT)
    information = site / "toy_dataset-0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-dataset\nVersion: 0.1\n")
    names = {"toy": "LAYOUT", "toy_bare": "BARE", "toy_misnamed": "MISNAMED"}
    entries = "\n".join(f"{name} = toy_dataset:{attribute}" for name, attribute in names.items())
    (information / "entry_points.txt").write_text(f"[signal_reid.layouts]\n{entries}\n")
    return site


@pytest.fixture(scope="module")
def run(installed, forking, tmp_path_factory):
    """Run commands of the program in a process that finds the plug-in; returns code, output and errors of each."""
    given = tmp_path_factory.mktemp("commands") / "commands.json"

    def call(*commands):
        given.write_text(json.dumps([[str(argument) for argument in command] for command in commands]))
        done = forking.run(RUN_COMMANDS, given, path=[installed])
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def test_a_data_set_of_two_modalities_is_used_like_a_built_in_one(run, tiny_config, tmp_path):
    config = tiny_config("rgbnt201", "model.modalities=2", "schedule.epochs=1", "schedule.warmup_epochs=0")
    (tmp_path / "config.yml").write_text(dump_config(config).replace("dataset: rgbnt201", "dataset: toy"))
    root, output, weights = tmp_path / "data", tmp_path / "run", tmp_path / "run" / "last.safetensors"
    counts = ["--train-identities", 5, "--test-identities", 3, "--images-per-identity", 4, "--cameras", 2]
    train = ["train", "--config", tmp_path / "config.yml", f"data.root={root}", f"output={output}"]
    results = run(
        ["data", "synthesize", "toy", root, *counts],
        ["data", "check", "toy", root],
        train,
        ["eval", "--weights", weights, "--output", tmp_path / "numbers.json"],
    )
    assert [code for code, _, _ in results] == [0, 0, 0, 0], results
    assert "20 training pairs of 5 identities, 12 queries, 12 gallery pairs, 2 cameras (1, 2); " in results[1][1]
    assert 0 < json.loads((tmp_path / "numbers.json").read_text())["mAP"] <= 1
    told = "".join(out + errors for _, out, errors in results)
    assert "triplet" not in told.replace("triplet loss", "").replace(", triplet ", "")  # but for the loss
    assert all(name in (output / "report.html").read_text() for name in ("visible", "thermal"))


def test_mistakes_with_plug_ins_are_one_line(run, tmp_path):
    names = ", ".join(sorted((*LAYOUTS.names(), "toy", "toy_bare", "toy_misnamed")))
    known = f"dataset must be one of {names}, got 'tea'"
    cases = {
        ("data", "synthesize", "toy_bare", tmp_path / "data"): "toy_bare cannot be synthesized",
        (
            "data",
            "check",
            "toy_misnamed",
            tmp_path,
        ): "must be a Layout of that name, got a Layout named 'toy'",
        ("data", "check", "tea", tmp_path): known,
        ("config", "show", "rgbnt201", "data.dataset=tea"): f"data.{known}",
    }
    for (code, _, errors), words in zip(run(*cases), cases.values(), strict=True):
        (line,) = errors.splitlines()
        assert (code, line.startswith("error: ")) == (2, True)
        assert words in line


def test_the_names_of_data_sets_are_known_without_importing_them_or_pytorch():
    code = "import sys; from signal_reid.data.layouts import LAYOUTS; LAYOUTS.names(); print(*sys.modules)"
    package = Path(signal_reid.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=package)
    imported = done.stdout.split()
    assert "signal_reid.data.layouts" in imported
    assert not {"torch", "PIL", "signal_reid.data.layouts.rgbnt201"} & {*imported}
