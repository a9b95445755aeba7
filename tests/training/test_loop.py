"""A training writes its run directory, and goes on after any interruption as if there had been none."""

import json
import os
import re
import signal
import time

import pytest
import torch
from rich.console import Console

import signal_reid
from signal_reid.config import dump_config
from signal_reid.data import pack
from signal_reid.training.loop import train
from signal_reid.training.run_directory import MetricsLog, RunDirectory
from signal_reid.training.step import TrainingStep


@pytest.fixture(scope="module")
def config_in(tiny_config, synthetic):
    """The configuration of a training of three epochs in a directory."""

    def make(directory, *overrides: str):
        return tiny_config(
            "rgbnt201",
            f"data.root={synthetic()}",
            f"output={directory}",
            "schedule.epochs=3",
            "schedule.warmup_epochs=1",
            "training.log_every=1",
            *overrides,
        )

    return make


@pytest.fixture
def config(config_in, tmp_path):
    return lambda run="run", *overrides: config_in(tmp_path / run, *overrides)


def quietly(config, resume=False):
    return train(config, resume=resume, console=Console(quiet=True))


def losses(config):
    rows = RunDirectory(config.output).rows()
    return [(row["epoch"], row["step"], row["total"]) for row in rows if row["kind"] == "step"]


def evaluations(config):
    return [(row["epoch"], row["mAP"]) for row in RunDirectory(config.output).rows() if row["kind"] == "eval"]


@pytest.fixture(scope="module")
def uninterrupted(config_in, tmp_path_factory):
    """Losses and evaluations of a training that nothing disturbs."""
    reference = config_in(tmp_path_factory.mktemp("uninterrupted"))
    quietly(reference)
    return losses(reference), evaluations(reference)


def test_run_directory_holds_all_of_a_run(config):
    config = config()
    result = quietly(config)
    run = RunDirectory(config.output)
    assert signal_reid.load_config(run.config) == config
    assert [row["kind"] for row in run.rows() if row["epoch"] == 1] == ["step", "step", "epoch", "eval"]
    assert [row["step"] for row in run.rows() if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert any(run.tensorboard.iterdir())
    fresh = signal_reid.build_model(config, result.dataset.num_train_identities, result.dataset.num_cameras)
    signal_reid.checkpoints.load(fresh, run.last)
    trained = result.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in fresh.state_dict().items())
    best = max(mAP for _, mAP in evaluations(config))
    assert result.best_mAP == best


def test_training_lowers_the_loss(config):
    config = config(
        "run",
        "schedule.epochs=15",
        "schedule.noise=false",
        "optimizer.base_rate=2e-3",
        "optimizer.backbone_rate=null",
        "evaluation.every=15",
    )
    quietly(config)
    steps = [loss for _, _, loss in losses(config)]
    assert sum(steps[-4:]) < 0.8 * sum(steps[:4])


@pytest.mark.parametrize("cache", ["ram", "packed"])
def test_same_seed_same_losses_whatever_the_workers_and_the_cache(config, uninterrupted, cache):
    other = config("other", "data.workers=1", f"data.cache={cache}")
    if cache == "packed":
        pack("rgbnt201", other.data.root, other)
    quietly(other)
    assert losses(other) == uninterrupted[0]


def test_thirty_steps_from_a_packed_file_are_those_from_the_images(config):
    long = ["schedule.epochs=15", "evaluation.every=15"]
    plain, packed = config("plain", *long), config("packed", *long, "data.cache=packed")
    pack("rgbnt201", packed.data.root, packed)
    for run in (plain, packed):
        quietly(run)
    assert losses(packed) == losses(plain)
    assert len(losses(plain)) == 30


def test_a_run_that_cannot_compile_says_so_and_goes_on(config, monkeypatch):
    class Broken(TrainingStep):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, compiler=broken, **settings)

    def broken(graph, inputs):
        raise RuntimeError("no compiler is here")

    monkeypatch.setattr("signal_reid.training.step.wants_compile", lambda config, device: True)
    monkeypatch.setattr("signal_reid.training.setup.TrainingStep", Broken)
    config = config("run", "schedule.epochs=1", "schedule.warmup_epochs=0")
    shown = Console(record=True, file=open(os.devnull, "w"), width=400)  # noqa: SIM115
    train(config, console=shown)
    assert shown.export_text().count("torch.compile failed, the run goes on without it: ") == 1
    assert len(losses(config)) == 2


