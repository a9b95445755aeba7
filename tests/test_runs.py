"""Run directories beside each other: `report RUN1 RUN2 ...` and `ablate`, as a script calls them."""

import csv
import io
import json
import re
import shutil

import pytest
import torch
from rich.console import Console

from signal_reid import ablation, checkpoints, program
from signal_reid.ablation import folder_name, offered, parse_variant, plan_trainings, read_variants, run_ablation
from signal_reid.config import ConfigError, dump_config, load_config
from signal_reid.data import open_dataset
from signal_reid.evaluation.evaluator import Evaluator
from signal_reid.methods.base import Ablation
from signal_reid.methods.registry import build_model
from signal_reid.program import compare
from signal_reid.report import run_comparison
from signal_reid.report.ablation_table import SeedResult, VariantResult, ablation_csv, latex, markdown
from signal_reid.report.evaluated import keep_features, recall_features
from signal_reid.training.loop import DivergedError
from signal_reid.training.run_directory import RunDirectory

QUIET = Console(quiet=True)
SHORT = ["schedule.epochs=1", "schedule.warmup_epochs=0"]
VARIANTS = (
    Ablation("small rate", ("optimizer.base_rate=1e-4",)),
    Ablation("+ large rate", ("optimizer.base_rate=1e-2",)),
)


@pytest.fixture(scope="module")
def source(tiny_config, synthetic, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "config.yml"
    path.write_text(dump_config(tiny_config("rgbnt201", f"data.root={synthetic()}", *SHORT)))
    return path


def features_alone(run, config, dataset, evaluation, model):
    """What a report leaves for comparisons; drawing its pictures would take most of a test's time."""
    keep_features(run, config, dataset, evaluation)


@pytest.fixture(scope="module")
def ablated(source, tmp_path_factory):
    """An ablation of two variants, one training each."""
    directory = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "report_on_training", features_alone)
        return directory, run_ablation(source, [], VARIANTS, [3], directory, console=QUIET)


@pytest.fixture
def runs(ablated, tmp_path):
    """Copies of its two runs, which a test may damage."""
    names = ("small-rate", "large-rate")
    return [shutil.copytree(ablated[0] / name / "seed-3", tmp_path / name) for name in names]


def test_an_ablation_trains_each_variant_and_writes_the_table_four_times(ablated):
    directory, result = ablated
    assert [variant.name for variant in result.variants] == ["small rate", "+ large rate"]
    for variant, folder in zip(result.variants, ("small-rate", "large-rate"), strict=True):
        run = RunDirectory(directory / folder / "seed-3")
        assert load_config(run.config).training.seed == 3
        last = [row for row in run.rows() if row["kind"] == "eval"][-1]
        assert variant.values("mAP") == [last["mAP"]]
        for name in ("ablation.csv", "runs.csv", "ablation.tex", "ablation.md"):
            assert variant.name in (directory / name).read_text()
    page = (directory / "ablation.html").read_text()
    assert all(word in page for word in ("+ large rate", "optimizer.base_rate", "ablation.tex", "http" + "-equiv"))


def test_a_finished_training_is_left_and_an_interrupted_one_resumed(ablated, source, tmp_path, monkeypatch):
    directory = shutil.copytree(ablated[0], tmp_path / "again")
    (directory / "large-rate" / "seed-3" / "last.safetensors").unlink()
    trained = []
    monkeypatch.setattr(ablation, "train", lambda config, resume, console: trained.append((config.output, resume)))
    monkeypatch.setattr(ablation, "compare_runs", lambda runs, output, *_, **__: output)
    run_ablation(source, [], VARIANTS, [3], directory, console=QUIET)
    assert trained == [(str(directory / "large-rate" / "seed-3"), True)]


def test_a_directory_of_other_settings_is_refused(ablated, source):
    with pytest.raises(ValueError, match=r"holds a training with losses\.triplet=1\.0"):
        plan_trainings(source, ["losses.triplet=0.5"], VARIANTS, [3], ablated[0])
    with pytest.raises(ValueError, match=r"evaluation\.reranking=False, and small rate has True"):
        plan_trainings(source, ["evaluation.reranking=true"], VARIANTS, [3], ablated[0])


