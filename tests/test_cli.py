"""The program as its user sees it: what it writes, and one line for each mistake."""

import csv
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import signal_reid
import signal_reid.demo
from signal_reid import checkpoints
from signal_reid.cli import main
from signal_reid.config import dump_config
from signal_reid.evaluation import load_features
from signal_reid.runtime.console import make_console
from signal_reid.training.run_directory import RunDirectory
from signal_reid.upstream.parameters import ours_to_authors


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program; returns exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["signal-reid", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def config_file(tiny_config, synthetic, tmp_path):
    def write(name: str = "rgbnt201", root: Path | None = None) -> Path:
        config = tiny_config(
            name,
            f"data.root={root or synthetic(name)}",
            f"output={tmp_path / 'run'}",
            "schedule.epochs=1",
            "schedule.warmup_epochs=0",
        )
        path = tmp_path / "config.yml"
        path.write_text(dump_config(config))
        return path

    return write


@pytest.fixture
def copied(synthetic, tmp_path):
    """A copy of the synthetic persons that a test may damage."""
    return Path(shutil.copytree(synthetic(), tmp_path / "copied"))


@pytest.fixture(scope="module")
def finished(tiny_config, synthetic, tmp_path_factory):
    """The directory of a run that ended; read only."""
    output = tmp_path_factory.mktemp("finished") / "run"
    overrides = (f"data.root={synthetic()}", f"output={output}", "schedule.epochs=1", "schedule.warmup_epochs=0")
    signal_reid.train(tiny_config("rgbnt201", *overrides), console=make_console(quiet=True))
    return output


@pytest.fixture
def trained(finished, config_file, tmp_path):
    """A copy of a finished run, where the configuration file would put it."""
    config_file()
    return Path(shutil.copytree(finished, tmp_path / "run"))


def assert_one_line(result, *words):
    code, _, errors = result
    lines = errors.strip().splitlines()
    assert code == 2, errors
    assert lines[-1].startswith("error: "), errors
    assert "Traceback" not in errors
    assert all(word in lines[-1] for word in words), lines[-1]


def test_train_eval_extract_and_report(run, config_file, tmp_path):
    code, _, errors = run("train", "--config", config_file())
    assert code == 0, errors
    trained = tmp_path / "run"
    assert {"config.yml", "metrics.jsonl", "checkpoint.pt", "last.safetensors", "report.html"} <= {
        path.name for path in trained.iterdir()
    }
    weights = trained / "last.safetensors"
    code, out, _ = run("eval", "--weights", weights, "--output", tmp_path / "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    measured = [row for row in map(json.loads, (trained / "metrics.jsonl").open()) if row["kind"] == "eval"]
    assert code == 0
    assert numbers["mAP"] == measured[-1]["mAP"]
    assert f"{numbers['mAP']:.1%}" in out

    assert_one_line(run("extract", "--weights", weights, "--output", tmp_path / "f.npz"), "*.safetensors, got f.npz")
    code, _, _ = run("extract", "--weights", weights, "--output", tmp_path / "f.safetensors", "--split", "query")
    features, names = load_features(tmp_path / "f.safetensors")
    assert (code, len(features), features.features.shape[1]) == (0, len(names), 6 * 32)

    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(weights, moved)
    code, elsewhere, _ = run("eval", "--weights", moved)
    assert (code, elsewhere) == (0, out)

    (trained / "report.html").unlink()
    options = ("--count", 1, "--top", 2, "--limit", 1, "--order", "best", "--before", weights, "--size-limit", 0.4)
    assert run("report", trained, *options)[0] == 0
    report = (trained / "report.html").read_text()
    assert (report.count("<article"), report.count('<li class="item')) == (1, 2)
    assert "This file is at most 0.4 MB large." in report
    assert "Before training: " in report


def test_eval_with_modalities_missing_is_one_table_and_json(run, trained, tmp_path):
    arguments = ("eval", "--weights", trained / "last.safetensors", "--output", tmp_path / "numbers.json")
    code, out, _ = run(*arguments, "--missing", "all", "--missing", "query=RGB,NI;gallery=TI")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    found = numbers["missing"]
    assert code == 0
    assert found["complete"] == {name: numbers[name] for name in found["complete"]}
    assert [row["query_missing"] for row in found["settings"]] == [
        ["RGB"], ["NI"], ["TI"], ["RGB", "NI"], ["RGB", "TI"], ["NI", "TI"], ["RGB", "NI"]
    ]  # fmt: skip
    assert found["settings"][-1]["gallery_missing"] == ["TI"]
    assert found["mean"]["mAP"] == pytest.approx(sum(row["mAP"] for row in found["settings"][:6]) / 6)
    assert "an image of zeros after normalisation stands for a missing one" in " ".join(out.split())
    assert f"{found['mean']['mAP']:.1%}" in out
    assert_one_line(run(*arguments, "--missing", "IR"), "missing must name modalities of RGB, NI, TI, got 'IR'")


def test_eval_tells_details_and_writes_the_result_of_each_query(run, trained, tmp_path):
    arguments = ("eval", "--weights", trained / "last.safetensors", "--output", tmp_path / "numbers.json", "--details")
    code, out, _ = run(*arguments, "--queries", tmp_path / "queries.csv")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    details = numbers["details"]
    assert code == 0
    assert details["precision_at"]["1"] == pytest.approx(numbers["rank1"])
    assert details["mAP_interval"]["low"] <= numbers["mAP"] <= details["mAP_interval"]["high"]
    assert [point["asked_rate"] for point in details["verification"]["points"]] == [1e-4, 1e-3, 1e-2, 1e-1]
    assert f"area under the ROC {details['verification']['area']:.4f}" in " ".join(out.split())
    queries = sum(group["queries"] for group in details["cameras"])
    assert queries == sum(group["queries"] for group in details["identities"]) == 12
    assert [group["label"] for group in details["cameras"]] == ["cam1", "cam2"]
    assert all(re.search(rf"│ {camera} +│", out) for camera in ("cam1", "cam2"))
    with (tmp_path / "queries.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(f"_{row['camera']}_" in row["query"] for row in rows)
    precision = [float(row["average_precision"]) for row in rows if row["average_precision"]]
    assert len(rows) == queries
    assert sum(precision) / len(precision) == pytest.approx(numbers["mAP"])
    assert_one_line(run(*arguments, "--queries", tmp_path / "queries.txt"), "*.csv or *.parquet, got queries.txt")


@pytest.mark.parametrize("name", ["rgbnt201", "rgbnt100", "msvr310"])
def test_authors_weights_evaluate_on_every_layout(run, config_file, name, tmp_path):
    path = config_file(name)
    config = signal_reid.load_config(path)
    model = signal_reid.build_model(config, num_identities=7, num_cameras=5)
    torch.save(ours_to_authors(model.state_dict()), tmp_path / "authors.pth")
    code, out, errors = run("eval", "--config", path, "--weights", tmp_path / "authors.pth")
    assert code == 0, errors
    assert "mAP" in out
    assert "dropped" not in errors  # the model is sized as the weights need it


@pytest.mark.parametrize("name", ["rgbnt201", "rgbnt100", "msvr310"])
def test_pictures_are_drawn_of_the_authors_weights_on_every_layout(run, config_file, name, tmp_path):
    path, picture = config_file(name), tmp_path / "picture.png"
    model = signal_reid.build_model(signal_reid.load_config(path), num_identities=7, num_cameras=5)
    torch.save(ours_to_authors(model.state_dict()), tmp_path / "authors.pth")
    given = ["--config", path, "--weights", tmp_path / "authors.pth"]
    code, out, errors = run("show", "volumes", *given, "--output", picture)
    assert code == 0, errors
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "guessing" in out
    assert "0.07" in out  # the temperature


def test_what_cannot_be_drawn_is_one_line_and_leaves_no_file(run, config_file, tmp_path):
    path, picture = config_file(), tmp_path / "picture.svg"
    config = signal_reid.load_config(path)
    checkpoints.export(signal_reid.build_model(config, 5, 2), tmp_path / "w.safetensors", "ours", config)
    given = ["--weights", tmp_path / "w.safetensors", "--output", picture]
    assert_one_line(run("show", "nothing", *given), "one of tokens, offsets, volumes, attention", "'nothing'")
    assert_one_line(run("show", "tokens", *given[:3], tmp_path / "a.gif"), ".png, .svg or .pdf", "a.gif")
    assert_one_line(run("show", "tokens", *given, "--query", "nobody"), "'nobody'", "near it")
    assert_one_line(run("show", "tokens", *given, "--before", tmp_path / "no.pth"), "no file")
    assert_one_line(run("show", "volumes", *given, "model.global_alignment=false"), "the model has no GAM")
    assert not picture.exists()


def test_weights_that_know_fewer_cameras_are_refused_unless_cameras_are_left_out(run, config_file, tmp_path):
    path = config_file()
    model = signal_reid.build_model(signal_reid.load_config(path), num_identities=7, num_cameras=1)
    torch.save(ours_to_authors(model.state_dict()), tmp_path / "authors.pth")
    arguments = ["eval", "--config", path, "--weights", tmp_path / "authors.pth"]
    assert_one_line(run(*arguments), "knows 1 cameras, the data set has 2", "camera_embedding=false")
    without = [run(*arguments, "model.backbone.camera_embedding=false") for _ in range(2)]
    assert [code for code, _, _ in without] == [0, 0]
    assert without[0][1] == without[1][1]
    assert "dropped clip_vision_encoder.cv_embed" in " ".join(without[0][2].split())


def test_a_model_that_the_authors_code_cannot_hold_is_not_exported_for_it(run, tiny_config, tmp_path):
    config, weights = tiny_config("rgbnt201", "model.modalities=2"), tmp_path / "two.safetensors"
    signal_reid.checkpoints.export(signal_reid.build_model(config, 4, 2), weights, config=config)
    arguments = ["export", "--weights", weights, "--output", tmp_path / "two.pth"]
    assert_one_line(run(*arguments, "--naming", "authors"), "the authors' model has 3 modalities")
    assert_one_line(run(*arguments, "--naming", "theirs"), "naming must be 'ours' or 'authors'")
    assert not (tmp_path / "two.pth").exists()


def test_resume_of_a_finished_run_says_so(run, trained):
    assert_one_line(run("train", "--resume", trained), "is finished: epoch 1 of 1", "signal-reid report", "epochs=N")


def test_a_finished_run_gets_the_report_that_it_lacks(run, trained, tmp_path):
    (trained / "report.html").unlink(missing_ok=True)
    code, _, errors = run("train", "--config", tmp_path / "config.yml", "--resume", "auto")
    assert code == 0, errors
    assert "is finished" in errors
    assert (trained / "report.html").exists()


def test_run_directory_is_not_overwritten(run, trained, tmp_path):
    assert_one_line(run("train", "--config", tmp_path / "config.yml"), "already holds a run", "--resume")


def test_missing_data_root(run, config_file, tmp_path):
    result = run("train", "--config", config_file(), f"data.root={tmp_path / 'nowhere'}")
    assert_one_line(result, "nowhere")
    assert not (tmp_path / "run").exists()


def test_missing_modality(run, config_file, copied, tmp_path):
    lost = sorted((copied / "train_171" / "NI").iterdir())[1]
    lost.unlink()
    assert_one_line(run("train", "--config", config_file(root=copied)), lost.name, "NI")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_truncated_jpeg(run, config_file, copied, cache):
    for path in sorted((copied / "train_171" / "TI").iterdir()):
        path.write_bytes(path.read_bytes()[:300])
    assert_one_line(run("train", "--config", config_file(root=copied), f"data.cache={cache}"), "TI", "truncated")


def test_wrong_weights_file(run, config_file, tmp_path):
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not weights")
    path = config_file()
    assert_one_line(run("eval", "--config", path, "--weights", tmp_path / "other.pth"), "other.pth", "some.weight")
    assert_one_line(run("eval", "--config", path, "--weights", tmp_path / "text.pth"), "text.pth")
    assert_one_line(run("eval", "--config", path, "--weights", tmp_path / "none.pth"), "none.pth")
    torch.save({"clip_vision_encoder.weight": torch.zeros(3)}, tmp_path / "bare.pth")
    path.rename(tmp_path / "other.yml")
    assert_one_line(run("eval", "--weights", tmp_path / "bare.pth"), "bare.pth carries no configuration", "--config")
    path = (tmp_path / "other.yml").rename(path)
    assert_one_line(run("train", "--config", path, f"model.backbone.weights={tmp_path / 'text.pth'}"), "text.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("schedule.epoch=3", ["unknown key schedule.epoch", "schedule.epochs"]),
        ("data.batch_size=9", ["data.batch_size must be a multiple of data.instances (2), got 9"]),
        ("model.k_intra=65", ["model.k_intra must be in 1..64 (N), got 65"]),
        ("training.device=tpu", ["training.device", "'tpu'"]),
        ("model.modalities=2", ["model.modalities must be 3"]),
        ("evaluation.protocol=scene", ["scene"]),
    ],
)
def test_settings_that_cannot_be(run, config_file, tmp_path, override, words):
    assert_one_line(run("train", "--config", config_file(), override), *words)
    assert not (tmp_path / "run").exists()


def test_one_identity_only(run, config_file, copied, tmp_path):
    for path in copied.glob("train_171/*/*"):
        if not path.name.startswith("000001"):
            path.unlink()
    assert_one_line(run("train", "--config", config_file(root=copied)), "2 identities, got 1")
    assert not (tmp_path / "run").exists()


def test_full_disk_leaves_the_old_checkpoint_and_no_partial_file(run, config_file, tmp_path):
    path, directory = config_file(), tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        result = run("train", "--config", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(result, "run", "File too large")
    assert {path.suffix for path in directory.iterdir() if path.is_file()} <= {".yml", ".jsonl", ".log"}
    assert all(json.loads(row) for row in (directory / "metrics.jsonl").open())


def test_demo_prints_before_and_after(run, tmp_path, monkeypatch):
    monkeypatch.setattr(signal_reid.demo, "TRAIN_IDENTITIES", 8)
    monkeypatch.setattr(signal_reid.demo, "TEST_IDENTITIES", 3)
    train, kept = signal_reid.demo.train, []

    def look_and_train(config, **options):
        kept.append((tmp_path / "demo" / "baselines.json").is_file())  # before a demo can be interrupted
        return train(config, **options)

    monkeypatch.setattr(signal_reid.demo, "train", look_and_train)
    code, out, errors = run("demo", "--output", tmp_path / "demo", "schedule.epochs=1", "schedule.warmup_epochs=0")
    assert code == 0, errors
    assert all(row in out for row in ("raw pixel distance", "before training", "after training"))
    report = (tmp_path / "demo" / "report.html").read_text()
    assert all(row in report for row in ("raw pixel distance", "before training", "after training"))
    assert kept == [True]
    assert "after training" in (tmp_path / "demo" / "run.log").read_text()
    again = "demo", "--output", tmp_path / "demo", "schedule.epochs=1", "schedule.warmup_epochs=0"
    assert_one_line(run(*again), "already holds a run", "its report is")
    (tmp_path / "demo" / "report.html").unlink()
    assert_one_line(run(*again), "signal-reid report", "reports on it")
    assert not signal_reid.demo._begun(RunDirectory(tmp_path / "another"), signal_reid.load_config("demo"))
    assert signal_reid.demo._begun(RunDirectory(tmp_path / "demo"), signal_reid.load_config("demo"))  # 1 epoch of 28


def test_data_check_of_nothing(run, tmp_path):
    assert_one_line(run("data", "check", "rgbnt201", tmp_path / "nowhere"), "nowhere")


def test_data_check_lists_every_problem(run, copied):
    assert run("data", "check", "rgbnt201", copied)[0] == 0
    names = sorted(path.name for path in (copied / "train_171" / "RGB").iterdir())
    (copied / "train_171" / "TI" / names[0]).unlink()
    (copied / "train_171" / "NI" / names[1]).write_bytes(b"no image")
    code, out, _ = run("data", "check", "rgbnt201", copied)
    assert code == 1
    assert names[0] in out
    assert names[1] in out


def test_data_synthesize_and_pack(run, config_file, tmp_path):
    root = tmp_path / "made"
    size = ["--height", 64, "--width", 64, "--train-identities", 4, "--test-identities", 2]
    assert run("data", "synthesize", "rgbnt201", root, *size)[0] == 0
    assert_one_line(run("data", "synthesize", "rgbnt201", root, *size), "made")
    path = config_file(root=root)
    assert_one_line(run("train", "--config", path, "data.cache=packed"), "data pack")
    assert run("data", "pack", "--config", path)[0] == 0
    assert run("train", "--config", path, "data.cache=packed")[0] == 0


def test_config_explain(run):
    code, out, _ = run("config", "explain", "training.precision")
    assert (code, out.splitlines()[0]) == (0, "training.precision")
    assert out.endswith("one of auto, fp32, bf16, fp16; default auto\n")
    assert_one_line(run("config", "explain", "lr"), "the nearest valid key is optimizer.base_rate")


def test_config_show_and_convert(run, tmp_path):
    code, out, _ = run("config", "show", "msvr310", "SOLVER.MAX_EPOCHS=3")
    assert (code, yaml.safe_load(out)["schedule"]["epochs"]) == (0, 3)
    theirs, ours = tmp_path / "Signal.yml", tmp_path / "ours.yml"
    theirs.write_text("MODEL:\n  TRANSFORMER_TYPE: ViT-B-16\n  USE_A: True\nDATASETS:\n  NAMES: ('MSVR310')\n")
    assert run("config", "convert", theirs, ours)[0] == 0
    assert signal_reid.load_config(ours) == signal_reid.load_config(theirs)


def test_info_says_why_a_backend_is_not_available(run):
    code, out, _ = run("info")
    assert code == 0
    assert "backend reference" in out
    assert "not available" in out


def test_info_of_a_configuration_says_what_it_costs(run, config_file):
    arguments = ["info", "--config", config_file(), "--batch", 2, "--repeats", 1]
    code, out, _ = run(*arguments)
    assert code == 0
    assert all(word in out for word in ("local alignment", "whole model", "5 identities and 2 cameras"))
    code, out, _ = run(*arguments, "--json", "--identities", 7, "--cameras", 3)
    costs = json.loads(out)
    assert (code, costs["num_identities"], costs["modules"][0]["name"]) == (0, 7, "backbone")
    assert_one_line(run(*arguments, "--batch", 1), "batch must be at least 2, got 1")
    assert_one_line(run("info", "schedule.epochs=3"), "--config")


def test_ablate_and_report_say_what_they_need(run, config_file, tmp_path):
    path = config_file()
    assert_one_line(run("ablate"), "--config NAME_OR_FILE")
    assert_one_line(run("ablate", "--config", path, "--seeds", "0,one"), "seeds must be whole numbers", "'0,one'")
    assert_one_line(run("ablate", "--config", path, "--variant", "a: model.layer=1", "--variant", "b:"), "variant a")
    assert_one_line(run("report", "data.root=/data"), "report needs a run directory")
    assert_one_line(run("report", tmp_path / "one", tmp_path / "two"), "one holds no run")
    assert_one_line(run("report", tmp_path / "one", "--output", "page.html"), "--output is for several runs")
    assert_one_line(run("report", tmp_path / "one", "--weights", "a.pth"), "run directories or --weights")
    assert_one_line(run("report", tmp_path / "one", "--config", "rgbnt201"), "--config is for --weights")
    assert_one_line(run("report", "one", "two", "--limit", "3"), "--limit is for the report of one run, got 2 runs")
    assert_one_line(run("report", tmp_path / "one", "--size-limit", "nan"), "--size-limit", "got nan")


def test_what_is_written_to_the_standard_output_stands_there_alone(run, finished, tmp_path):
    with (tmp_path / "out").open("wb") as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            code, out, errors = run("eval", "--weights", finished / "last.safetensors", "--output", "/dev/stdout")
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    assert (code, out) == (0, "")
    assert f"{json.loads((tmp_path / 'out').read_text())['mAP']:.1%}" in errors  # where the table is


def test_a_name_that_the_locale_cannot_say_is_not_said_to_be_absent(run, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsencode", lambda name: str(name).encode("ascii", "surrogateescape"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert_one_line(run("data", "check", "rgbnt201", tmp_path / "数据"), "数据: no such directory", "set PYTHONUTF8=1")
    (tmp_path / "m.csv").write_text("split,identity,RGB\ntrain,1,数据.png\n", encoding="utf-8")
    code, out, _ = run("data", "check", "manifest", tmp_path / "m.csv")
    assert code == 1
    assert "set PYTHONUTF8=1" in out.splitlines()[-1]
    monkeypatch.setattr("signal_reid.cli.config.load_config", lambda name, _: name.encode("ascii"))
    assert_one_line(run("config", "show", "数据"), "数据 cannot be the name of a file", "set PYTHONUTF8=1")


def test_a_bug_shows_its_traceback_and_is_exit_code_1(run, monkeypatch):
    monkeypatch.setattr("signal_reid.cli.config.dump_config", lambda config: list(zip([1], [], strict=True)))
    code, _, errors = run("config", "show", "rgbnt201")
    assert code == 1
    assert errors.startswith("Traceback")
    assert errors.splitlines()[-1].startswith("ValueError: zip()")


@pytest.mark.parametrize("arguments", [["--traceback", "config", "show", "x"], ["config", "show", "x", "--traceback"]])
def test_the_traceback_of_a_mistake_is_shown_where_asked(run, arguments):
    code, _, errors = run(*arguments)
    assert code == 2
    assert errors.startswith("Traceback")
    assert errors.splitlines()[-1].startswith("error: config: no file x")
    assert_one_line(run("config", "show", "x"), "no file x")


def test_a_damaged_metrics_file_is_named(run, trained):
    (trained / "metrics.jsonl").write_text("no json\n")
    assert_one_line(run("report", trained), "metrics.jsonl: damaged")


def test_train_needs_a_configuration_or_a_run(run, trained):
    assert_one_line(run("train"), "--config", "--resume")
    assert_one_line(run("train", "--config", "rgbnt201", "--resume", trained), "either")


def test_the_version(run):
    assert run("--version") == (0, f"signal-reid {signal_reid.__version__}\n", "")