def test_an_epoch_tells_where_its_time_went(config, monkeypatch):
    monkeypatch.setattr("signal_reid.training.outlook.SECONDS_BETWEEN_LINES", 0)
    config = config("timed", "schedule.epochs=1", "schedule.warmup_epochs=0")
    shown = Console(record=True, file=open(os.devnull, "w"), width=400)  # noqa: SIM115
    train(config, console=shown)
    text = shown.export_text()
    assert re.search(r"data \d+%, forward \d+%, backward \d+%, optimizer \d+%, peak memory \d+\.\d\d GiB", text)
    assert re.search(r"epoch 1/1, step 2/2: loss \d+\.\d+, 0 s left\n", text), text
    assert re.search(r"epoch 1/1: loss [\d.]+ \(identity [\d.]+, triplet [\d.]+, accuracy [\d.]+%\), ", text)
    assert [line.split("  ", 1)[1] for line in RunDirectory(config.output).log.read_text().splitlines()][-1] == "ended"
    (row,) = [row for row in RunDirectory(config.output).rows() if row["kind"] == "epoch"]
    laps = [row[f"{name}_seconds"] for name in ("data", "forward", "backward", "optimizer")]
    assert min(laps) > 0
    assert sum(laps) <= row["seconds"] * 1.01
    assert row["peak_memory_bytes"] > 2**20


class Killed(BaseException):
    """What nothing catches, like a signal."""


def kill_at_step(patch, step):
    """Die once the losses of this step are written."""
    write = MetricsLog.write

    def write_then_die(log, kind, epoch, number, **numbers):
        write(log, kind, epoch, number, **numbers)
        if number == step:
            raise Killed

    patch.setattr(MetricsLog, "write", write_then_die)


def kill_in_checkpoint(patch, which):
    """Die when this checkpoint is written but not yet renamed."""
    replace, seen = os.replace, []

    def replace_or_die(source, target):
        if "checkpoint" in str(target):
            seen.append(target)
            if len(seen) == which:
                raise Killed
        replace(source, target)

    patch.setattr(os, "replace", replace_or_die)


@pytest.mark.parametrize(
    ("kill", "when"), [(kill_at_step, 1), (kill_at_step, 3), (kill_in_checkpoint, 1), (kill_in_checkpoint, 2)]
)
def test_resumed_run_equals_an_uninterrupted_one(config, uninterrupted, monkeypatch, kill, when):
    interrupted = config("interrupted")
    with monkeypatch.context() as patch:
        kill(patch, when)
        with pytest.raises(Killed):
            quietly(interrupted)
    quietly(interrupted, resume=True)
    assert (losses(interrupted), evaluations(interrupted)) == uninterrupted


def test_killed_process_resumes_to_the_same_losses(config, uninterrupted, tmp_path, forking):
    killed = config("killed")
    path = tmp_path / "config.yml"
    path.write_text(dump_config(killed))
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"  # sums depend on how they are split
    process = forking.start(threads + forking.PROGRAM, "train", "--config", path)
    while process.poll() is None and len(losses(killed)) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr
    quietly(killed, resume=True)
    assert (losses(killed), evaluations(killed)) == uninterrupted


def test_half_a_metrics_row_is_not_read(config, uninterrupted):
    config = config("cut")
    quietly(config)
    run = RunDirectory(config.output)
    with run.metrics.open("a") as file:
        file.write('{"kind": "st')
    assert (losses(config), evaluations(config)) == uninterrupted


def test_a_run_is_not_overwritten(config):
    config = config()
    quietly(config)
    before = RunDirectory(config.output).metrics.read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run; continue it with train --resume"):
        quietly(config)
    with pytest.raises(ValueError, match="is finished: epoch 3 of 3"):
        quietly(config, resume=True)
    assert RunDirectory(config.output).metrics.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "was", "now"),
    [("losses.triplet", "1.0", "2.0"), ("schedule.epochs", "3", "4"), ("data.batch_size", "8", "4")],
)
def test_resume_refuses_what_would_change_the_losses(config, monkeypatch, key, was, now):
    with monkeypatch.context() as patch:
        kill_in_checkpoint(patch, 2)
        with pytest.raises(Killed):
            quietly(config())
    before = RunDirectory(config().output).metrics.read_bytes()
    with pytest.raises(ValueError, match=rf"{key} was {was} in .* and cannot be {now} on resume"):
        quietly(config("run", f"{key}={now}"), resume=True)
    assert RunDirectory(config().output).metrics.read_bytes() == before


def test_resume_needs_a_run(config):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        quietly(config("nothing"), resume=True)


def test_loss_that_is_not_finite_stops_the_training(config):
    config = config("run", "optimizer.base_rate=1e30", "schedule.warmup_epochs=0", "optimizer.backbone_rate=null")
    with pytest.raises(ValueError, match=r"training diverged: the loss is (nan|inf) at step"):
        quietly(config)
    rows = RunDirectory(config.output).metrics.read_text().splitlines()
    assert all(json.loads(row) for row in rows)


def test_low_precision_stays_near_fp32(config, uninterrupted):
    low = config("low", "training.precision=bf16")
    quietly(low)
    for (_, _, ours), (_, _, exact) in zip(losses(low)[:2], uninterrupted[0][:2], strict=True):
        assert ours == pytest.approx(exact, rel=0.05)