def test_a_training_that_diverges_is_noted_and_the_others_go_on(ablated, source, tmp_path, monkeypatch):
    directory = shutil.copytree(ablated[0], tmp_path / "again")

    def diverge(config, resume, console):
        raise DivergedError("training diverged: the loss is nan at step 1 of epoch 1")

    monkeypatch.setattr(ablation, "train", diverge)
    third = Ablation("huge rate", ("optimizer.base_rate=1e9",))
    result = run_ablation(source, [], [*VARIANTS, third], [3], directory, console=QUIET)
    assert result.variants[2].failures == ["huge rate, seed 3: training diverged: the loss is nan at step 1 of epoch 1"]
    assert "huge rate, seed 3: training diverged" in result.page.read_text()
    assert list(csv.reader(io.StringIO((directory / "runs.csv").read_text())))[3][-1].startswith("training diverged")


def test_variants_are_checked_before_the_first_is_trained(source, tmp_path):
    with pytest.raises(ConfigError, match=r"variant typo: unknown key model.layer; the nearest valid key is"):
        plan_trainings(source, [], [VARIANTS[0], Ablation("typo", ("model.layer=1",))], [1], tmp_path)
    with pytest.raises(ConfigError, match="names that differ in letters and digits, got 'SIM'"):
        plan_trainings(source, [], [Ablation("SIM", ()), Ablation("+ sim", ())], [1], tmp_path)
    with pytest.raises(ConfigError, match="two variants or more, got 1"):
        plan_trainings(source, [], VARIANTS[:1], [1], tmp_path)
    with pytest.raises(ConfigError, match="seeds must differ, got 1, 1"):
        plan_trainings(source, [], VARIANTS, [1, 1], tmp_path)


def test_signal_offers_the_papers_table(source):
    variants = offered(load_config(source))
    assert [variant.name for variant in variants] == ["baseline", "+ SIM", "+ SIM + GAM", "+ SIM + GAM + LAM"]
    models = [load_config(source, variant.overrides).model for variant in variants]
    switched = [(m.selective_interaction, m.global_alignment, m.local_alignment) for m in models]
    assert switched == [(False,) * 3, (True, False, False), (True, True, False), (True,) * 3]
    assert [folder_name(variant.name) for variant in variants] == ["baseline", "sim", "sim-gam", "sim-gam-lam"]


def test_variants_come_from_a_file_or_an_option(tmp_path):
    path = tmp_path / "variants.yml"
    path.write_text("k 40: [model.k_intra=40]\nas it is:\n")
    assert read_variants(path) == [Ablation("k 40", ("model.k_intra=40",)), Ablation("as it is", ())]
    assert parse_variant("k 40: model.k_intra=40 model.heads=joint").overrides == (
        "model.k_intra=40",
        "model.heads=joint",
    )
    path.write_text("k 40: model.k_intra=40\n")
    with pytest.raises(ConfigError, match="'k 40' must be a list of key=value"):
        read_variants(path)
    with pytest.raises(ConfigError, match=r"'NAME: key=value key=value', got 'model\.k_intra=40'"):
        parse_variant("model.k_intra=40")


def test_a_file_of_variants_is_read_as_a_configuration_is(tmp_path):
    path = tmp_path / "variants.yml"
    path.write_bytes("größer: [model.k_intra=40]\n".encode())  # UTF-8 whatever the locale
    assert [variant.name for variant in read_variants(path)] == ["größer"]
    aliases = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 8))
    for text in (aliases, "a: [x]\na: [y]\n", "[" * 3000, "a: !!bool x\n", "\x00"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            read_variants(path)


def test_tables_hold_mean_and_sample_deviation_and_mark_the_best():
    def row(value):
        return {"epoch": 1, **dict.fromkeys(("mAP", "rank1", "rank5", "rank10", "mINP"), value)}

    def variant(name, *values):
        seeds = [SeedResult(seed, row(value), row(value)) for seed, value in enumerate(values)]
        return VariantResult(name, ("a=1",), 10**6, 2e9, seeds)

    variants = [variant("A & B", 0.1, 0.2, 0.3), variant("C|D", 0.5)]
    assert r"A \& B & 1.00 & 2 & 20.0 $\pm$ 10.0" in latex(variants)
    assert latex(variants).count(r"\textbf{50.0}") == 6
    assert "| A & B | 1.00 | 2 | 20.0 ± 10.0 |" in markdown(variants)
    assert r"| C\|D | 1.00 | 2 | **50.0** |" in markdown(variants)
    first, second = list(csv.DictReader(io.StringIO(ablation_csv(variants))))
    assert (float(first["mAP_mean"]), float(first["mAP_deviation"])) == pytest.approx((0.2, 0.1))
    assert (second["seeds"], second["mAP_deviation"]) == ("1", "")


def test_kept_features_are_the_evaluations(runs):
    run = RunDirectory(runs[0])
    config = load_config(run.config)
    dataset = open_dataset(config.data.dataset, config.data.root)
    kept = recall_features(run, config, dataset)
    assert kept.query is kept.gallery  # one set, as RGBNT201's are
    model = run_comparison.load_trained(run.weights, run.config).model
    again = Evaluator(config, dataset, torch.device("cpu")).run(model)
    assert torch.equal(kept.query.features, again.query.features)
    assert kept.metrics.mAP == again.metrics.mAP == run.rows()[-1]["mAP"]


def test_kept_features_of_other_weights_are_not_used(runs):
    shutil.copy(runs[1] / "last.safetensors", runs[0] / "last.safetensors")
    run = RunDirectory(runs[0])
    config = load_config(run.config)
    assert recall_features(run, config, open_dataset(config.data.dataset, config.data.root)) is None


def test_features_of_a_query_and_a_gallery_apart_come_back_as_they_were(tiny_config, synthetic, tmp_path):
    config = tiny_config("msvr310", f"data.root={synthetic('msvr310')}")
    run, dataset = RunDirectory(tmp_path), open_dataset("msvr310", config.data.root)
    model = build_model(config, dataset.num_train_identities, dataset.num_cameras)
    checkpoints.export(model, run.last, config=config)
    evaluation = Evaluator(config, dataset, torch.device("cpu")).run(model)
    keep_features(run, config, dataset, evaluation)
    kept = recall_features(run, config, dataset)
    for part in ("query", "gallery"):
        for name in ("features", "identities", "cameras", "scenes"):
            assert torch.equal(getattr(getattr(kept, part), name), getattr(getattr(evaluation, part), name))


def test_runs_are_compared_without_running_a_model(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_comparison, "load_trained", None)
    page = compare(runs, tmp_path / "page.html")
    text = page.read_text()
    assert all(word in text for word in ("small-rate", "large-rate", "optimizer.base_rate", "gained at rank 1"))


def test_a_run_without_weights_is_compared_in_what_it_has(runs, tmp_path):
    for name in ("last.safetensors", "best.safetensors"):
        (runs[1] / name).unlink()
    text = compare(runs, tmp_path / "page.html").read_text()
    assert "large-rate is left out of the queries: it has no weights" in text
    assert f"signal-reid train --resume {runs[1]}" in text
    assert "gained at rank 1" not in text


def test_a_run_whose_data_is_gone_says_how_to_get_it_back(runs, tmp_path):
    config = runs[1] / "config.yml"
    config.write_text(dump_config(load_config(config, ["data.root=/nowhere"])))
    text = compare(runs, tmp_path / "page.html").read_text()
    assert "large-rate is left out of the queries: /nowhere" in text
    assert "data.root=DIRECTORY" in text


def test_runs_that_cannot_be_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="two runs or more, each once"):
        compare([runs[0], runs[0]], tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        compare([runs[0], tmp_path], tmp_path / "page.html")


def test_hostile_names_do_nothing_in_the_page(runs, tmp_path):
    hostile = tmp_path / '<script>alert("x")<'
    runs[0].rename(hostile)
    rows = [json.loads(line) for line in (hostile / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, "<script>": 1.0} if row["kind"] == "epoch" else row for row in rows]
    (hostile / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = compare([hostile, runs[1]], tmp_path / "page.html").read_text()
    assert text.count("<script>") == 1  # the page's own
